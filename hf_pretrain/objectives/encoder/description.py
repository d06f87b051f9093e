"""What a reader should know of an encoder's objectives: in words, in a formula, and where they are from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from hf_pretrain.hub.facts import ObjectiveDescription
from hf_pretrain.objectives.masked_lm import MaskedLMTrainer

(BERT,) = MaskedLMTrainer.objective.citations
ALBERT = """\
@inproceedings{lan2020albert,
  title = {{ALBERT}: A Lite {BERT} for Self-supervised Learning of Language Representations},
  author = {Lan, Zhenzhong and Chen, Mingda and Goodman, Sebastian and Gimpel, Kevin and Sharma, Piyush and Soricut, Radu},
  booktitle = {International Conference on Learning Representations},
  year = {2020}
}"""
SPANBERT = """\
@article{joshi2020spanbert,
  title = {{SpanBERT}: Improving Pre-training by Representing and Predicting Spans},
  author = {Joshi, Mandar and Chen, Danqi and Liu, Yinhan and Weld, Daniel S. and Zettlemoyer, Luke and Levy, Omer},
  journal = {Transactions of the Association for Computational Linguistics},
  year = {2020}
}"""
STRUCTBERT = """\
@inproceedings{wang2020structbert,
  title = {{StructBERT}: Incorporating Language Structures into Pre-training for Deep Language Understanding},
  author = {Wang, Wei and Bi, Bin and Yan, Ming and Wu, Chen and Xia, Jiangnan and Bao, Zuyi and Peng, Liwei and Si, Luo},
  booktitle = {International Conference on Learning Representations},
  year = {2020}
}"""
UNILM = """\
@inproceedings{dong2019unilm,
  title = {Unified Language Model Pre-training for Natural Language Understanding and Generation},
  author = {Dong, Li and Yang, Nan and Wang, Wenhui and Wei, Furu and Liu, Xiaodong and Wang, Yu and Gao, Jianfeng and
            Zhou, Ming and Hon, Hsiao-Wuen},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2019}
}"""
XLM = """\
@inproceedings{conneau2019xlm,
  title = {Cross-lingual Language Model Pretraining},
  author = {Conneau, Alexis and Lample, Guillaume},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2019}
}"""

# In words, the loss that it adds to the formula ("" where it is another's), and where it is from.
_OBJECTIVES: dict[str, tuple[str, str, str]] = {
    "mlm": (
        "Some tokens are selected; most are hidden behind the mask token, some are exchanged and some left as they are. "
        "The model predicts the original token at each.",
        r"-\frac{1}{|M|} \sum_{i \in M} \log p(x_i \mid \tilde{x})",
        BERT,
    ),
    "nsp": (
        "It tells whether the second segment follows the first in its document or comes from another one.",
        r"-\log p(y \mid \tilde{x})",
        BERT,
    ),
    "sop": (
        "It tells whether two segments that follow each other are in their order or swapped.",
        r"-\log p(y \mid \tilde{x})",
        ALBERT,
    ),
    "sentence_structure": (
        "It tells whether the second segment follows the first, comes before it, or is from another document.",
        r"-\log p(y \mid \tilde{x})",
        STRUCTBERT,
    ),
    "span_boundary": (
        "It predicts each token of a masked span from the two tokens around the span and the place in it.",
        r"-\frac{1}{|S|} \sum_{i \in S} \log p(x_i \mid h_{s-1}, h_{e+1}, i - s)",
        SPANBERT,
    ),
    "word_order": (
        "Some runs of three tokens are shuffled, and it predicts the original token at each of their places.",
        r"-\frac{1}{|O|} \sum_{i \in O} \log p(x_i \mid \tilde{x})",
        STRUCTBERT,
    ),
    "tlm": (
        "Tokens of a sentence and its translation are hidden in both, and predicted from both.",
        r"-\frac{1}{|M'|} \sum_{i \in M'} \log p(x_i, y_i \mid \tilde{x}, \tilde{y})",
        XLM,
    ),
    "left_to_right": ("In some examples tokens see only what is before them.", "", UNILM),
    "right_to_left": ("In some examples tokens see only what is after them.", "", UNILM),
    "sequence_to_sequence": (
        "In some examples the first segment sees itself, and each token of the second the first and what is before it.",
        "",
        UNILM,
    ),
}
# Which loss an objective's formula stands for, where it has not the objective's own name.
_LOSS_OF = dict.fromkeys(("nsp", "sop", "sentence_structure"), "pair")


def describe(
    objective: ObjectiveDescription, objectives: Sequence[str], weights: Mapping[str, float]
) -> ObjectiveDescription:
    """Return an objective's description with what one run trains.

    Args:
        objective: What all runs have in common.
        objectives: Names of the objectives.
        weights: The weight of each loss.
    """
    known = [(name, *_OBJECTIVES[name]) for name in objectives]
    terms = []
    for name, _, formula, _ in known:
        weight = weights[_LOSS_OF.get(name, name)] if formula else 0
        if weight:
            factor = "" if weight == 1 else rf"{weight:g} \cdot "
            terms.append(f"{factor}{formula}" if not factor else rf"{factor}\left({formula}\right)")
    return dataclasses.replace(
        objective,
        description=" ".join([objective.description, *(words for _, words, _, _ in known)]),
        formula=r"\mathcal{L} = "
        + " ".join(term if term.startswith("-") or i == 0 else f"+ {term}" for i, term in enumerate(terms)),
        citations=tuple(dict.fromkeys(source for *_, source in known)),
    )
