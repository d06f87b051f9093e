"""Programs that ``accelerate launch`` runs, one a method, with their recipes. Nobody imports them but ``hf-pretrain``.

Installed as ``hf_pretrain.trainers``; each also runs from the repository as ``python trainers/<method>.py``.
"""
