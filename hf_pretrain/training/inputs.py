"""From what a user gives a Trainer to what it trains: options, tokenizer, examples, model and collator.

A Trainer takes a name, a stock model or options for `model`, and datasets of text. A method says in four hooks of its Trainer how
it builds a model or wraps a stock one, which collator it takes, and which examples it makes of text; all the rest is here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from torch.utils.data import IterableDataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from hf_pretrain.data.arguments import DataArguments
from hf_pretrain.data.documents.tokenizers import check_tokenizer
from hf_pretrain.data.examples.epochs import EpochDataset, fill_of
from hf_pretrain.data.examples.packing import BlockDataset
from hf_pretrain.data.in_memory import DATASETS, as_dataset, check_held_out, choose_splits, longest_row, rows_of
from hf_pretrain.data.prepare import PreparedData, dataset_name, prepare_data
from hf_pretrain.errors import InputError
from hf_pretrain.modeling.backbone import longest_sequence
from hf_pretrain.modeling.base import PretrainingModel, refuse_adapters
from hf_pretrain.modeling.embeddings import set_rotary_positions
from hf_pretrain.modeling.loading import from_pretrained
from hf_pretrain.training.arguments import PretrainingArguments, check_text
from hf_pretrain.training.phases.course import Phase

if TYPE_CHECKING:
    from hf_pretrain.training.trainer import PretrainingTrainer

_BLOCKS = "data_args=DataArguments(block_size=...)"
# What other Trainers call an argument -> what to write here.
_OTHER_ARGUMENTS = {
    "block_mode": "data_args=DataArguments(block_mode=...)",
    "block_size": _BLOCKS,
    "dataset_text_field": "data_args=DataArguments(text_column=...)",
    "max_length": _BLOCKS,
    "max_seq_length": _BLOCKS,
    "mlm_probability": "args={args}(mlm_probability=...)",
    "packing": "data_args=DataArguments(block_mode=...)",
    "teacher_model": "teacher=...",
    "text_column": "data_args=DataArguments(text_column=...)",
    "tokenizer": "processing_class=...",
}


@dataclasses.dataclass
class _Part:
    """A dataset as it was read.

    Attributes:
        data: Its examples and documents as those to train on, and its description.
        is_ready: Whether the examples are the user's own, which no method turns into others.
        is_outline: Whether the text is still to be read.
    """

    data: PreparedData
    is_ready: bool = False
    is_outline: bool = False


class TrainerInputs:
    """What a Trainer is given, turned step by step into what it trains.

    Args:
        trainer: The Trainer, of which only the hooks are called.
        model: A composite, a stock model, a name or folder, or options of a model; None for a `model_init`.
        args: Options of training; by default those of the method.
        model_args: Options of a model that is built, or opened by name.
        data_args: How text is cut into examples.
        processing_class: The tokenizer, or its name or folder; by default the model's.
        others: Further arguments of `transformers.Trainer`.

    Raises:
        InputError: In one line that names the right call.
    """

    def __init__(
        self,
        trainer: PretrainingTrainer,
        model: Any,
        args: PretrainingArguments | None,
        *,
        model_args: Any,
        data_args: DataArguments | None,
        processing_class: Any,
        others: Mapping[str, Any],
    ) -> None:
        self.trainer, self.name = trainer, type(trainer).__name__
        self.model_class, self.args_class = trainer.option_classes
        for other in others.keys() & _OTHER_ARGUMENTS.keys():
            right = _OTHER_ARGUMENTS[other].format(args=self.args_class.__name__)
            value = others[other]
            shown = repr(value) if isinstance(value, str | int | float | None) else type(value).__name__
            raise InputError(f"{other}={shown} is no argument of {self.name}: write {right}")
        if "compute_metrics" in others:
            raise InputError(
                "compute_metrics is not used here: override evaluation_metrics, which sees scores and labels"
            )
        self.args = self.args_class(output_dir="trainer_output") if args is None else args
        if not isinstance(self.args, PretrainingArguments):
            self._check_args()
        if getattr(self.args, "phases", None) and getattr(self.args, "course", None) is None:
            raise InputError(
                "phases is for programs, which make a Trainer for each of them: hf-pretrain METHOD --config recipe.yaml"
            )
        if self.args.n_gpu > 1:
            raise InputError(
                f"one process would drive {self.args.n_gpu} GPUs: start with `accelerate launch`, a process a GPU"
            )
        if isinstance(model, self.model_class):
            model, model_args = None, model
        self.model, self.model_args = model, model_args
        self._check_model()
        self.model_init = others.get("model_init")
        self._check_adapter()
        self.data_args = data_args
        self.processing_class = processing_class
        if processing_class is None and data_args is not None:
            self.processing_class = data_args.tokenizer_name
        self._data: PreparedData | None = None
        self._longest, self._cuts_text = 0, False
        # What fresh weights can be made of once more.
        self._source = model if isinstance(model, str | Path) else model_args if model is None else None

    def _check_args(self) -> None:
        """Refuse options of another method, or of another library."""
        if not isinstance(self.args, self.args_class):
            raise InputError(
                f"args={type(self.args).__name__}: {self.name} takes args={self.args_class.__name__}(output_dir=...)"
            )

    def _check_model(self) -> None:
        """Refuse a model that is none, and options of another method."""
        model, options = self.model, self.model_args
        if options is not None and not isinstance(options, self.model_class):
            raise InputError(
                f"model_args={type(options).__name__}: {self.name} takes model_args={self.model_class.__name__}(...)"
            )
        if isinstance(model, PretrainingModel):
            if options is not None:
                raise InputError(
                    f"model_args has no effect on model={type(model).__name__}, which is built: leave out one of the two"
                )
        elif isinstance(model, PreTrainedModel):
            refuse_adapters(model)
        elif model is not None and not isinstance(model, str | Path):
            shown = model.__name__ if isinstance(model, type) else type(model).__name__
            raise InputError(
                f"model={shown}: {self.name} takes a model of transformers, its name or folder, or "
                f"{self.model_class.__name__}(...)"
            )

    def _check_adapter(self) -> None:
        """Refuse adapters beside a model from scratch, whose weights would stay random."""
        adapter = getattr(self.args, "adapter", "none")
        if adapter != "none" and self.model is None and self.model_init is None and self._name_of_model() is None:
            raise InputError(
                f"adapter={adapter!r} leaves the weights of a model as they are, and a new model's are random: set "
                "model_name_or_path, or leave it out"
            )

    # Data

    def read(self, train_dataset: Any, eval_dataset: Any, *, collator: Any) -> dict[str, Any]:
        """Return datasets, collator and tokenizer as arguments of `transformers.Trainer`, and make the model.

        Args:
            train_dataset: Ready examples, or text: a dataset of 🤗 datasets, a list of texts, or what `prepare_data` returns.
            eval_dataset: The same, or a dictionary of several; by default the split "validation" of a `DatasetDict`.
            collator: Makes batches of examples; the method's own if None.

        Raises:
            InputError: If a dataset has no text, or does not fit the model, the method, the options or the collator.
        """
        self._refuse_collator(collator)
        found = self._found(train_dataset, eval_dataset, collator=collator)
        train_dataset, eval_dataset = found["train_dataset"], found["eval_dataset"]
        self.trainer.check_data(self.args, train_dataset, eval_dataset)
        is_stream = isinstance(train_dataset, IterableDataset)
        if is_stream:
            self.args.read_stream()
        check_text(self.args, is_stream=is_stream, holds_out=eval_dataset is not None)
        self.args.eval_on_start &= eval_dataset is not None
        self._description = found.get("data_description") or {}
        both = {"train_dataset": _with_epochs(train_dataset), "eval_dataset": _with_epochs(eval_dataset)}
        return both | {name: found[name] for name in ("data_collator", "processing_class")}

    def describe(self, given: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return numbers and names about the data for the model card: those given, or what was found."""
        described = dict(given or self._description)
        parts = {"filled_share": self.trainer.train_dataset, "held_out_filled_share": self.trainer.eval_dataset}
        fills = {name: fill_of(part) for name, part in parts.items()}
        return described | {name: round(fill, 4) for name, fill in fills.items() if fill is not None}

    def _found(self, train_dataset: Any, eval_dataset: Any, *, collator: Any) -> dict[str, Any]:
        """Return what `read` does, as the user or the method has it, and the description of the data."""
        train_dataset, eval_dataset = choose_splits(as_dataset(train_dataset), as_dataset(eval_dataset))
        sets = dict(eval_dataset) if isinstance(eval_dataset, dict) else {"": eval_dataset}
        parts = [part for part in (train_dataset, *sets.values()) if part is not None]
        is_built = isinstance(self.model, PretrainingModel) or (self.model is None and self.model_args is None)
        is_ready = is_built and not any(map(self._has_to_be_read, parts))
        # Only a method has a collator of its own, and it needs the options of the method.
        makes_collator = collator is None and bool(parts) and self.args_class is not PretrainingArguments
        tokenizer = self._tokenizer(train_dataset, is_needed=makes_collator or not is_ready)
        if makes_collator or not is_ready:
            self._check_args()
        if makes_collator and is_ready:
            collator = self.trainer.make_collator(self.args, tokenizer)
        if not is_ready:
            sets = {name: part for name, part in sets.items() if part is not None}
            found = self._made(train_dataset, sets, collator, tokenizer)
            held_out = found["eval_dataset"]
            return found | {"eval_dataset": held_out if isinstance(eval_dataset, dict) else held_out.get("")}
        return {
            "train_dataset": train_dataset,
            "eval_dataset": eval_dataset,
            "data_collator": collator,
            "processing_class": tokenizer,
        }

    def _made(self, train_dataset: Any, sets: Mapping[str, Any], collator: Any, tokenizer: Any) -> dict[str, Any]:
        """Return what `read` does of datasets or models that are not yet in the form of the library; sets by their names."""
        for part in sets.values():
            check_held_out(part)
        train = self._outline(train_dataset, tokenizer)
        if train is None:
            train = self._part(train_dataset, tokenizer, holds_out=not sets)
        # The model first: what does not fit it shows before any text is read.
        self._data = train.data
        self.model = self.compose(self._first_model())
        if train.is_outline:
            train = self._part(train_dataset, tokenizer, holds_out=not sets)
            self._data = train.data
        held_out = {name: self._part(part, tokenizer) for name, part in sets.items()}
        if self.data_args is not None and not self._cuts_text:
            raise InputError(
                f"data_args has no effect on train_dataset={type(train_dataset).__name__}, whose examples are made: leave it out"
            )
        if collator is None:
            collator = self.trainer.make_collator(self.args, tokenizer)
            if self.args.torch_compile:
                _fix_shapes(collator, num_rows=self.args.per_device_train_batch_size, length=train.data.block_size)
        found = self._examples(train, held_out, collator)
        if found["data_description"].get("block_mode") == "isolated_documents":
            self.model.check_isolation(length=train.data.block_size)
        return found | {"data_collator": collator}

    def _has_to_be_read(self, dataset: Any) -> bool:
        """Return whether a dataset is not yet of examples."""
        if isinstance(dataset, PreparedData):
            return True
        return isinstance(dataset, DATASETS) and (rows_of(dataset) != "tokens" or _is_stream(dataset))

    def _refuse_collator(self, collator: Any) -> None:
        """Refuse a collator of transformers: its batches have no targets as the models here gather them."""
        if type(collator).__module__.startswith("transformers."):
            raise InputError(
                f"data_collator={type(collator).__name__} makes batches of another form: leave it out, {self.name} brings its "
                f"own; options of masking are those of args={self.args_class.__name__}(...)"
            )

    def _tokenizer(self, train_dataset: Any, *, is_needed: bool) -> Any:
        """Return the tokenizer: the one given or named, that of the data, or that of the model."""
        found = self.processing_class
        if found is None and isinstance(train_dataset, PreparedData):
            found = train_dataset.tokenizer
        if found is None and is_needed:
            found = self._name_of_model()
            if found is None:
                raise InputError(
                    f"processing_class is missing: give {self.name} the tokenizer, such as "
                    "AutoTokenizer.from_pretrained(...), or a tokenizer's name"
                )
        if isinstance(found, str | Path):
            found = from_pretrained(AutoTokenizer, str(found))
        if is_needed and isinstance(found, PreTrainedTokenizerBase):
            check_tokenizer(found, roles=self.trainer.special_tokens)
        return found

    def _name_of_model(self) -> str | None:
        """Return the name of the checkpoint that has the tokenizer, None if there is none."""
        options = self.model_args
        names: list[Any] = [str(self.model)] if isinstance(self.model, str | Path) else []
        names += [getattr(options, f"{part}_name_or_path", None) for part in ("model", "teacher", "encoder")]
        names.append(getattr(getattr(self.model, "config", None), "name_or_path", None))
        return next(filter(None, names), None)

    def _cutting(self) -> DataArguments:
        """Return how text is cut: as the options say, and as the method needs it."""
        args = DataArguments() if self.data_args is None else self.data_args
        return self.trainer.cut_text(args, training=self.args)

    def _outline(self, dataset: Any, tokenizer: PreTrainedTokenizerBase) -> _Part | None:
        """Return what is known of text before it is read, None of any other dataset."""
        if not isinstance(dataset, DATASETS) or rows_of(dataset) != "text" or self.trainer.reads_instead_of_text:
            return None
        args = self._cutting()
        known = PreparedData(tokenizer, None, None, {"block_mode": args.block_mode}, args.block_size)
        return _Part(known, is_outline=True)

    def _part(self, dataset: Any, tokenizer: PreTrainedTokenizerBase, *, holds_out: bool = False) -> _Part:
        """Read a dataset; a share of text is held out only where the options say so and nothing else is."""
        args = self._cutting()
        if isinstance(dataset, PreparedData):
            return _Part(dataset)
        if not isinstance(dataset, DATASETS):
            base = dataset.base if isinstance(dataset, EpochDataset) else dataset
            size = getattr(base, "block_size", args.block_size)
            own = {"block_mode": base.mode} if isinstance(base, BlockDataset) else {}
            return _Part(PreparedData(tokenizer, dataset, None, dict(own), size), is_ready=True)
        kind = rows_of(dataset)
        if kind != "tokens" and self.trainer.reads_instead_of_text:
            raise InputError(f"{self.name} learns from {self.trainer.reads_instead_of_text}")
        self._cuts_text |= kind != "tokens"
        if kind == "text":
            chosen = args.validation_fraction != DataArguments.validation_fraction
            fraction = args.validation_fraction if holds_out and chosen else 0.0
            return _Part(
                prepare_data(
                    dataclasses.replace(args, validation_fraction=fraction),
                    seed=self.args.seed,
                    output_dir=self.args.output_dir,
                    tokenizer=tokenizer,
                    first=self.args.main_process_first(local=False, desc="data"),
                    dataset=dataset,
                )
            )
        if _is_stream(dataset):
            raise InputError(
                f"train_dataset is a stream of {kind}: give the stream with its column of text, which {self.name} tokenizes and "
                "packs as it reads, or store the rows in a datasets.Dataset"
            )
        described: dict[str, Any] = {"source": dataset_name(dataset)}
        if kind == "documents":
            blocks = BlockDataset(dataset, tokenizer=tokenizer, block_size=args.block_size, mode=args.block_mode)
            described |= {"documents": len(dataset), "tokens": blocks.num_tokens, "blocks": len(blocks)}
            described |= {"block_size": args.block_size, "block_mode": args.block_mode}
            return _Part(PreparedData(tokenizer, blocks, None, described, args.block_size, train_documents=dataset))
        longest = longest_row(dataset)
        self._longest = max(self._longest, longest)
        described |= {"examples": len(dataset), "block_size": longest}
        return _Part(PreparedData(tokenizer, EpochDataset(dataset), None, described, longest))

    def _examples(self, train: _Part, held_out: Mapping[str, _Part], collator: Any) -> dict[str, Any]:
        """Return the examples that the method makes of the parts; those held out by their names."""
        data, model = train.data, self.model

        def make(data: PreparedData) -> dict[str, Any]:
            return self.trainer.make_examples(data, args=self.args, model=model, collator=collator)

        def beside(part: _Part) -> PreparedData:
            base = part.data if train.is_ready else data
            own = {name: part.data.description[name] for name in part.data.description if name in _OF_TEXT}
            return dataclasses.replace(
                base,
                eval_dataset=part.data.train_dataset,
                eval_documents=part.data.train_documents,
                description=data.description | {f"held_out_{name}": value for name, value in own.items()},
            )

        found: dict[str, Any] = {}
        sets: dict[str, Any] = {}
        for name, part in held_out.items():
            made = None if part.is_ready else make(beside(part))
            sets[name] = part.data.train_dataset if made is None else made["eval_dataset"]
            found = found or made or {}
        if train.is_ready:
            found |= {"train_dataset": data.train_dataset, "data_description": data.description}
        elif not found:
            found = make(data)
            if found.get("eval_dataset") is not None and not held_out:
                sets[""] = found["eval_dataset"]
        return found | {"eval_dataset": sets, "processing_class": data.tokenizer}

    # Model

    def _first_model(self) -> Any:
        """Return what the composite is made of."""
        if self.model_init is None:
            return self.model
        return self.model_init(None) if signature(self.model_init).parameters else self.model_init()

    def rebuilding(self) -> Callable[[Any], Any]:
        """Return a `model_init`: it gives what the model was made of, and `call_model_init` makes the composite of that.

        Raises:
            InputError: If the model came as it is.
        """
        if self._source is None:
            raise InputError(
                "hyperparameter_search begins each trial with fresh weights: give the Trainer model_init=, a function that makes "
                "the model, or the model's name"
            )
        return self._made_of

    def _made_of(self, trial: Any = None) -> Any:
        return self._source

    def compose(self, model: Any) -> PretrainingModel:
        """Return the composite of a stock model, a name or options; a composite as it is.

        Args:
            model: What there is; None for the options of the model.

        Raises:
            InputError: If it cannot be built, or does not fit the method or the data.
        """
        if self._data is None:
            return model
        data, args, composite = self._data, self.args, model
        if not isinstance(model, PretrainingModel):
            options = self.model_class() if self.model_args is None else self.model_args
            if isinstance(model, self.model_class):
                options = model
            elif isinstance(model, str | Path):
                options = dataclasses.replace(options, model_name_or_path=str(model))
            stock = model if isinstance(model, PreTrainedModel) else None
            set_seed(args.seed)
            composite = self.trainer.build_model(options, args=args, data=data, stock=stock)
        if args.course is not None:
            _set_positions(composite, args.course.phase)
        for part in composite.backbones.values():
            longest = longest_sequence(part)
            if longest is not None and self._longest > longest:
                raise InputError(
                    f"train_dataset has a row of {self._longest} tokens, and {type(part).__name__} takes {longest}: give the "
                    "dataset with its column of text, which is cut into blocks, or cut its rows"
                )
        composite.check_fits(data.tokenizer, block_size=data.block_size, isolates_documents=False)
        return composite


