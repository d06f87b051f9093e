"""What a reader should know of a distillation: its losses in words and formulas, the student against its teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from hf_pretrain.hub.card import ObjectiveDescription

TINYBERT = """\
@inproceedings{jiao2020tinybert,
  title = {{TinyBERT}: Distilling {BERT} for Natural Language Understanding},
  author = {Jiao, Xiaoqi and Yin, Yichun and Shang, Lifeng and Jiang, Xin and Chen, Xiao and Li, Linlin and Wang, Fang and
            Liu, Qun},
  booktitle = {Findings of {EMNLP}},
  year = {2020}
}"""
DISTILBERT = """\
@article{sanh2019distilbert,
  title = {{DistilBERT}, a distilled version of {BERT}: smaller, faster, cheaper and lighter},
  author = {Sanh, Victor and Debut, Lysandre and Chaumond, Julien and Wolf, Thomas},
  journal = {arXiv preprint arXiv:1910.01108},
  year = {2019}
}"""
MINILM = """\
@inproceedings{wang2020minilm,
  title = {{MiniLM}: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers},
  author = {Wang, Wenhui and Wei, Furu and Dong, Li and Bao, Hangbo and Yang, Nan and Zhou, Ming},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2020}
}"""
MINILMV2 = """\
@inproceedings{wang2021minilmv2,
  title = {{MiniLMv2}: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained Transformers},
  author = {Wang, Wenhui and Bao, Hangbo and Huang, Shaohan and Dong, Li and Wei, Furu},
  booktitle = {Findings of {ACL}},
  year = {2021}
}"""

# In words, in a formula ("S" the student, "T" the teacher), and where it is from.
_LOSSES: dict[str, tuple[str, str, str]] = {
    "prediction": (
        "its predictions",
        r"\tau^2 \, \mathrm{KL}\left(p_T^{1/\tau} \,\|\, p_S^{1/\tau}\right)",
        "",
    ),
    "mlm": ("the original tokens at masked positions", r"-\log p_S(x \mid \tilde{x})", ""),
    "labels": ("the labels of the data", r"-\log p_S(y \mid x)", ""),
    "cosine": ("the direction of its last hidden states", r"\left(1 - \cos(H_S, H_T)\right)", DISTILBERT),
    "embedding": ("its embeddings", r"\mathrm{MSE}(E_S W_e, E_T)", TINYBERT),
    "hidden": ("its hidden states", r"\sum_m \mathrm{MSE}(H_S^m W_h, H_T^{g(m)})", TINYBERT),
    "attention": (
        "its attention scores",
        r"\sum_m \frac{1}{h} \sum_{a=1}^{h} \mathrm{MSE}(A_{S,a}^m, A_{T,a}^{g(m)})",
        TINYBERT,
    ),
    "relation_qq": ("the relations between its queries", r"\mathrm{KL}(R_T^{QQ} \,\|\, R_S^{QQ})", MINILMV2),
    "relation_kk": ("those between its keys", r"\mathrm{KL}(R_T^{KK} \,\|\, R_S^{KK})", MINILMV2),
    "relation_vv": ("those between its values", r"\mathrm{KL}(R_T^{VV} \,\|\, R_S^{VV})", MINILMV2),
    "attention_distribution": ("the attention of one of its layers", r"\mathrm{KL}(A_T \,\|\, A_S)", MINILM),
    "value_relation": ("the relations between its values", r"\mathrm{KL}(R_T^{VV} \,\|\, R_S^{VV})", MINILM),
}

_MASKED_LM_USAGE = """\
from transformers import pipeline

fill_mask = pipeline("fill-mask", model="{repo}")
predictions = fill_mask(f"The chef ate the {fill_mask.tokenizer.mask_token}.")"""


def describe(objective: ObjectiveDescription, weights: Mapping[str, float], *, head: str) -> ObjectiveDescription:
    """Return an objective's description with the losses of one run.

    Args:
        objective: What all runs have in common.
        weights: The weight of each loss.
        head: "masked_lm", "classification", "regression" or "none".
    """
    parts, formulas, sources = zip(*(_LOSSES[name] for name in weights), strict=True)
    description = f"{objective.description} The student learns {_enumerate(parts)}."
    if head == "none":
        description += " It is an encoder only: it has no head, and what no loss reached is as it was at the start."
    terms = [
        formula
        if weight == 1
        else rf"{weight:g} \, \left( {formula} \right)"
        if formula.startswith("-")
        else rf"{weight:g} \, {formula}"
        for weight, formula in zip(weights.values(), formulas, strict=True)
    ]
    changes: dict[str, object] = {
        "description": description,
        "formula": r"\mathcal{L} = " + " + ".join(terms),
        "citations": tuple(dict.fromkeys(filter(None, sources))) or objective.citations,
    }
    if head == "masked_lm":
        changes |= {"pipeline_tag": "fill-mask", "usage": _MASKED_LM_USAGE}
    return dataclasses.replace(objective, **changes)  # type: ignore[arg-type]


def _enumerate(parts: Sequence[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last
