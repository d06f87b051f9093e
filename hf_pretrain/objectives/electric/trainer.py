"""Build the pair of models that a program trains.

Options and Trainer of Electric.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    ElectraForPreTraining,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from hf_pretrain.corruption.masking import Vocabulary
from hf_pretrain.data.arguments import DataArguments
from hf_pretrain.data.prepare import PreparedData
from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.metrics import discrimination_gain
from hf_pretrain.hub.record import ObjectiveDescription
from hf_pretrain.modeling.base import check_model_fits
from hf_pretrain.modeling.configuration import (
    ModelArguments,
    attention_options,
    build_config,
    dtype_option,
    from_pretrained,
    scaled_config,
)
from hf_pretrain.modeling.embeddings import shared_embedding_names
from hf_pretrain.modeling.loading import say_once
from hf_pretrain.modeling.visibility.isolation import check_isolation
from hf_pretrain.objectives.electric.collator import DataCollatorForElectric
from hf_pretrain.objectives.electric.modeling import EMBEDDING_SHARING, ElectricForPreTraining
from hf_pretrain.objectives.electric.two_tower import TwoTowerClozeConfig, TwoTowerClozeModel, build_two_tower
from hf_pretrain.objectives.masking import MaskedLMTrainingArguments
from hf_pretrain.objectives.replaced_token_detection.modeling import build_discriminator
from hf_pretrain.training.method import Learning, Method
from hf_pretrain.training.trainer import PretrainingTrainer

_GENERATOR = "pretraining/generator"


@dataclass
class ElectricModelArguments(ModelArguments):
    """The discriminator, given as in [`ModelArguments`], and its generator. The defaults are ELECTRA-Small's."""

    ranges: ClassVar[dict[str, str]] = {"generator_size": "(0, 16]", "generator_layers": "(0, 16]"}
    needs: ClassVar[dict[str, str]] = dict.fromkeys(("generator_size", "generator_layers"), "!generator_name_or_path")

    model_type: str = field(
        default="electra", metadata={"help": "Architecture of both models when built from scratch."}
    )
    embedding_size: int | None = field(
        default=None,
        metadata={
            "help": "Width of the embedding tables, where the architecture has one of its own (128 for electra)."
        },
    )
    generator_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint of a two-tower generator; by default what model_name_or_path has in "
            "pretraining/generator, and if it has none, fresh weights."
        },
    )
    generator_size: float = field(
        default=0.25,
        metadata={"help": "Width of each tower as a share of the discriminator's (heads and layers too)."},
    )
    generator_layers: float = field(
        default=1.0, metadata={"help": "Layers of each tower as a share of the discriminator's."}
    )
    embedding_sharing: str = field(
        default="tied",
        metadata={"help": "'tied': one set of embeddings for all; 'none': the discriminator has its own."},
    )

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.embedding_sharing not in EMBEDDING_SHARING:
            raise InputError(
                f"embedding_sharing={self.embedding_sharing!r} must be one of {', '.join(EMBEDDING_SHARING)}"
            )
        super().__post_init__()


def build_model(args: ElectricModelArguments, tokenizer: PreTrainedTokenizerBase) -> ElectricForPreTraining:
    """Build or load generator and discriminator and join them.

    Args:
        args: What to build.
        tokenizer: Its vocabulary sizes the tables; its special tokens have no probability.

    Returns:
        The composite to train.
    """
    discriminator = _build_discriminator(args, tokenizer)
    generator = _load_generator(args)
    if generator is None:
        generator = build_two_tower(
            tower_config(discriminator.config, args),
            excluded_token_ids=excluded_token_ids(tokenizer, vocab_size=discriminator.config.vocab_size),
            **attention_options(args),
        )
        if args.model_name_or_path is not None and args.embedding_sharing == "tied":
            # Of two tied models the generator keeps its parameters, and the discriminator is the one that has learned.
            _copy_embeddings(discriminator, generator.left_tower)
    options = dtype_option(args)
    return ElectricForPreTraining.from_models(
        generator, discriminator, embedding_sharing=args.embedding_sharing, **options
    )


