"""A method as data: the record that stands beside each Trainer, and what a Trainer says of its method.

The command line, the shared tests and the tables of the docs read it. Another package registers its record as an entry point of
the group `hf_pretrain.methods`. Records are found by name and line without importing them: this module imports neither torch nor
transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from hf_pretrain.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from transformers import PreTrainedModel

    from hf_pretrain.data.arguments import DataArguments
    from hf_pretrain.data.prepare import PreparedData
    from hf_pretrain.hub.record import ObjectiveDescription
    from hf_pretrain.modeling.base import PretrainingModel
    from hf_pretrain.training.arguments import PretrainingArguments
    from hf_pretrain.training.trainer import PretrainingTrainer

GROUP = "hf_pretrain.methods"


@dataclass(frozen=True)
class Learning:
    """What a short training on the tiny text of the shared tests must reach.

    Attributes:
        left: Metric -> the largest share of its value before training that may be left after it, such as {"mlm_loss": 0.44}.
        gained: Metric -> the least that training must add to it.
        least: Metric -> its least value after training.
        text: The tiny text. In an example of "repeats" all words are the same, so that the context gives each word; in one of
            "counts" three words follow each other in turn, so that a missing word shows.
        steps: Steps of 16 examples.
        learning_rate: Peak rate.
        examples: Examples to train on.
    """

    left: Mapping[str, float] = field(default_factory=dict)
    gained: Mapping[str, float] = field(default_factory=dict)
    least: Mapping[str, float] = field(default_factory=dict)
    text: Literal["repeats", "counts"] = "repeats"
    steps: int = 250
    learning_rate: float = 3e-3
    examples: int = 96


@dataclass(frozen=True)
class Method:
    """A method of pre-training.

    Attributes:
        trainer: Class of the Trainer. The name of its `objective` is the name of the method.
        description: Text of the program's help.
        arguments: Dataclasses of the options of data, model and training.
        learning: What the shared tests expect of a short training.
        build_trainer: Makes the Trainer from the data and the options of model and training; by default by its hooks.
        tiny_options: Options of model and training that the tiny runs of the shared tests need.
        load: Makes examples from the options, called as [`load_data`], which is the default.
        made_up: Makes examples for the rehearsal, called as [`made_up_data`], which is the default.
        demonstrate: Prints more at the end of a run, to show what was learned.
        left_out: Options of training that the rehearsal has otherwise, because they only cost time.
    """

    trainer: type[PretrainingTrainer]
    description: str
    arguments: tuple[type, type, type]
    learning: Learning
    build_trainer: Callable[[PreparedData, Any, Any], PretrainingTrainer] = None  # type: ignore[assignment]
    tiny_options: Mapping[str, Any] = field(default_factory=dict)
    load: Callable[..., PreparedData] | None = None
    made_up: Callable[..., PreparedData] | None = None
    demonstrate: Callable[[Any, PreparedData], None] | None = None
    left_out: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Fill in how the Trainer is built."""
        if self.build_trainer is None:
            object.__setattr__(self, "build_trainer", partial(_trainer_of, self.trainer))

    @property
    def name(self) -> str:
        """Name of the method on the command line."""
        return self.trainer.objective.name

    @property
    def special_tokens(self) -> Sequence[str]:
        """Roles of the special tokens that the tokenizer must have."""
        return self.trainer.special_tokens

    def run(self, argv: list[str] | None = None) -> None:
        """Train from the command line.

        Args:
            argv: The arguments, without the name of the program; those of the process if None.
        """
        from hf_pretrain.training.program import train_method

        train_method(self, argv)


def _trainer_of(
    trainer: type[PretrainingTrainer], data: PreparedData, model_args: Any, args: PretrainingArguments
) -> PretrainingTrainer:
    """Return the Trainer of a model that is opened or built as the options say, on the examples that its method makes."""
    return trainer(model_args, args, train_dataset=data)


