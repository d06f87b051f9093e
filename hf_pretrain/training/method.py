"""A method as data: the record that stands beside each Trainer.

The command line, the shared tests and the tables of the docs read it. Another package registers its record as an entry point of
the group `hf_pretrain.methods`. Records are found by name and line without importing them: this module imports neither torch nor
transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from hf_pretrain.errors import InputError

if TYPE_CHECKING:
    from hf_pretrain.data.prepare import PreparedData
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
