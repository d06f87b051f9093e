"""The options of an encoder's pre-training: which objectives, in which shares, with which weights.

`describe` says for the card what a run trains: each objective in words, in a formula, and with its source.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

from hf_pretrain.errors import InputError, check_choice
from hf_pretrain.hub.record import SHARED_METRICS, ObjectiveDescription, cite
from hf_pretrain.objectives.masking import MaskedLMTrainingArguments
from hf_pretrain.options import option
from hf_pretrain.schedules import weight_symbol

PAIR_OBJECTIVES = ("nsp", "sop", "sentence_structure")
"""The objectives on the relation of two segments; their examples are pairs."""

ONE_WAY_OBJECTIVES = ("left_to_right", "right_to_left", "sequence_to_sequence")
"""Masked language modelling where tokens do not see all others."""

VIEWS = ("mlm", *PAIR_OBJECTIVES, *ONE_WAY_OBJECTIVES, "clm")
"""Objectives with examples of their own, of which shares are sampled; the others apply to all examples, or to those that
the data has for them (translations)."""

OBJECTIVES = (*VIEWS, "tlm", "span_boundary", "word_order")

_OPTIONS_OF = {
    # Next tokens alone hide nothing. What options of n-grams and spans need says so already.
    "mlm": (
        "mlm_weight",
        "prediction",
        "mlm_probability",
        "masking_unit",
        "masking_count",
        "mask_share",
        "random_share",
        "replacement_unit",
        "static_masks",
        "mask_unknown",
    ),
    "clm": ("clm_weight",),
    "tlm": ("tlm_weight",),
    "|".join(PAIR_OBJECTIVES): ("pair_weight", "short_pair_probability", "balanced_pairs"),
    "span_boundary": ("span_boundary_weight", "span_positions"),
    "word_order": (
        "word_order_weight",
        "word_order_probability",
        "word_order_size",
        "keep_identity_order",
    ),
}


@dataclass
class EncoderTrainingArguments(MaskedLMTrainingArguments):
    """Options of [`EncoderTrainer`]: any combination of objectives that can share an encoder.

    Raises:
        InputError: If an objective is unknown, or two cannot go together, or shares are wrong.
    """

    ranges: ClassVar[dict[str, str]] = {"span_positions": "[1, 65536]", "word_order_size": "[2, 65536]"}
    needs: ClassVar[dict[str, str]] = {
        option: f"objectives~{objective}" for objective, options in _OPTIONS_OF.items() for option in options
    }

    objectives: list[str] = option(
        factory=lambda: ["mlm"],
        help="What is trained together: mlm, one of nsp (BERT), sop (ALBERT) and sentence_structure (StructBERT), "
        "span_boundary (SpanBERT), word_order (StructBERT), tlm (XLM), left_to_right, right_to_left and "
        "sequence_to_sequence (UniLM), and clm, next tokens (GPT-BERT).",
    )
    objective_shares: str | None = option(
        None,
        "How often examples of each kind are drawn, where there are several: 'nsp:1/3, left_to_right:1/6, ...'; "
        "equally often by default. 'mlm' stands for text as it is, without pairs: blocks, and translations if there "
        "are any.",
    )
    prediction: Literal["same", "shifted"] | None = option(
        None,
        "Where a masked token is predicted: at the 'same' position (BERT), or 'shifted', at the position before it, as a next "
        "token is (masked next-token prediction, GPT-BERT). By default 'shifted' with clm, else 'same'.",
    )
    mlm_weight: float | str = option(
        1.0, "Weight of the masked-language-model loss; each weight is a number, or a schedule such as '0%:1, 50%:0'."
    )
    clm_weight: float | str = option(1.0, "Weight of the loss of next tokens.")
    tlm_weight: float | str = option(1.0, "Weight of the same on translations.")
    pair_weight: float | str = option(1.0, "Weight of the loss of nsp, sop or sentence_structure.")
    span_boundary_weight: float | str = option(1.0, "Weight of the span-boundary loss.")
    word_order_weight: float | str = option(1.0, "Weight of the word-order loss.")
    span_positions: int = option(20, "Tokens of a span that are predicted from its boundaries; later ones are not.")
    word_order_probability: float = option(0.05, "Share of the tokens that lie in shuffled runs.")
    word_order_size: int = option(3, "Tokens of a shuffled run.")
    keep_identity_order: bool = option(False, "Whether a shuffle may leave a run as it was; StructBERT does not say.")
    short_pair_probability: float = option(
        0.1, "Share of the documents whose pairs are of a random shorter length (BERT)."
    )
    balanced_pairs: bool = option(
        True,
        "Keep the classes of pairs equally frequent; false: as BERT's script, where a chunk of one sentence "
        "always gets a random partner.",
    )

    def __post_init__(self) -> None:
        """Refuse what cannot be trained together."""
        twice = next((name for name in self.objectives if self.objectives.count(name) > 1), None)
        if twice is not None:
            raise InputError(
                f"objectives={' '.join(self.objectives)} names {twice} twice: name each once, and weigh it"
            )
        check_objectives(self.objectives, masking_unit=self.masking_unit)
        check_prediction(self.prediction, self.objectives)
        self.shares()
        super().__post_init__()

    @property
    def pair_objective(self) -> str | None:
        """The objective on pairs, None if there is none."""
        return next((name for name in self.objectives if name in PAIR_OBJECTIVES), None)

    @property
    def has_modes(self) -> bool:
        """Whether tokens of some examples do not see all others."""
        return any(name in ONE_WAY_OBJECTIVES for name in self.objectives)

    @property
    def has_clm(self) -> bool:
        """Whether next tokens are predicted in some examples, whose tokens see only those before them."""
        return "clm" in self.objectives

    @property
    def shifted(self) -> bool:
        """Whether a masked token is predicted from the state of the token before it."""
        return self.prediction == "shifted" or (self.prediction is None and self.has_clm)

    @property
    def heads(self) -> list[str]:
        """Names of the heads of the model; masked tokens and next tokens share one."""
        has_pairs = ["pair"] if self.pair_objective else []
        return ["mlm", *has_pairs, *(name for name in ("span_boundary", "word_order") if name in self.objectives)]

    @property
    def loss_names(self) -> list[str]:
        """Names of the losses."""
        of_tokens = [name for name in ("mlm", "clm") if name in self.objectives]
        return [*of_tokens, *self.heads[1:], *(["tlm"] if "tlm" in self.objectives else [])]

    def shares(self) -> dict[str, float]:
        """Return how often examples of each kind are drawn; the sum is 1."""
        views = [name for name in self.objectives if name in VIEWS]
        if self.objective_shares is not None:
            return parse_shares(self.objective_shares, views=views)
        # Pairs are masked too: plain text is drawn only where it is needed.
        is_plain = self.pair_objective is None or "tlm" in self.objectives
        kinds = [name for name in views if name != "mlm" or is_plain]
        return {name: 1 / len(kinds) for name in kinds}


def check_objectives(objectives: Sequence[str], *, masking_unit: str) -> None:
    """Refuse a list of objectives that cannot share an encoder.

    Raises:
        InputError: With the reason.
    """
    for name in objectives:
        check_choice(name, OBJECTIVES, name="objectives")
    if "mlm" not in objectives and list(objectives) != ["clm"]:
        raise InputError(
            f"objectives={','.join(objectives)} leaves out mlm, which all others but clm alone are trained with: add it (its "
            "weight may be 0)"
        )
    pairs = [name for name in objectives if name in PAIR_OBJECTIVES]
    if len(pairs) > 1:
        raise InputError(
            f"objectives={','.join(pairs)} ask different questions about the same pairs: choose one of them"
        )
    modes = [name for name in objectives if name in ONE_WAY_OBJECTIVES]
    if "clm" in objectives and modes:
        raise InputError(
            f"objectives: {modes[0]} tells its mode by token types, and examples of clm and mlm have the same: drop one of the "
            "two"
        )
    one_way = [*modes, *(name for name in objectives if name == "clm")]
    for name in ("span_boundary", "word_order"):
        if name in objectives and one_way:
            raise InputError(
                f"objectives: {name} reads what comes after a token, which {one_way[0]} hides: drop one of the two"
            )
    if "tlm" in objectives and modes:
        raise InputError(
            f"objectives: tlm and {modes[0]} both say by the segment what a token belongs to: drop one of the two"
        )
    if "tlm" in objectives and "clm" in objectives:
        raise InputError(
            "objectives: a step of tlm is of one kind of examples on all processes, and clm mixes kinds within a batch: drop "
            "one of the two"
        )
    if "span_boundary" in objectives and masking_unit not in ("span", "given"):
        raise InputError(
            f"objectives: span_boundary predicts masked spans, but masking_unit={masking_unit!r} makes none: set it to "
            "'span'"
        )


def check_prediction(prediction: str | None, objectives: Sequence[str]) -> None:
    """Refuse a way to predict masked tokens that does not go with the objectives.

    Raises:
        InputError: With the reason.
    """
    check_choice(prediction, (None, "same", "shifted"), name="prediction")
    if prediction is not None and "mlm" not in objectives:
        raise InputError(
            f"prediction={prediction!r} is about masked tokens, but objectives={','.join(objectives)} has none: leave it out, "
            "or add mlm"
        )
    if prediction != "shifted":
        return
    for name, reason in (
        *((name, "whose text is written from the state of the mask itself") for name in ONE_WAY_OBJECTIVES),
        ("word_order", "which predicts the token of the same position by the same head"),
    ):
        if name in objectives:
            raise InputError(f"prediction='shifted' does not go with {name}, {reason}: drop one of the two")


def parse_shares(text: str, *, views: Sequence[str]) -> dict[str, float]:
    """Read shares such as "nsp:1/3, left_to_right:0.5".

    Args:
        text: The value of the option `objective_shares`.
        views: The kinds of examples that may be named.

    Returns:
        Shares by name, which add up to 1.

    Raises:
        InputError: If it is not of that form, or names something else, or leaves one out.
    """
    shares: dict[str, float] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*:\s*(\d+(?:\.\d+)?(?:/\d+)?)\s*", part)
        if match is None:
            raise InputError(f"objective_shares={text!r}: {part.strip()!r} is not NAME:SHARE, such as 'nsp:1/3'")
        name, share = match[1], match[2]
        if name not in views or name in shares:
            raise InputError(f"objective_shares={text!r}: name each of {', '.join(views)} once, not {name!r}")
        numerator, _, denominator = share.partition("/")
        if denominator and not int(denominator):
            raise InputError(f"objective_shares={text!r}: {share} divides by 0")
        shares[name] = float(Fraction(numerator) / int(denominator or 1))
    missing = [name for name in views if name not in shares and name != "mlm"]
    if missing:
        raise InputError(f"objective_shares={text!r} gives {missing[0]} no share: add it, or drop the objective")
    total = sum(shares.values())
    if not total:
        raise InputError(f"objective_shares={text!r} draws nothing: give a share above 0")
    return {name: share / total for name, share in shares.items() if share}


# In words, the loss that it adds to the formula ("" where it is another's), and where it is from.
_OBJECTIVES: dict[str, tuple[str, str, str]] = {
    "mlm": (
        "Some tokens are selected; most are hidden behind the mask token, some are exchanged and some left as they are. "
        "The model predicts the original token at each.",
        r"-\frac{1}{|M|} \sum_{i \in M} \log p(x_i \mid \tilde{x})",
        "devlin2019bert",
    ),
    "nsp": (
        "It tells whether the second segment follows the first in its document or comes from another one.",
        r"-\log p(y \mid \tilde{x})",
        "devlin2019bert",
    ),
    "sop": (
        "It tells whether two segments that follow each other are in their order or swapped.",
        r"-\log p(y \mid \tilde{x})",
        "lan2020albert",
    ),
    "sentence_structure": (
        "It tells whether the second segment follows the first, comes before it, or is from another document.",
        r"-\log p(y \mid \tilde{x})",
        "wang2020structbert",
    ),
    "span_boundary": (
        "It predicts each token of a masked span from the two tokens around the span and the place in it.",
        r"-\frac{1}{|S|} \sum_{i \in S} \log p(x_i \mid h_{s-1}, h_{e+1}, i - s)",
        "joshi2020spanbert",
    ),
    "word_order": (
        "Some runs of three tokens are shuffled, and it predicts the original token at each of their places.",
        r"-\frac{1}{|O|} \sum_{i \in O} \log p(x_i \mid \tilde{x})",
        "wang2020structbert",
    ),
    "clm": (
        "In some examples tokens see only what is before them, nothing is hidden, and each next token is predicted; one head "
        "predicts masked and next tokens.",
        r"-\frac{1}{|C|} \sum_{i \in C} \log p(x_i \mid x_{<i})",
        "charpentier2024gptbert",
    ),
    "tlm": (
        "Tokens of a sentence and its translation are hidden in both, and predicted from both.",
        r"-\frac{1}{|M'|} \sum_{i \in M'} \log p(x_i, y_i \mid \tilde{x}, \tilde{y})",
        "conneau2019xlm",
    ),
    "left_to_right": ("In some examples tokens see only what is before them.", "", "dong2019unilm"),
    "right_to_left": ("In some examples tokens see only what is after them.", "", "dong2019unilm"),
    "sequence_to_sequence": (
        "In some examples the first segment sees itself, and each token of the second the first and what is before it.",
        "",
        "dong2019unilm",
    ),
}
# What the numbers beside those of masked tokens say, for an outsider.
METRICS = SHARED_METRICS | {
    "pair_loss": "How surprised the model is by how the two segments belong together, in nats; 0 is certainty.",
    "pair_accuracy": "Share of the pairs that are classified correctly; chance is 1 by the number of answers.",
    "span_boundary_loss": "How surprised the model is by a token of a masked span, from the two beside it, in nats.",
    "span_boundary_accuracy": "Share of the tokens of masked spans that the two neighbours give.",
    "word_order_loss": "How surprised the model is by the true token where tokens were shuffled, in nats; 0 is certainty.",
    "word_order_accuracy": "Share of the shuffled positions where the first guess is the true token.",
    "tlm_loss": "The same as the MLM loss, where a sentence and its translation are seen together.",
    "tlm_perplexity": "The perplexity of that loss.",
    "tlm_accuracy": "Share of the masked positions in pairs of translations where the first guess is the true token.",
    "clm_loss": "How surprised the model is by each next token, from the tokens before it alone, in nats; 0 is certainty.",
    "clm_perplexity": "The perplexity of that loss: as many equally likely tokens would surprise as much.",
    "clm_accuracy": "Share of the next tokens where the first guess is the true token.",
    "bidirectional_nll": "The masked-token loss of the examples in which all tokens see each other, in nats.",
    "left_to_right_nll": "The masked-token loss of the examples in which tokens see what is before them, in nats.",
    "right_to_left_nll": "The masked-token loss of the examples in which tokens see what is after them, in nats.",
    "sequence_to_sequence_nll": "The masked-token loss of the examples in which a second segment follows a first, in nats.",
}
# Which loss an objective's formula stands for, where it has not the objective's own name.
_LOSS_OF = dict.fromkeys(("nsp", "sop", "sentence_structure"), "pair")


_SHIFTED = "A masked token is predicted from the state of the token before it, as a next token is."


def describe(
    objective: ObjectiveDescription,
    objectives: Sequence[str],
    weights: Mapping[str, float],
    *,
    shifted: bool = False,
) -> ObjectiveDescription:
    """Return an objective's description with what one run trains.

    Args:
        objective: What all runs have in common.
        objectives: Names of the objectives.
        weights: The weight of each loss, a number or a schedule.
        shifted: Whether a masked token is predicted from the state of the token before it.
    """
    known = [(name, *_OBJECTIVES[name]) for name in objectives]
    terms = []
    for name, _, formula, _ in known:
        weight = weights[_LOSS_OF.get(name, name)] if formula else 0
        if weight:
            factor = "" if weight == 1 else rf"{weight_symbol(weight)} \cdot "
            terms.append(f"{factor}{formula}" if not factor else rf"{factor}\left({formula}\right)")
    losses = dict.fromkeys(_LOSS_OF.get(name, name) for name, _, formula, _ in known if formula)
    of_tokens = [f"{name}_{what}" for name in ("mlm", "clm") if name in losses for what in ("loss", "perplexity")]
    added = [_SHIFTED] if shifted and "mlm" in objectives else []
    return dataclasses.replace(
        objective,
        metrics=METRICS,
        headline=(*of_tokens, *(f"{name}_accuracy" for name in losses)),
        description=" ".join([objective.description, *(words for _, words, _, _ in known), *added]).strip(),
        formula=r"\mathcal{L} = "
        + " ".join(term if term.startswith("-") or i == 0 else f"+ {term}" for i, term in enumerate(terms)),
        citations=cite(*dict.fromkeys(source for *_, source in known)),
    )