def _fix_shapes(collator: Any, *, num_rows: int, length: int) -> None:
    """Let a collator make batches of one shape: each other shape would be compiled anew."""
    if hasattr(collator, "fix_shapes"):
        collator.fix_shapes(num_rows=num_rows, length=length)
    elif getattr(collator, "pad_to_multiple_of", 0) is None:
        collator.pad_to_multiple_of = length


def _set_positions(composite: PretrainingModel, phase: Phase) -> None:
    """Give the models that are trained the rotary positions of a phase."""
    theta, length = phase.rope_theta, phase.max_position_embeddings
    for part in composite.backbones.values() if theta is not None or length is not None else ():
        set_rotary_positions(part, theta=theta, length=length)


def _with_epochs(dataset: Any) -> Any:
    if isinstance(dataset, dict):
        return {name: _with_epochs(part) for name, part in dataset.items()}
    return dataset if dataset is None or isinstance(dataset, IterableDataset) else EpochDataset.wrap(dataset)


def _is_stream(dataset: Any) -> bool:
    return isinstance(dataset, datasets.IterableDataset | datasets.IterableDatasetDict)


# Facts of text that a card shows of the part held out too.
_OF_TEXT = ("source", "documents", "tokens", "blocks", "bytes", "characters", "unknown_share", "examples")
