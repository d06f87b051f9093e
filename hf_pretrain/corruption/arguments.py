"""The options of masking, as a dataclass to be mixed into training arguments."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from hf_pretrain.errors import InputError
from hf_pretrain.options import check_options, option
from hf_pretrain.schedules import Schedule

MaskingUnit = Literal["token", "word", "ngram", "span", "given"]


@dataclass
class MaskingArguments:
    """The options that all objectives with masks share: which tokens are selected, and what replaces them.

    The defaults are BERT's 15 and 80/10/10 percent, drawn anew each epoch. See the `help` of each field.
    A subclass with a `__post_init__` of its own calls `super().__post_init__()`.

    Raises:
        InputError: If an option is out of range, or two options contradict each other.

    Source:
        BERT (Devlin et al. 2019, section 3.1; whole words: its repository), RoBERTa (Liu et al. 2019, section 4.1),
        ALBERT (Lan et al. 2020, section 4.1, n-grams), SpanBERT (Joshi et al. 2020, section 3.1, spans), UniLM (Dong et al.
        2019, n-grams of tokens).
    """

    ranges: ClassVar[dict[str, str]] = {
        "max_ngram": "[1, 4096]",
        "max_span_length": "[1, 65536]",
        "span_geometric_p": "(0, 1]",
        "static_masks": "[0, 2147483647]",
    }
    needs: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("max_ngram", "ngram_shares", "ngram_unit"), "masking_unit=ngram"),
        **dict.fromkeys(("max_span_length", "span_geometric_p", "span_length_mode"), "masking_unit=span"),
    }

    mlm_probability: float | str = option(
        0.15,
        "Share of the tokens of each example that are selected as targets, 0 to 1; or a schedule, linear "
        "between its points: '0:0.3, 10000:0.15' (steps) or '0%%:0.3, 100%%:0.15' (shares of all steps). Evaluation "
        "uses the last value.",
    )
    masking_unit: MaskingUnit = option(
        "token",
        "What is selected as a whole: 'token' (BERT), 'word' (whole words), 'ngram' (runs of words, "
        "ALBERT), 'span' (runs of words cut to the budget, SpanBERT) or 'given' (the ranges in the column spans).",
    )
    masking_count: Literal["exact", "bernoulli"] = option(
        "exact",
        "'exact': each example gets its budget of targets, at least one. 'bernoulli': each token, word or "
        "given span is drawn by itself, so counts vary and may be zero.",
    )
    mask_share: float = option(0.8, "Share of the selected tokens that the mask token replaces, 0 to 1.")
    random_share: float = option(
        0.1, "Share of the selected tokens that a random token replaces, 0 to 1; the rest stay as they are."
    )
    replacement_unit: Literal["token", "word", "unit"] = option(
        "token",
        "For what mask, random or keep is decided at once: each 'token' (BERT), each 'word' (RoBERTa) or "
        "each selected 'unit' (SpanBERT, where touching spans are one).",
    )
    max_ngram: int = option(
        3, "Most words of an n-gram; n words are drawn with probability proportional to 1/n, or by ngram_shares."
    )
    ngram_shares: list[float] | None = option(
        None, "Probabilities of n-grams of 1, 2, ..., max_ngram words, instead of 1/n: '0.8 0.1 0.1' (UniLM)."
    )
    ngram_unit: Literal["word", "token"] = option(
        "word", "What n-grams are made of: 'word' (whole words, ALBERT) or 'token' (UniLM)."
    )
    max_span_length: int = option(10, "Most words of a span.")
    span_geometric_p: float = option(
        0.2, "Parameter of the geometric distribution of span lengths, above 0, at most 1."
    )
    span_length_mode: Literal["renormalise", "clip"] = option(
        "renormalise",
        "Where the geometric distribution goes beyond max_span_length: 'renormalise' (mean 3.8 words by "
        "default) or 'clip' to the longest (mean 4.5).",
    )
    static_masks: int = option(
        0, "0: fresh masks each epoch. k: k frozen maskings of each example, used in turn (epoch modulo k)."
    )
    mask_unknown: bool = option(True, "Whether the unknown token may be selected (BERT, ELECTRA) or not (DeBERTa).")

    def __post_init__(self) -> None:
        """Refuse options that are out of range or contradict each other; then the next class of a mixture does its own."""
        check_options(self)
        if self.ngram_shares is not None:
            shares = self.ngram_shares
            are_shares = all(isinstance(share, (int, float)) and 0 <= share <= 1 for share in shares)
            if len(shares) != self.max_ngram or not are_shares or abs(sum(shares) - 1) >= 1e-6:
                raise InputError(
                    f"ngram_shares={shares!r} must be {self.max_ngram} numbers from 0 that add up to 1, one for each n up to "
                    "max_ngram"
                )
        if self.static_masks and isinstance(self.mlm_probability, Schedule):
            raise InputError(
                f"static_masks={self.static_masks} freezes the masks, so mlm_probability={self.mlm_probability!r} cannot "
                "change them: give it one number, or leave static_masks out"
            )
        if self.mask_share + self.random_share > 1 + 1e-9:
            raise InputError(
                f"mask_share={self.mask_share} and random_share={self.random_share} add up to more than 1: lower one"
            )
        if self.masking_count == "bernoulli" and self.masking_unit in ("ngram", "span"):
            raise InputError(
                f"masking_count='bernoulli' has no meaning for masking_unit={self.masking_unit!r}, whose units "
                "overlap: use masking_count='exact'"
            )
        post_init = getattr(super(), "__post_init__", None)
        if post_init is not None:
            post_init()