class MethodHooks:
    """What a method says of itself, beside its [`Method`]: each method's Trainer overrides what differs from the defaults here.

    A loss called "x" is weighted by the option `x_weight`. Beyond these, a Trainer may override `loss_weight`, `run_model` and
    `save_progress` of [`PretrainingTrainer`], and what the table there names.

    Attributes:
        objective: Name of the method, and words and formula for the card.
        option_classes: Dataclasses of the options of model and training.
        special_tokens: Special tokens that the tokenizer must have.
        reads_instead_of_text: What the method learns from where that is not text, and the call that makes it.
    """

    objective: ClassVar[ObjectiveDescription]
    option_classes: ClassVar[tuple[type, type]]
    special_tokens: ClassVar[tuple[str, ...]] = ("mask", "pad")
    reads_instead_of_text: ClassVar[str] = ""

    # Its inputs

    def build_model(
        self, options: Any, *, args: Any, data: PreparedData, stock: PreTrainedModel | None = None
    ) -> PretrainingModel:
        """Return the composite of a stock model, or of the checkpoint or the sizes that the options name.

        Args:
            options: Of the first of the `option_classes`.
            args: Of the second.
            data: The examples, with their tokenizer, length and languages.
            stock: A stock model to train; the options of its own sizes do not count.

        Raises:
            InputError: If it cannot be built.
        """
        raise InputError(
            f"model={type(stock).__name__}: {type(self).__name__} takes a composite of this library: wrap a stock model first, "
            "such as EncoderForPreTraining.from_model(model)"
        )

    def cut_text(self, data_args: DataArguments, *, training: Any) -> DataArguments:
        """Return how text is cut into examples for this method with its options; the base changes nothing."""
        return data_args

    def make_collator(self, args: Any, tokenizer: Any) -> Any:
        """Return the collator of the method with its options; the base has none of its own."""
        return None

    def make_examples(
        self, data: PreparedData, *, args: Any, model: PretrainingModel, collator: Any
    ) -> dict[str, Any]:
        """Return the arguments of the Trainer that come from the data, such as windows of lanes instead of blocks."""
        return data.trainer_inputs()

    def check_data(self, args: PretrainingArguments, train_dataset: Any, eval_dataset: Any) -> None:
        """Refuse datasets that the options cannot train on; the base does nothing."""

    # Its training

    def begin_training(self) -> None:
        """Forget an earlier training, which may have been of another model; called before each."""

    def check_trial(self) -> None:
        """Refuse the options of a trial that a method cannot train with; the base does nothing."""

    def training_metrics(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return further metrics for a row of the training log, from the means of the components since the last one."""
        return {}

    # Its evaluation and card

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """Look at the metrics of an evaluation, to warn of something; the base does nothing."""

    def evaluation_metrics(
        self, scores: np.ndarray, labels: np.ndarray, means: Mapping[str, float]
    ) -> dict[str, float]:
        """Return further metrics from the model's binary scores.

        Args:
            scores: ``[N]`` logits of all real tokens of the held-out set.
            labels: ``[N]`` zeros and ones.
            means: The means computed so far.
        """
        return {}

    def reference_models(self) -> dict[str, str | Callable[[Path], Any]]:
        """Return models to measure beside the trained one on `evaluation_tasks`: by label, a name or what writes the folder."""
        return {}

    def card_facts(self) -> dict[str, Any]:
        """Return fields of [`PretrainingCard`] that a method knows better than its description."""
        return {}


class Listed(NamedTuple):
    """A method that is known by name and not yet imported.

    Attributes:
        line: What it does, in one line.
        place: Where its record is, as "package.module:ATTRIBUTE".
        owner: Name of the package that registers it.
        trainer: Class of its Trainer, which `hf_pretrain` exports; "" where another package registers the method.
    """

    line: str
    place: str
    owner: str = "hf-pretrain"
    trainer: str = ""

    def load(self, name: str) -> Method:
        """Import the record.

        Raises:
            InputError: If there is no record of that name.
        """
        method = EntryPoint(name, self.place, GROUP).load()
        if not isinstance(method, Method) or method.name != name:
            found = f"the Method {method.name!r}" if isinstance(method, Method) else f"a {type(method).__name__}"
            raise InputError(
                f"method {name!r} of {self.owner}: {self.place} is {found}: register a Method under the name of its Trainer's "
                "objective"
            )
        return method


def registered_methods(known: Mapping[str, Listed], *, taken: Collection[str] = ()) -> dict[str, Listed]:
    """Return the known methods, and after them those that installed packages register.

    Args:
        known: The methods of this library, by name.
        taken: Other names of the command line.

    Raises:
        InputError: If a package registers a method under a name that there is already.
    """
    found = dict(known)
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        owner = point.dist.name if point.dist else "a package"
        if point.name in found or point.name in taken:
            other = found[point.name].owner if point.name in found else "hf-pretrain"
            raise InputError(
                f"{point.name!r} is a name of {other} and of a method of {owner}: uninstall one of the two"
            )
        line = (point.dist.metadata["Summary"] if point.dist else None) or "no description"
        found[point.name] = Listed(f"{line} ({owner})", point.value, owner)
    return found