def excluded_token_ids(tokenizer: PreTrainedTokenizerBase, *, vocab_size: int) -> list[int]:
    """Return the ids that noise never takes: special tokens, the unknown one, and those that the tokenizer does not have."""
    ordinary = set(Vocabulary.from_tokenizer(tokenizer).ordinary_ids.tolist())
    return [token for token in range(vocab_size) if token not in ordinary]


def tower_config(config: PreTrainedConfig, args: ElectricModelArguments) -> PreTrainedConfig:
    """Return the discriminator's configuration, scaled to a tower: width, heads and feed-forward alike, and depth."""
    scaled = scaled_config(config, width=args.generator_size, depth=args.generator_layers)
    if scaled.hidden_size % scaled.num_attention_heads:
        raise InputError(
            f"generator_size={args.generator_size} makes {scaled.hidden_size} wide states with "
            f"{scaled.num_attention_heads} heads, which do not divide: choose a share that gives whole heads"
        )
    return scaled


def _build_discriminator(args: ElectricModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    options, name = attention_options(args), args.model_name_or_path
    if name is None:
        width = {"embedding_size": 128} if args.model_type == "electra" and args.embedding_size is None else {}
        return build_discriminator(
            build_config(args, tokenizer, auto_class=AutoModelForTokenClassification, **width), **options
        )
    if from_pretrained(AutoConfig, name).model_type == "electra":
        return from_pretrained(ElectraForPreTraining, name, **options)
    return from_pretrained(AutoModelForTokenClassification, name, num_labels=1, **options)


def _load_generator(args: ElectricModelArguments) -> TwoTowerClozeModel | None:
    """Return the checkpoint's generator, or None where a fresh one is to be built."""
    options, name = attention_options(args), args.generator_name_or_path
    if name is not None:
        if not isinstance(from_pretrained(AutoConfig, name), TwoTowerClozeConfig):
            raise InputError(
                f"generator_name_or_path={name!r} is no two-tower generator: leave it out for a fresh one"
            )
        return from_pretrained(TwoTowerClozeModel, name, **options)
    name = args.model_name_or_path
    if name is None:
        return None
    options["subfolder"] = _GENERATOR
    has_generator = cached_file(name, f"{_GENERATOR}/config.json", _raise_exceptions_for_missing_entries=False)
    if has_generator and isinstance(from_pretrained(AutoConfig, name, subfolder=_GENERATOR), TwoTowerClozeConfig):
        return from_pretrained(TwoTowerClozeModel, name, **options)
    say_once(f"{name} has no two-tower generator in {_GENERATOR}: it starts from fresh weights")
    return None


@torch.no_grad()
def _copy_embeddings(source: PreTrainedModel, target: PreTrainedModel) -> None:
    for ours, theirs in shared_embedding_names(target, source).items():
        target.get_parameter(ours).copy_(source.get_parameter(theirs))


@dataclass
class ElectricTrainingArguments(MaskedLMTrainingArguments):
    """Options of [`ElectricTrainer`]; the defaults are ELECTRA-Small's, whose code Electric is trained by too.

    Source: `configure_pretraining.py` of the official code, with `electric_objective`.
    """

    cloze_weight: float | str = field(default=1.0, metadata={"help": "Weight of the generator's loss."})
    nce_weight: float | str = field(default=50.0, metadata={"help": "Weight of the discriminator's loss (lambda)."})
    mlm_probability: float | str = field(
        default=0.15, metadata={"help": "Share of the tokens of each example that noise replaces, 0 to 1."}
    )
    mask_share: float = field(default=0.0, metadata={"help": "Keep at 0: the generator reads the text itself."})
    random_share: float = field(default=0.0, metadata={"help": "Keep at 0: the generator reads the text itself."})
    mask_unknown: bool = field(
        default=False, metadata={"help": "Keep off: the unknown token is never sampled and has no energy."}
    )
    adam_bias_correction: bool = field(
        default=False, metadata={"help": "Adam's bias correction; the official optimizer has none."}
    )
    adam_epsilon: float = field(default=1e-6, metadata={"help": "Adam's epsilon."})
    decay_during_warmup: bool = field(
        default=True, metadata={"help": "Multiply the linear decay and the warm-up, as the official code does."}
    )


class ElectricTrainer(PretrainingTrainer):
    """Trains an [`ElectricForPreTraining`]: generator and discriminator jointly, in one step."""

    objective = ObjectiveDescription(
        name="electric",
        title="Energy-based cloze modelling",
        description=(
            "A generator of two towers, one reading from each side, gives every token a probability q from all the others; "
            "some tokens are replaced by samples of it. This model gives each token an energy, and learns to tell the text "
            "from the noise by noise-contrastive estimation: as the noise's probability is known, the energy becomes an "
            "estimate of the token's negative log-probability given the rest of the text."
        ),
        formula=(
            r"\mathcal{L} = -\frac{1}{n} \sum_{t=1}^{n} \log q(x_t \mid x_{\setminus t})"
            r" + \lambda \, \frac{1}{n} \sum_{t=1}^{n} \mathrm{BCE}\left(E(\hat{x})_t"
            r" + \log q(\hat{x}_t \mid x_{\setminus t}) + \log \frac{k}{1 - k}, [t \in M]\right)"
        ),
        citations=(
            """\
@inproceedings{clark2020electric,
  title = {Pre-Training Transformers as Energy-Based Cloze Models},
  author = {Clark, Kevin and Luong, Minh-Thang and Le, Quoc V. and Manning, Christopher D.},
  booktitle = {Proceedings of {EMNLP}},
  year = {2020}
}""",
        ),
        usage="""\
import torch
from transformers import AutoTokenizer, {model_class}

tokenizer = AutoTokenizer.from_pretrained("{repo}")
model = {model_class}.from_pretrained("{repo}")
inputs = tokenizer("The chef ate the meal.", return_tensors="pt")
is_special = torch.isin(inputs["input_ids"][0], torch.tensor(tokenizer.all_special_ids))
with torch.no_grad():
    energies = model(**inputs).logits.flatten()  # [length]: estimates of -log p of each token given all the others
score = -energies[~is_special].sum()  # pseudo-log-likelihood in nats, in one pass: the higher, the likelier the text""",
    )

    def training_metrics(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return the share of the labels' entropy that is explained: near 0 at best where the noise is as likely as the text."""
        return discrimination_gain(means["nce_loss"], means["fake_rate"]) if "nce_loss" in means else {}

    def evaluation_metrics(
        self, scores: np.ndarray, labels: np.ndarray, means: Mapping[str, float]
    ) -> dict[str, float]:
        """Return the same of the held-out text; who tells noise from text at sight is no better a model of the text."""
        return self.training_metrics(means)


def build_trainer(
    data: PreparedData, model_args: ElectricModelArguments, args: ElectricTrainingArguments
) -> ElectricTrainer:
    """Put the pair of models, the collator and the Trainer together."""
    model = build_model(model_args, data.tokenizer)
    for part in (model.generator, model.discriminator):
        check_model_fits(part, data.tokenizer, block_size=data.block_size)
    if data.isolates_documents:
        model.generator.check_isolation(length=data.block_size)
        check_isolation(model.discriminator, length=data.block_size)
    return ElectricTrainer(
        model,
        args,
        data_collator=DataCollatorForElectric(data.tokenizer, masking=args.masking, seed=args.seed),
        **data.trainer_inputs(),
    )


METHOD = Method(
    trainer=ElectricTrainer,
    description="""\
Pre-train an Electric: an encoder that gives every token an energy, an estimate of -log p given the rest of the text.

    hf-pretrain electric --train_file corpus.txt --output_dir my-electric
    accelerate launch trainers/electric.py --config trainers/recipes/electric_small.yaml --train_file corpus.txt \
        --output_dir my-electric

Without a file or a dataset it trains on the docstrings of the installed Python packages. The result opens with
`AutoModel.from_pretrained("my-electric")`; `hf_pretrain.objectives.electric.score_texts` scores texts with it. The generator
is in its folder `pretraining/generator`.""",
    arguments=(DataArguments, ElectricModelArguments, ElectricTrainingArguments),
    build_trainer=build_trainer,
    learning=Learning(left={"cloze_loss": 0.44}),
)
