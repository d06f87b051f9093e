"""What the Hub shows: templates of model cards, and one reference card an objective. Data only.

Installed as ``hf_pretrain.model_cards``, so that ``importlib.resources`` finds the templates.
"""
