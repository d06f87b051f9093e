"""Electric: its options, the pair of models that they describe, its batches and its Trainer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_pretrain.corruption.masking import MaskedRows, Vocabulary
from hf_pretrain.corruption.rows import ExampleRows
from hf_pretrain.data.arguments import DataArguments
from hf_pretrain.data.prepare import PreparedData
from hf_pretrain.errors import InputError
from hf_pretrain.evaluation.metrics import discrimination_gain
from hf_pretrain.evaluation.samples import held_out_sentences
from hf_pretrain.hub.record import SHARED_METRICS, ObjectiveDescription, cite
from hf_pretrain.modeling.base import GENERATOR_FOLDER
from hf_pretrain.modeling.configuration import (
    attention_options,
    build_config,
    check_without_vectors,
    dtype_option,
    fill_word_table,
)
from hf_pretrain.modeling.embeddings import shared_embedding_names
from hf_pretrain.modeling.loading import find_file, from_pretrained, say_once
from hf_pretrain.objectives.electric.modeling import EMBEDDING_SHARING, ElectricForPreTraining, score_texts
from hf_pretrain.objectives.electric.two_tower import TwoTowerClozeConfig, TwoTowerClozeModel, build_two_tower
from hf_pretrain.objectives.generators import (
    GeneratorArguments,
    GeneratorTrainingArguments,
    build_discriminator,
    copy_parameters,
    generator_config,
    load_discriminator,
    stock_discriminator,
    stock_width,
)
from hf_pretrain.objectives.masking import DataCollatorForMaskedLM
from hf_pretrain.options import option
from hf_pretrain.training.method import Learning, Method
from hf_pretrain.training.trainer import PretrainingTrainer


@dataclass
class ElectricModelArguments(GeneratorArguments):
    """The discriminator and its generator of two towers, each of which is sized as [`GeneratorArguments`] says."""

    choices: ClassVar[dict[str, tuple[str, ...]]] = {"embedding_sharing": EMBEDDING_SHARING}

    embedding_sharing: str = option(
        "tied", "'tied': one set of embeddings for all; 'none': the discriminator has its own."
    )


def build_model(
    args: ElectricModelArguments, tokenizer: PreTrainedTokenizerBase, *, stock: PreTrainedModel | None = None
) -> ElectricForPreTraining:
    """Build or load generator and discriminator and join them.

    Args:
        args: What to build.
        tokenizer: Its vocabulary sizes the tables; its special tokens have no probability.
        stock: The discriminator, with or without its head.

    Returns:
        The composite to train.
    """
    if stock is not None:
        check_without_vectors(args)
    discriminator = _discriminator(args, tokenizer) if stock is None else stock_discriminator(stock)
    generator = _load_generator(args)
    if generator is None:
        generator = build_two_tower(
            generator_config(discriminator.config, args),
            excluded_token_ids=excluded_token_ids(tokenizer, vocab_size=discriminator.config.vocab_size),
            **attention_options(args),
        )
        if (stock or args.model_name_or_path) is not None and args.embedding_sharing == "tied":
            # Of two tied models the generator keeps its parameters, and the discriminator is the one that has learned.
            tower = generator.left_tower
            copy_parameters(discriminator, tower, shared_embedding_names(tower, discriminator))
    if (stock or args.model_name_or_path) is None:
        for part in (discriminator, generator.left_tower):
            fill_word_table(part, args, tokenizer)
    options = dtype_option(args)
    return ElectricForPreTraining.from_models(
        generator, discriminator, embedding_sharing=args.embedding_sharing, **options
    )


def excluded_token_ids(tokenizer: PreTrainedTokenizerBase, *, vocab_size: int) -> list[int]:
    """Return the ids that noise never takes: special tokens, the unknown one, and those that the tokenizer does not have."""
    ordinary = set(Vocabulary.from_tokenizer(tokenizer).ordinary_ids.tolist())
    return [token for token in range(vocab_size) if token not in ordinary]


def _discriminator(args: ElectricModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    options, name = attention_options(args), args.model_name_or_path
    if name is not None:
        return load_discriminator(name, **options)
    width = stock_width(args, args.model_type)
    config = build_config(args, tokenizer, auto_class=AutoModelForTokenClassification, **width)
    return build_discriminator(config, **options)


def _load_generator(args: ElectricModelArguments) -> TwoTowerClozeModel | None:
    """Return the checkpoint's generator, or None where a fresh one is to be built."""
    where: dict[str, Any] = {}
    name = args.generator_name_or_path
    if name is None:
        name, where = args.model_name_or_path, {"subfolder": GENERATOR_FOLDER}
    if name is None:
        return None
    has_config = not where or find_file(name, "config.json", **where) is not None
    if has_config and isinstance(from_pretrained(AutoConfig, name, **where), TwoTowerClozeConfig):
        return from_pretrained(TwoTowerClozeModel, name, **where, **attention_options(args))
    if not where:
        raise InputError(f"generator_name_or_path={name!r} is no two-tower generator: leave it out for a fresh one")
    say_once(f"{name} has no two-tower generator in {GENERATOR_FOLDER}: it starts from fresh weights")
    return None


