"""What a reader should know of a distillation: its losses in words and formulas, the student against its teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from hf_pretrain.hub.facts import ObjectiveDescription
from hf_pretrain.hub.metadata import hub_id
from hf_pretrain.objectives.distillation.student import StudentArguments

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

# Of other heads than a Trainer describes: the Hub's name of the task, and code.
_HEADS = {
    "masked_lm": (
        "fill-mask",
        """\
from transformers import pipeline

fill_mask = pipeline("fill-mask", model="{repo}")
predictions = fill_mask(f"The chef ate the {fill_mask.tokenizer.mask_token}.")""",
    ),
    "token_classification": (
        "token-classification",
        """\
from transformers import pipeline

classify = pipeline("token-classification", model="{repo}", aggregation_strategy="first")
entities = classify("The chef made a fine meal.")""",
    ),
    "question_answering": (
        "question-answering",
        """\
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo}")
model = AutoModelForQuestionAnswering.from_pretrained("{repo}")
inputs = tokenizer("What did the chef make?", "The chef made a fine meal.", return_tensors="pt")
with torch.no_grad():
    output = model(**inputs)
begin, end = output.start_logits.argmax(), output.end_logits.argmax()
answer = tokenizer.decode(inputs["input_ids"][0, begin : end + 1])""",
    ),
}


def describe(objective: ObjectiveDescription, weights: Mapping[str, float], *, head: str) -> ObjectiveDescription:
    """Return an objective's description with the losses of one run.

    Args:
        objective: What all runs have in common.
        weights: The weight of each loss.
        head: See [`hf_pretrain.modeling.head_kinds.head_kind`].
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
        # A loss that all methods have in common is cited for the objective.
        "citations": tuple(
            dict.fromkeys(entry for source in sources for entry in ((source,) if source else objective.citations))
        ),
    }
    if head in _HEADS:
        changes["pipeline_tag"], changes["usage"] = _HEADS[head]
    return dataclasses.replace(objective, **changes)  # type: ignore[arg-type]


def describe_origin(args: StudentArguments, *, teacher: str, layers: Sequence[int] = (), last_layer: int = 0) -> str:
    """Return how a student began, for the card; of names only those of the Hub are told.

    Args:
        args: What the student is.
        teacher: Name or folder of the teacher.
        layers: The teacher's layers that the student was cut from, if it was; counted from 0.
        last_layer: The number of the teacher's last layer.
    """
    source = _linked(teacher) or "a local teacher"
    if args.model_name_or_path is not None:
        return f"Continued from {_linked(args.model_name_or_path) or 'a local checkpoint'} and distilled from {source}"
    if layers:
        word = "layer" if len(layers) == 1 else "layers"
        return f"Cut from {source}, {word} {_enumerate([str(n) for n in layers])} of 0 to {last_layer}, and distilled from it"
    return f"Distilled from {source} into a new model"


def _linked(name: str) -> str | None:
    """Return a link to a model of the Hub; None of a local one, whose path would tell nothing."""
    return None if Path(name).exists() or hub_id(name) is None else f"[{name}](https://huggingface.co/{name})"


def _enumerate(parts: Sequence[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last
