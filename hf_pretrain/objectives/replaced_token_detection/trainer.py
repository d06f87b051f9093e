"""Replaced token detection: its batches, its options, its Trainer, and a demonstration on sentences with one wrong word."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_pretrain.data.arguments import DataArguments
from hf_pretrain.data.documents.words import letter_words
from hf_pretrain.data.prepare import PreparedData
from hf_pretrain.errors import InputError, check_choice
from hf_pretrain.evaluation.detector import ReplacedTokenScorer
from hf_pretrain.evaluation.metrics import collapse_warning, detection_metrics, discrimination_gain
from hf_pretrain.evaluation.samples import held_out_sentences
from hf_pretrain.hub.record import SHARED_METRICS, ObjectiveDescription, cite
from hf_pretrain.modeling.embeddings import shared_body_names
from hf_pretrain.modeling.losses import PretrainingOutput
from hf_pretrain.objectives.generators import GeneratorTrainingArguments
from hf_pretrain.objectives.masking import DataCollatorForMaskedLM
from hf_pretrain.objectives.replaced_token_detection.building import ReplacedTokenDetectionModelArguments, build_model
from hf_pretrain.objectives.replaced_token_detection.modeling import (
    ReplacedTokenDetectionForPreTraining,
    Stage,
)
from hf_pretrain.options import option
from hf_pretrain.training.method import Learning, Method
from hf_pretrain.training.program import coloured_words
from hf_pretrain.training.trainer import PretrainingTrainer

logger = logging.get_logger(__name__)


class DataCollatorForReplacedTokenDetection(DataCollatorForMaskedLM):
    """A masked-LM batch with one more thing: `sample_uniforms`, ``[T]`` keyed uniforms that decide the generator's samples.

    The sample is then a function of the seed, the epoch, the example and the generator's weights, on any device.
    """

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate examples; see [`DataCollatorForMaskedLM`]."""
        batch = super().__call__(examples)
        batch["sample_uniforms"] = self.target_uniforms(examples, batch, stream="generator")
        return batch


TRAINING_MODES = ("joint", "decoupled", "two_stage")


# No class of transformers has such a head: the root is the encoder alone.
_USAGE_OF_ANOTHER_HEAD = """\
from hf_pretrain.evaluation.detector import ReplacedTokenScorer  # opens the encoder with its head

scorer = ReplacedTokenScorer.from_pretrained("{repo}")
words = scorer({sentence})  # of each word: word, start, end, and score, the probability that it is a replacement"""


@dataclass
class ReplacedTokenDetectionTrainingArguments(GeneratorTrainingArguments):
    """Options of [`ReplacedTokenDetectionTrainer`]; the defaults are the recipe of ELECTRA-Small, but for its length.

    Source: the paper's table 6 and `configure_pretraining.py` of the official code.
    """

    ranges: ClassVar[dict[str, str]] = {"generator_steps": "(0, 2147483647]"}
    needs: ClassVar[dict[str, str]] = {"generator_steps": "training_mode=two_stage"}

    mlm_weight: float | str = option(1.0, "Weight of the generator's loss.")
    rtd_weight: float | str = option(
        50.0,
        "Weight of the discriminator's loss (lambda); a number, or a schedule such as '0:10, 10000:50' or "
        "'0%:10, 50%:50'.",
    )
    temperature: float | str = option(
        1.0, "Temperature at which the generator is sampled; a number, or a schedule in the same form."
    )
    training_mode: str = option(
        "joint",
        "'joint': one step for both models; 'decoupled': in each step first the generator's, then the "
        "discriminator's (DeBERTa-v3); 'two_stage': the generator alone, then the discriminator, started from it.",
    )
    generator_steps: float = option(0.5, "Steps of the first of two stages, or their share of all steps if below 1.")
    generator_learning_rate: float | None = option(
        None, "Peak learning rate of the generator, if it has one of its own."
    )
    mask_share: float = option(0.85, "Share of the selected tokens that the generator sees masked, 0 to 1.")
    random_share: float = option(
        0.0, "Share of the selected tokens that the generator sees replaced at random, 0 to 1."
    )

    def __post_init__(self) -> None:
        """Check the training mode, then everything else."""
        check_choice(self.training_mode, TRAINING_MODES, name="training_mode")
        if self.training_mode != "joint":
            # A backward pass reaches one of the two models only.
            self.ddp_find_unused_parameters = True
        super().__post_init__()


