"""Transfer: what is done with a pre-trained encoder.

Before a task: `adaptation.py` gives a model the words of a domain, or another tokenizer; `modeling/surgery/adapters.py` has the
adapters of pre-training. On a task: `arguments.py` has the options of a strategy, and `strategies.py` says from them what moves,
how fast and from when on; `layers.py` knows the depth of a parameter, `adapters.py` adds those of PEFT, `recomputing.py` lets
backward need less memory with them, and `fine_tuning.py` is the Trainer. `tuning/` joins model, task and strategy, `multitask/`
has several tasks in one encoder, and `comparison/` measures strategies side by side. Without training of the encoder:
`features.py` makes features, `classic_heads.py` and `feature_heads.py` have scikit-learn's classifiers on them. The heads of
`models/task_heads/` go on top of any encoder. `generative/` is GPT-1's way.
"""