@dataclass
class ElectricTrainingArguments(GeneratorTrainingArguments):
    """Options of [`ElectricTrainer`]; the defaults are ELECTRA-Small's, whose code Electric is trained by too.

    Source: `configure_pretraining.py` of the official code, with `electric_objective`.
    """

    cloze_weight: float | str = option(1.0, "Weight of the generator's loss.")
    nce_weight: float | str = option(50.0, "Weight of the discriminator's loss (lambda).")
    mlm_probability: float | str = option(0.15, "Share of the tokens of each example that noise replaces, 0 to 1.")
    mask_share: float = option(0.0, "Keep at 0: the generator reads the text itself.")
    random_share: float = option(0.0, "Keep at 0: the generator reads the text itself.")
    mask_unknown: bool = option(False, "Keep off: the unknown token is never sampled and has no energy.")


class DataCollatorForElectric(DataCollatorForMaskedLM):
    """Batches in which nothing is hidden: the text, and which of its tokens the noise replaces.

    Beside what [`DataCollatorForMaskedLM`] gives (`input_ids` is the original text here, `labels` tells the selected positions)
    the batch has

    - `candidate_positions`: ``[C]`` int64, the flat indices of all tokens that could have been selected, ascending: the real
      tokens but the special ones and the unknown one;
    - `sample_uniforms`: ``[T]`` keyed uniforms that decide the generator's samples at `target_positions`. The sample is then a
      function of the seed, the epoch, the example and the generator's weights, on any device;
    - `num_candidates`: ``[]``, after `fix_shapes` only, which fills the candidates up with a position that is none.

    Raises:
        InputError: If the options hide tokens, or select the unknown token.
    """

    def __init__(self, tokenizer: Any, **options: Any) -> None:
        super().__init__(tokenizer, **options)
        self.candidate_slots: int | None = None
        for name in ("mask_share", "random_share"):
            if getattr(self.masking, name):
                raise InputError(
                    f"{name}={getattr(self.masking, name)}: Electric's generator reads the text itself: set it to 0"
                )
        if self.masking.mask_unknown:
            raise InputError("mask_unknown=True: the unknown token is never sampled, so set it to False")

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate examples; see [`DataCollatorForMaskedLM`]."""
        batch = super().__call__(examples)
        batch["sample_uniforms"] = self.target_uniforms(examples, batch, stream="generator")
        return batch

    def assemble(self, rows: ExampleRows, masked: MaskedRows) -> dict[str, torch.Tensor]:
        """Add the candidates to the batch."""
        batch = super().assemble(rows, masked)
        candidates = np.nonzero(rows.valid & ~self.vocabulary.is_protected(rows.input_ids))
        positions = self.layout(rows, masked).flat(*candidates)
        if self.candidate_slots is not None:
            batch["num_candidates"] = torch.tensor(len(positions))
            # The first position that is no candidate: what is there counts for nothing.
            free = np.setdiff1d(np.arange(batch["input_ids"].numel()), positions)[:1]
            missing = -len(positions) % self.candidate_slots if len(free) else 0
            positions = np.append(positions, np.repeat(free, missing))
        batch["candidate_positions"] = torch.from_numpy(positions)
        return batch

    def fix_shapes(self, *, num_rows: int, length: int) -> None:
        """Round up so that all batches of a training have one shape; see [`DataCollatorForMaskedLM.fix_shapes`]."""
        super().fix_shapes(num_rows=num_rows, length=length)
        self.candidate_slots = num_rows * length


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
        citations=cite("clark2020electric"),
        metrics=SHARED_METRICS
        | {
            "cloze_loss": "How surprised the generator is by a token, given all the others, in nats; 0 is certainty.",
            "nce_loss": "How surprised the model is to learn whether a token is noise, in nats; 0 is certainty.",
            "energy": "The model's estimate of how surprising a token of the text is, given all the others, in nats.",
        },
        headline=("disc_gain", "nce_loss", "cloze_loss", "energy"),
        usage="""\
