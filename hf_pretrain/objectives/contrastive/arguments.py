"""The options of training an encoder for one vector a text: which objective, which texts, which losses beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from hf_pretrain.errors import InputError
from hf_pretrain.objectives.masking import MaskedLMTrainingArguments
from hf_pretrain.objectives.replaced_token_detection.building import ReplacedTokenDetectionModelArguments
from hf_pretrain.options import check_options, option
from hf_pretrain.training.parsing import check_changed

Objective = Literal["contrastive", "infoword", "retromae", "tsdae"]
View = Literal["same", "neighbours", "spans", "ict", "title", "pairs"]
Beside = Literal["auto", "none", "mlm", "rtd"]

BOTTLENECKS = ("retromae", "tsdae")
"""The objectives in which a decoder rebuilds a text from its vector."""

UNIT_VIEWS = ("same", "neighbours", "single", "ngram")
"""Views whose texts are sentences or blocks, as `text_unit` says."""

# With masks in the encoder's input, whose tokens are predicted too.
_MASKED = ("infoword", "retromae")
_GENERATOR = """generator_name_or_path generator_type generator_size generator_layers embedding_sharing discriminator_head
    enhanced_mask_decoder disallow_correct"""
_MASKING = "mlm_probability masking_unit masking_count mask_share random_share replacement_unit mask_unknown"


@dataclass
class ContrastiveModelArguments(ReplacedTokenDetectionModelArguments):
    """Which encoder is trained: a checkpoint to continue, or sizes to build one from; a generator only beside rtd."""

    needs: ClassVar[dict[str, str]] = {
        **dict.fromkeys(_GENERATOR.split(), "beside=rtd"),
        "generator_name_or_path": "beside=rtd and model_name_or_path",
    }

    model_type: str = option(
        "bert", "Architecture built from scratch: bert, roberta, electra, albert, modernbert, ..."
    )


@dataclass
class ContrastiveTrainingArguments(MaskedLMTrainingArguments):
    """Options of [`ContrastiveTrainer`]: the objective, its texts, and those of masking and of every pre-training.

    Raises:
        InputError: If an option is out of range, or has no effect beside the others.

    Source:
        SimCSE (Gao et al. 2021), ICT (Lee et al. 2019), DeCLUTR (Giorgi et al. 2021), InfoWord (Kong et al. 2020), RetroMAE (Xiao
        et al. 2022), TSDAE (Wang et al. 2021).
    """

    ranges: ClassVar[dict[str, str]] = {
        "contrastive_temperature": "(0, 100]",
        "ranking_margin": "(0, 1000]",
        "hard_negative_weight": "[0, 100]",
        "cross_negatives": "[1, 1024]",
        "ict_keep_probability": "[0, 1]",
        "deletion_probability": "(0, 1)",
        "decoder_layers": "[1, 64]",
        "decoder_mask_probability": "(0, 1)",
    }
    needs: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("views", "scorer"), "objective=contrastive"),
        **dict.fromkeys(("contrastive_loss", "contrastive_weight"), "objective=contrastive|infoword"),
        "contrastive_temperature": "objective=contrastive|infoword and contrastive_loss=infonce",
        "similarity": "objective=contrastive|infoword and scorer=bi",
        "ranking_margin": "contrastive_loss=ranking",
        "hard_negative_weight": "views=pairs and contrastive_loss=infonce and scorer=bi",
        "cross_negatives": "scorer=cross",
        "pooling": "scorer=bi",
        "ict_keep_probability": "views=ict",
        "text_unit": "views=same|neighbours",
        "deletion_probability": "objective=tsdae",
        **dict.fromkeys(("decoder_layers", "bottleneck_weight"), "objective=retromae|tsdae"),
        **dict.fromkeys(("decoder_mask_probability", "enhanced_decoding"), "objective=retromae"),
        **dict.fromkeys(_MASKING.split(), "beside=mlm|rtd or objective=retromae"),
        "mlm_weight": "beside=mlm|rtd",
        "rtd_weight": "beside=rtd",
    }

    objective: Objective = option(
        "contrastive",
        "What makes the vector of a text: 'contrastive' (two views of a text are nearer to each other than to other texts), "
        "'infoword' (a text without an n-gram is near to that n-gram), 'retromae' or 'tsdae' (a weak decoder rebuilds the text "
        "from its vector).",
    )
    views: View = option(
        "same",
        "Two views of a text: 'same' (the same text twice, under other dropout), 'neighbours' (a sentence and the one before or "
        "behind), 'spans' (two spans of a document), 'ict' (a sentence and the text around it), 'title' (the first sentence of a "
        "document and a block of its body), or 'pairs' (given pairs, in train_file as CSV, TSV or JSON lines, perhaps with hard "
        "negatives).",
    )
    text_unit: Literal["sentence", "block"] | None = option(
        None,
        "What a text is: a 'sentence', or a 'block' of whole sentences; by default a block for infoword and retromae. The views "
        "spans, ict and title have texts of their own.",
    )
    scorer: Literal["bi", "cross"] = option(
        "bi", "'bi': compare the vectors of two texts. 'cross': read both texts at once, and score them by a head."
    )
    contrastive_loss: Literal["infonce", "ranking"] = option(
        "infonce",
        "'infonce': choose the right text among all of a step. 'ranking': score it higher than each of the others, by a margin.",
    )
    similarity: Literal["cosine", "dot"] | None = option(
        None, "How vectors are compared: 'cosine', or 'dot' products; by default cosine, for infoword dot."
    )
    contrastive_temperature: float | None = option(
        None, "Similarities are divided by it; by default 0.05, for infoword and a cross-encoder 1."
    )
    ranking_margin: float = option(0.2, "By how much the right text is to score higher than another.")
    hard_negative_weight: float = option(0.0, "Added to the logits of an anchor's own hard negatives.")
    cross_negatives: int = option(3, "Wrong texts that a cross-encoder reads beside each right one.")
    pooling: Literal["mean", "cls", "cls_mlp"] = option(
        "mean",
        "The vector of a text: the 'mean' of its states, the state of its first token ('cls'), or that through a layer which "
        "only training has ('cls_mlp').",
    )
    ict_keep_probability: float = option(0.1, "Share of the contexts in which the sentence stays.")
    deletion_probability: float = option(0.6, "Share of the tokens that tsdae deletes from the encoder's input.")
    decoder_layers: int = option(1, "Layers of the decoder that rebuilds a text; a weak one needs the vector more.")
    decoder_mask_probability: float = option(
        0.5, "Share of the tokens that the decoder of retromae does not see, of each text or for each of its tokens."
    )
    enhanced_decoding: bool = option(
        False, "Let retromae predict all tokens, each from a random part of the others of its own."
    )
    beside: Beside = option(
        "auto",
        "What else the encoder learns in each step: 'none', 'mlm' (masked tokens) or 'rtd' (replaced tokens); by default mlm for "
        "infoword and retromae.",
    )
    contrastive_weight: float | str = option(
        1.0, "Weight of the contrastive loss; each weight is a number, or a schedule such as '0%:1, 50%:0'."
    )
    bottleneck_weight: float | str = option(1.0, "Weight of the decoder's loss.")
    mlm_weight: float | str = option(1.0, "Weight of the loss of masked tokens.")
    rtd_weight: float | str = option(50.0, "Weight of the loss of replaced tokens.")
    similarity_file: str | None = option(
        None,
        "Pairs of texts with a score, as CSV, TSV or JSON lines; each evaluation adds the rank correlation of the cosines.",
    )

    def __post_init__(self) -> None:
        """Fill in what depends on the objective, and refuse options that have no effect beside the others."""
        check_options(self)
        if self.beside == "auto":
            self.beside = "mlm" if self.objective in _MASKED else "none"
        check_changed(self)
        # What stays without effect stays open: a recipe of this run must not name it.
        if self.text_unit is None and self.view in UNIT_VIEWS:
            self.text_unit = "block" if self.objective in _MASKED else "sentence"
        if self.is_contrastive and not self.is_cross and self.similarity is None:
            self.similarity = "dot" if self.objective == "infoword" else "cosine"
        if self.is_contrastive and self.contrastive_loss == "infonce" and self.contrastive_temperature is None:
            self.contrastive_temperature = 1.0 if self.objective == "infoword" or self.is_cross else 0.05
        if self.is_cross and self.views == "same":
            raise InputError(
                "scorer='cross' with views='same' compares a text with itself: choose other views, such as 'ict'"
            )
        if self.is_cross and self.beside == "rtd":
            raise InputError("beside='rtd' with scorer='cross' is not supported: use beside='mlm', or scorer='bi'")
        super().__post_init__()

    @property
    def is_contrastive(self) -> bool:
        """Whether texts are compared with each other; otherwise a decoder rebuilds each from its vector."""
        return self.objective not in BOTTLENECKS

    @property
    def is_cross(self) -> bool:
        """Whether a head reads two texts at once."""
        return self.objective == "contrastive" and self.scorer == "cross"

    @property
    def view(self) -> str:
        """The views of the examples; see `TextViewDataset`."""
        return {"contrastive": self.views, "infoword": "ngram"}.get(self.objective, "single")

    @property
    def decoder(self) -> str | None:
        """The kind of the decoder; None if there is none."""
        if self.objective == "tsdae":
            return "causal"
        return ("enhanced" if self.enhanced_decoding else "masked") if self.objective == "retromae" else None