class ReplacedTokenDetectionTrainer(PretrainingTrainer):
    """Trains a [`ReplacedTokenDetectionForPreTraining`] in the order of the option `training_mode`.

    One optimizer serves both models: it skips what has no gradient, so a step taken after the generator's backward pass moves
    the generator alone, with moments, clipping and weight decay of its own.
    """

    objective = ObjectiveDescription(
        name="rtd",
        title="Replaced token detection",
        description=(
            "A small generator fills in masked tokens by sampling from its own predictions; the discriminator, which is this "
            "model, says of every token of the result whether it was replaced. The generator learns by masked language "
            "modelling, and no gradient passes through the sampled tokens."
        ),
        formula=(
            r"\mathcal{L} = -\frac{1}{|M|} \sum_{i \in M} \log p_G(x_i \mid \tilde{x})"
            r" + \lambda \, \frac{1}{n} \sum_{t=1}^{n} \mathrm{BCE}\left(D(\hat{x})_t, [\hat{x}_t \neq x_t]\right)"
        ),
        citations=cite("clark2020electra"),
        metrics=SHARED_METRICS
        | {
            "mlm_loss": "How surprised the generator is by the true token at a masked position, in nats; 0 is certainty.",
            "mlm_perplexity": "As many tokens, all as likely, would leave the generator as unsure at a masked position.",
            "mlm_accuracy": "Share of the masked positions where the generator's first guess is the true token.",
            "rtd_loss": "How surprised the model is to learn whether a token was replaced, in nats; 0 is certainty.",
            "disc_auc": "How often a replaced token gets a higher score than an original one: 0.5 is chance, 1 is perfect.",
            "disc_accuracy": "Share of the tokens that are classified right; calling all original gives 1 less the fake rate.",
            "disc_precision": "Share of the tokens called replaced that were replaced.",
            "disc_recall": "Share of the replaced tokens that are called so.",
        },
        headline=("disc_auc", "disc_gain", "rtd_loss", "mlm_loss"),
        usage="""\
import torch
from transformers import AutoTokenizer, {model_class}

tokenizer = AutoTokenizer.from_pretrained("{repo}")
model = {model_class}.from_pretrained("{repo}")
inputs = tokenizer({sentence}, return_tensors="pt")
with torch.no_grad():
    replaced = model(**inputs).logits.squeeze(-1).sigmoid()  # [1, length]: probability that a token is a replacement""",
    )

    option_classes = (ReplacedTokenDetectionModelArguments, ReplacedTokenDetectionTrainingArguments)

    def build_model(
        self,
        options: ReplacedTokenDetectionModelArguments,
        *,
        args: Any,
        data: PreparedData,
        stock: PreTrainedModel | None = None,
    ) -> ReplacedTokenDetectionForPreTraining:
        """Return the discriminator with its generator."""
        return build_model(options, data.tokenizer, temperature=float(args.temperature), stock=stock)

    def make_collator(self, args: Any, tokenizer: Any) -> DataCollatorForReplacedTokenDetection:
        """Return the collator of masks and samples."""
        return DataCollatorForReplacedTokenDetection(tokenizer, masking=args.masking, seed=args.seed)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.begin_training()
        built = self.model.config.temperature
        if float(self.args.temperature) != built:
            raise InputError(
                f"temperature={self.args.temperature!r}, but the model was built to sample at {built}: give build_model the "
                "same temperature"
            )
        mode = self.args.training_mode
        if mode != "joint" and self.is_deepspeed_enabled:
            raise InputError(f"training_mode={mode!r} steps by itself, and so does DeepSpeed: use DDP, or 'joint'")
        if mode != "two_stage":
            return
        if self.model.config.embedding_sharing != "none":
            raise InputError(
                "training_mode='two_stage' starts the discriminator from the whole generator, which shares nothing with it "
                "afterwards: set embedding_sharing='none'"
            )
        shared_body_names(self.model.discriminator, self.model.generator, option="training_mode='two_stage'")

    def generator_steps(self, num_steps: int) -> int:
        """Return the steps of the first of two stages, of so many in all; 0 where there is one stage."""
        share: float = self.args.generator_steps if self.args.training_mode == "two_stage" else 0
        return round(share * num_steps) if share < 1 else int(share)

    def begin_training(self) -> None:
        """Forget an earlier training, which may have been of another model."""
        super().begin_training()
        self._handed_over = False
        self._waiting: list[dict[str, Any]] = []
        self._replaced_ids: torch.Tensor | None = None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Run one micro-batch forward and backward."""
        step = partial(super().training_step, model, num_items_in_batch=num_items_in_batch)
        if self.args.training_mode == "decoupled":
            return self._decoupled_step(model, step, inputs)
        return step(inputs | {"stage": self._stage()})

    def run_model(self, model: nn.Module, inputs: dict[str, Any]) -> PretrainingOutput:
        """Run the model and keep what the generator sampled, for the discriminator's turn; see `PretrainingTrainer.run_model`."""
        outputs = super().run_model(model, inputs)
        self._replaced_ids = outputs.replaced_ids
        return outputs

    # One after the other in each step

    def _decoupled_step(
        self, model: nn.Module, step: Callable[[dict[str, Any]], torch.Tensor], inputs: dict[str, Any]
    ) -> torch.Tensor:
        """Run the generator; with the step's last micro-batch also move it, and then run the discriminator on them all."""
        loss = step(inputs | {"stage": "generator"})
        self._waiting.append(inputs | {"stage": "discriminator", "replaced_ids": self._replaced_ids})
        if not self.accelerator.sync_gradients:
            return loss
        if self.args.max_grad_norm > 0:
            self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        waiting, self._waiting = self._waiting, []
        for number, batch in enumerate(waiting, start=1):
            # The gradients of the ranks are exchanged once, with the last.
            with nullcontext() if number == len(waiting) else self.accelerator.no_sync(model):
                loss = loss + step(batch)
        return loss

    # In two stages

    def _stage(self) -> Stage:
        if self.args.training_mode != "two_stage":
            return "joint"
        first = self.generator_steps(self.state.max_steps)
        if self.state.global_step < first:
            return "generator"
        # A checkpoint of this very step was written before the hand-over, any later one after it.
        if self.state.global_step == first and not self._handed_over:
            body = self.model.generator.base_model.state_dict()
            self.model.discriminator.base_model.load_state_dict(body)
            self._handed_over = True
        return "discriminator"

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Return the schedule; in two stages, one for each of them."""
        create = partial(super().create_scheduler, optimizer=optimizer)
        if self.args.training_mode != "two_stage" or self.lr_scheduler is not None:
            return create(num_training_steps)
        first = self.generator_steps(num_training_steps)
        if not 0 < first < num_training_steps:
            raise InputError(
                f"generator_steps={self.args.generator_steps} leaves a stage without steps: there are {num_training_steps} in all"
            )
        stages = []
        for steps in (first, num_training_steps - first):
            self.lr_scheduler = None
            stages.append(create(steps))
        if not all(isinstance(stage, LambdaLR) for stage in stages):
            raise InputError(
                f"lr_scheduler_type={self.args.lr_scheduler_type!r} cannot start anew: use 'linear' or 'cosine'"
            )
        factors = [stage.lr_lambdas[0] for stage in stages]
        self.lr_scheduler = LambdaLR(stages[0].optimizer, partial(_one_after_the_other, factors=factors, first=first))
        return self.lr_scheduler

    # A learning rate of the generator's own

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Return the optimizer, with groups of the generator's own if it has a learning rate of its own."""
        is_new, rate = self.optimizer is None, self.args.generator_learning_rate
        optimizer = super().create_optimizer(model)
        if is_new and rate is not None:
            ours = {id(parameter) for parameter in self.model.generator.parameters()}
            for group in list(optimizer.param_groups):
                generator = [parameter for parameter in group["params"] if id(parameter) in ours]
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ours]
                optimizer.add_param_group({**group, "params": generator, "lr": rate})
        return optimizer

    # Measurements and card

    def training_metrics(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return the share of the labels' entropy that the discriminator explains."""
        return discrimination_gain(means["rtd_loss"], means["fake_rate"]) if "rtd_loss" in means else {}

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """Warn of a discriminator that has learned nothing."""
        trained = self.state.global_step - self.generator_steps(self.state.max_steps)
        if trained > 2 * self.args.get_warmup_steps(max(1, self.state.max_steps)):
            warning = collapse_warning(metrics)
            if warning is not None:
                logger.warning(warning)

    def evaluation_metrics(
        self, scores: np.ndarray, labels: np.ndarray, means: Mapping[str, float]
    ) -> dict[str, float]:
        """Return the discriminator's metrics, padding left out."""
        return detection_metrics(scores, labels, loss=means["rtd_loss"])

    def card_facts(self) -> dict[str, Any]:
        """Return code that opens the head at hand, where no class of transformers has it."""
        has_own_head = self.model.discriminator_head is not None
        return {"objective": replace(self.objective, usage=_USAGE_OF_ANOTHER_HEAD)} if has_own_head else {}


def _one_after_the_other(step: int, *, factors: list[Callable[[int], float]], first: int) -> float:
    return factors[0](step) if step < first else factors[1](step - first)


def wrong_word_sentences(texts: Iterable[str]) -> Iterator[tuple[str, int, str]]:
    """Put the longest word of a sentence in place of that of the next.

    Args:
        texts: The sentences.

    Yields:
        A sentence with a wrong word, the character at which that begins, and the word that stood there.
    """
    other = ""
    for text in texts:
        begin, end = max(letter_words(text), key=lambda span: span[1] - span[0], default=(0, 0))
        word = text[begin:end]
        if word and other and other.lower() != word.lower():
            yield text[:begin] + other + text[end:], begin, word
        other = word or other


def print_wrong_words(trainer: ReplacedTokenDetectionTrainer, data: PreparedData) -> None:
    """Print held-out sentences with one wrong word each; the colour of a word shows the probability that it was replaced."""
    sentences = list(islice(wrong_word_sentences(held_out_sentences(data, seed=trainer.args.seed)), 3))
    if not sentences:
        return
    print("\nHeld-out sentences with one wrong word each; the redder, the more suspicious:")
    model = trainer.model
    scorer = ReplacedTokenScorer(model.discriminator, data.tokenizer, head=model.discriminator_head)
    for (_, begin, original), words in zip(sentences, scorer([text for text, *_ in sentences]), strict=True):
        wrong = next(word for word in words if word.start <= begin < word.end)
        rank = 1 + sum(word.score > wrong.score for word in words)
        print(f"  {coloured_words([(word.word, word.score) for word in words])}")
        print(
            f"    {wrong.word!r} instead of {original!r}: probability {wrong.score:.2f}, rank {rank} of {len(words)} words"
        )


METHOD = Method(
    trainer=ReplacedTokenDetectionTrainer,
    description="""\
Pre-train an ELECTRA: a generator replaces tokens, a discriminator finds them.

    hf-pretrain rtd --train_file corpus.txt --output_dir my-electra
    accelerate launch trainers/rtd.py --config trainers/recipes/electra_small.yaml --train_file corpus.txt --output_dir my-electra

With `--demo_corpus true` it trains on the docstrings of the installed Python packages. The result opens with
`AutoModel.from_pretrained("my-electra")`; the generator is in its folder `pretraining/generator`.""",
    arguments=(DataArguments, ReplacedTokenDetectionModelArguments, ReplacedTokenDetectionTrainingArguments),
    learning=Learning(
        left={"mlm_loss": 0.44}, gained={"disc_auc": 0.08}, least={"disc_gain": -0.01}, steps=400, examples=384
    ),
    demonstrate=print_wrong_words,
)
