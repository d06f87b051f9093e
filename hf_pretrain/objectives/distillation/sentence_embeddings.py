"""Sentence embeddings: the modules of a sentence-transformers folder, the vectors that they make, and losses between these.

A folder of sentence-transformers has an encoder at its root, and `modules.json` names what follows: pooling over the
tokens, perhaps a linear layer, and perhaps a division by the length. [`SentenceModules`] reads these files from the
teacher, computes the vectors of both models, and writes the files of the student. The library itself is not needed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import save_file
from transformers.utils import cached_file, logging

from hf_pretrain.data.arguments import DataArguments
from hf_pretrain.errors import InputError, one_line
from hf_pretrain.files import write_text
from hf_pretrain.modeling.backbone import without_autocast
from hf_pretrain.modeling.losses import ExampleSum

logger = logging.get_logger(__name__)

MODULES = "modules.json"
_TRANSFORMER, _LIBRARY, _CONFIG = "sentence_bert_config.json", "config_sentence_transformers.json", "config.json"
# Keys of a pooling configuration, in the order in which their vectors are put side by side.
_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_WIDTHS = ("word_embedding_dimension", "embedding_dimension")
_ORDERS = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])


@dataclass(frozen=True)
class SentenceModules:
    """What follows an encoder in a sentence-transformers folder, as its files say it.

    Attributes:
        pooling: Configuration of the pooling.
        normalizes: Whether vectors are divided by their length.
        transformer: How text is read: `max_seq_length` in tokens, and more.
        library: Prompts and the similarity of the model; {} if the folder does not say.

    Raises:
        InputError: If the configuration has no pooling that is known, or lowers the case of text.
    """

    pooling: dict[str, Any] = field(default_factory=lambda: {"pooling_mode_mean_tokens": True})
    normalizes: bool = False
    transformer: dict[str, Any] = field(default_factory=dict)
    library: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = [mode for mode in self.modes if mode not in _MODES.values()]
        if unknown:
            raise InputError(f"pooling_mode={unknown[0]!r} is unknown: choose of {', '.join(_MODES.values())}")
        if self.transformer.get("do_lower_case"):
            raise InputError(
                f"do_lower_case=true of {_TRANSFORMER} is not supported: let the tokenizer lower the case, and set it to false"
            )

    @classmethod
    def read(cls, name_or_path: str) -> SentenceModules | None:
        """Read the files of a folder or a repository; None if it has no `modules.json`.

        Args:
            name_or_path: Folder, or name on the Hub.

        Raises:
            InputError: If a module has no counterpart here, such as `Dense`, or a file is damaged.
        """
        listed = _read_json(name_or_path, MODULES)
        if listed is None:
            return None
        try:
            folders = {entry["type"].rpartition(".")[2]: entry["path"] for entry in listed}
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{MODULES} of {name_or_path!r} lists no modules with type and path") from error
        if list(folders) not in _ORDERS or len(folders) != len(listed) or folders["Transformer"]:
            other = [kind for kind in folders if kind not in _ORDERS[-1]]
            found = other[0] if other else f"the order {', '.join(folders)}, or a Transformer in a folder of its own"
            raise InputError(
                f"{MODULES} of {name_or_path!r} has {found}: distillation knows a Transformer at the root, Pooling and Normalize"
            )
        pooling = _read_json(name_or_path, f"{folders['Pooling']}/{_CONFIG}")
        if pooling is None:
            raise InputError(f"{name_or_path!r} has no {folders['Pooling']}/{_CONFIG}: copy the whole model again")
        transformer, library = (_read_json(name_or_path, file) or {} for file in (_TRANSFORMER, _LIBRARY))
        return cls(pooling, "Normalize" in folders, transformer, library)

    @property
    def modes(self) -> tuple[str, ...]:
        """The kinds of pooling, whose vectors are put side by side."""
        mode = self.pooling.get("pooling_mode")
        if mode is None:
            return tuple(name for key, name in _MODES.items() if self.pooling.get(key)) or ("mean",)
        return (mode,) if isinstance(mode, str) else tuple(mode)

    @property
    def max_length(self) -> int | None:
        """Tokens of a text that are read; None if the files do not say."""
        return self.transformer.get("max_seq_length")

    def width(self, hidden_size: int) -> int:
        """Return the width of the vectors of an encoder."""
        return len(self.modes) * hidden_size

    def vectors(
        self, states: torch.Tensor, attention_mask: torch.Tensor, dense: torch.nn.Module | None = None
    ) -> torch.Tensor:
        """Return the vector of each text, as `SentenceTransformer.encode` computes it.

        Args:
            states: ``[B, L, D]`` last hidden states.
            attention_mask: ``[B, L]``, 0 at padding.
            dense: A linear layer behind the pooling.

        Returns:
            ``[B, E]`` in fp32.
        """
        with without_autocast(states.device):
            vectors = torch.cat([_pooled(states.float(), attention_mask, mode) for mode in self.modes], dim=-1)
            vectors = vectors if dense is None else dense(vectors)
            return F.normalize(vectors, dim=-1) if self.normalizes else vectors

    def write(
        self, folder: Path, *, hidden_size: int, longest: int | None = None, dense: torch.Tensor | None = None
    ) -> None:
        """Write the files that let `SentenceTransformer(folder)` compute the vectors of an encoder at the root.

        Args:
            folder: Folder of the encoder.
            hidden_size: Its width.
            longest: Tokens that it can read; None for any number.
            dense: ``[E, width]`` weights of a linear layer behind the pooling.
        """
        width_key = next((key for key in _WIDTHS if key in self.pooling), _WIDTHS[0])
        lengths = [length for length in (self.max_length, longest) if length is not None]
        kinds = ["Transformer", "Pooling", *["Dense"] * (dense is not None), *["Normalize"] * self.normalizes]
        paths = ["" if not number else f"{number}_{kind}" for number, kind in enumerate(kinds)]
        listed = [
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for number, (kind, path) in enumerate(zip(kinds, paths, strict=True))
        ]
        contents: dict[str, Any] = {
            MODULES: listed,
            _TRANSFORMER: self.transformer | ({"max_seq_length": min(lengths)} if lengths else {}),
            f"{paths[1]}/{_CONFIG}": self.pooling | {width_key: hidden_size},
        }
        if self.library:
            contents[_LIBRARY] = self.library
        if dense is not None:
            sizes = {"in_features": dense.shape[1], "out_features": dense.shape[0], "bias": False}
            contents[f"{paths[2]}/{_CONFIG}"] = sizes | {"activation_function": "torch.nn.modules.linear.Identity"}
        for name, content in contents.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_text(folder / name, json.dumps(content, indent=2) + "\n")
        if dense is not None:
            weights = {"linear.weight": dense.detach().float().cpu().contiguous()}
            save_file(weights, folder / paths[2] / "model.safetensors", metadata={"format": "pt"})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return dataclasses.asdict(self)


def load_sentence_modules(name: str, *, needed_by: Sequence[str], block_size: int) -> SentenceModules | None:
    """Read what a teacher has behind its encoder, which the student gets too.

    Args:
        name: Name or folder of the teacher.
        needed_by: Names of the losses that compare vectors.
        block_size: Longest sequence of the data, in tokens.

    Returns:
        The modules; None if the teacher has none, or has others, and no loss needs them.

    Raises:
        InputError: If a loss needs modules that the teacher does not have, or examples are longer than it reads.
    """
    try:
        modules = SentenceModules.read(name)
    except InputError as error:
        if needed_by:
            raise
        logger.warning(f"{error}; the student is saved as an encoder alone")
        return None
    if modules is None and needed_by:
        raise InputError(
            f"teacher_name_or_path={name!r} has no {MODULES}, so the {needed_by[0]} loss does not know how to pool: save it with "
            "SentenceTransformer(...).save_pretrained(folder), or choose another distillation_method"
        )
    longest = modules.max_length if modules is not None and needed_by else None
    if longest is not None and block_size > longest:
        raise InputError(f"block_size={block_size} is more than the teacher reads: set block_size={longest} or less")
    return modules


def one_text_in_a_row(args: DataArguments) -> DataArguments:
    """Return options with which no example has two documents; whole sentences fill it, as by default.

    Raises:
        InputError: If the options cut text in another way.
    """
    if args.block_mode not in ("full_sentences", "doc_sentences"):
        raise InputError(
            f"block_mode={args.block_mode!r} puts several texts into a row, which has one vector: use 'doc_sentences'"
        )
    return dataclasses.replace(args, block_mode="doc_sentences")


def _read_json(name_or_path: str, file: str) -> Any:
    """Return the content of a file of a model, None if there is no such file."""
    quiet = {f"_raise_exceptions_for_{case}": False for case in ("missing_entries", "connection_errors", "gated_repo")}
    try:
        path = cached_file(name_or_path, file, **quiet)
        return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError:
        return None
    except ValueError as error:
        raise InputError(f"{file} of {name_or_path!r} is no JSON ({one_line(error)}): copy it again") from error


def _pooled(states_BLD: torch.Tensor, mask_BL: torch.Tensor, mode: str) -> torch.Tensor:
    """Pool states over the tokens of each text, in one of the ways of sentence-transformers."""
    length = mask_BL.shape[1]
    # Not by a product: padding may hold values that are not a number.
    states_BLD = states_BLD.masked_fill(mask_BL[:, :, None] == 0, 0)
    first_B = mask_BL.int().argmax(1)
    if mode in ("cls", "lasttoken"):
        last_B = length - 1 - mask_BL.flip(1).int().argmax(1)
        chosen_B = first_B if mode == "cls" else last_B
        return states_BLD.gather(1, chosen_B[:, None, None].expand(-1, 1, states_BLD.shape[2])).squeeze(1)
    if mode == "max":
        return states_BLD.masked_fill(mask_BL[:, :, None] == 0, float("-inf")).amax(1)
    weights_BL = mask_BL.float()
    if mode == "weightedmean":
        weights_BL = weights_BL * (torch.arange(1, length + 1, device=mask_BL.device) - first_B[:, None])
    total_B = weights_BL.sum(1, keepdim=True).clamp(min=1e-9)
    return (states_BLD * weights_BL[:, :, None]).sum(1) / (
        total_B.sqrt() if mode == "mean_sqrt_len_tokens" else total_B
    )


def sentence_losses(student: torch.Tensor, teacher: torch.Tensor, names: Collection[str]) -> dict[str, ExampleSum]:
    """Return the losses between the vectors of both models.

    Args:
        student: ``[B, E]``.
        teacher: ``[B, E']``; E' is E but for "sentence_similarity".
        names: Names of the losses: "sentence_cosine" is one minus the cosine; "sentence_mse" the squared difference,
            averaged over the width; "sentence_similarity" the squared difference of the cosines of two texts of the
            batch, which compares vectors of any widths.

    Returns:
        Sums by text, and the numbers of targets: texts, or of the similarities pairs of texts.

    Source: Reimers & Gurevych 2020, "Making Monolingual Sentence Embeddings Multilingual using Knowledge Distillation",
        section 2 (squared difference); Zhang et al. 2024, "Jasper and Stella", section 3 (the two others).
    """
    found: dict[str, ExampleSum] = {}
    if "sentence_cosine" in names:
        losses_B = 1 - F.cosine_similarity(student, teacher, dim=-1)
        found["sentence_cosine"] = ExampleSum(losses_B, torch.ones_like(losses_B))
    if "sentence_mse" in names:
        losses_B = (student - teacher).square().mean(-1)
        found["sentence_mse"] = ExampleSum(losses_B, torch.ones_like(losses_B))
    if "sentence_similarity" in names:
        # The cosine of a text with itself is 1 in both models, and adds nothing.
        losses_B = (_similarities(student) - _similarities(teacher)).square().sum(-1)
        found["sentence_similarity"] = ExampleSum(losses_B, torch.full_like(losses_B, len(losses_B) - 1))
    return found


def nearest_agreement(student: torch.Tensor, teacher: torch.Tensor) -> ExampleSum:
    """Return how often both models find the same nearest text of the batch; nothing is counted in a batch of two or less."""
    own = torch.eye(len(student), dtype=torch.bool, device=student.device)
    nearest = [_similarities(vectors).masked_fill(own, float("-inf")).argmax(1) for vectors in (student, teacher)]
    agree_B = (nearest[0] == nearest[1]).float()
    counts_B = torch.full_like(agree_B, float(len(student) > 2))
    return ExampleSum(agree_B * counts_B, counts_B)


def _similarities(vectors_BE: torch.Tensor) -> torch.Tensor:
    with without_autocast(vectors_BE.device):
        unit_BE = F.normalize(vectors_BE.float(), dim=-1)
        return unit_BE @ unit_BE.T


def from_config(values: Mapping[str, Any] | None) -> SentenceModules | None:
    """Return the modules that [`SentenceModules.to_dict`] made plain data of; None of None."""
    return None if values is None else SentenceModules(**values)