import torch
from transformers import AutoTokenizer, {model_class}

tokenizer = AutoTokenizer.from_pretrained("{repo}")
model = {model_class}.from_pretrained("{repo}")
inputs = tokenizer({sentence}, return_tensors="pt")
is_special = torch.isin(inputs["input_ids"][0], torch.tensor(tokenizer.all_special_ids))
with torch.no_grad():
    energies = model(**inputs).logits.flatten()  # [length]: estimates of -log p of each token given all the others
score = -energies[~is_special].sum()  # pseudo-log-likelihood in nats, in one pass: the higher, the likelier the text""",
    )

    option_classes = (ElectricModelArguments, ElectricTrainingArguments)

    def build_model(
        self, options: ElectricModelArguments, *, args: Any, data: PreparedData, stock: PreTrainedModel | None = None
    ) -> ElectricForPreTraining:
        """Return the discriminator with its generator of two towers."""
        return build_model(options, data.tokenizer, stock=stock)

    def make_collator(self, args: Any, tokenizer: Any) -> DataCollatorForElectric:
        """Return the collator of noise."""
        return DataCollatorForElectric(tokenizer, masking=args.masking, seed=args.seed)

    def training_metrics(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return the share of the labels' entropy that is explained: near 0 at best where the noise is as likely as the text."""
        return discrimination_gain(means["nce_loss"], means["fake_rate"]) if "nce_loss" in means else {}

    def evaluation_metrics(
        self, scores: np.ndarray, labels: np.ndarray, means: Mapping[str, float]
    ) -> dict[str, float]:
        """Return the same of the held-out text. Accuracy would say little: noise that is easy to find makes no better model."""
        return self.training_metrics(means)


def print_likelier(trainer: ElectricTrainer, data: PreparedData) -> None:
    """Print held-out sentences, the same with two words exchanged, and the log-likelihood of both."""
    pairs = [
        (text, exchanged)
        for text in islice(held_out_sentences(data, seed=trainer.args.seed), 3)
        if (exchanged := _with_words_exchanged(text)) != text
    ]
    if not pairs:
        return
    print("\nHeld-out sentences, and with two words exchanged; the higher the log-likelihood, the likelier:")
    scores = score_texts(trainer.model.discriminator.eval(), data.tokenizer, [text for pair in pairs for text in pair])
    for number, pair in enumerate(pairs):
        for text, score in zip(pair, scores[2 * number :], strict=False):
            print(f"  {score:8.1f}  {text}")


def _with_words_exchanged(text: str) -> str:
    """Return a text with its longest word and the longest of the others exchanged; in scripts without spaces, two characters."""
    words = text.split() if " " in text else list(text)
    numbers = sorted(range(len(words)), key=lambda number: (-len(words[number]), number))
    first, second = numbers[0], next((n for n in numbers[1:] if words[n] != words[numbers[0]]), numbers[0])
    words[first], words[second] = words[second], words[first]
    return (" " if " " in text else "").join(words)


METHOD = Method(
    trainer=ElectricTrainer,
    description="""\
Pre-train an Electric: an encoder that gives every token an energy, an estimate of -log p given the rest of the text.

    hf-pretrain electric --train_file corpus.txt --output_dir my-electric
    accelerate launch trainers/electric.py --config trainers/recipes/electric_small.yaml --train_file corpus.txt \
        --output_dir my-electric

With `--demo_corpus true` it trains on the docstrings of the installed Python packages. The result opens with
`AutoModel.from_pretrained("my-electric")`; `hf_pretrain.score_texts` scores texts with it. The generator
is in its folder `pretraining/generator`.""",
    arguments=(DataArguments, ElectricModelArguments, ElectricTrainingArguments),
    learning=Learning(left={"cloze_loss": 0.44}),
    demonstrate=print_likelier,
)
