"""Sentence embeddings: what a teacher makes vectors of texts with, and losses between the vectors of both models.

[`SentenceModules`] reads the files of a teacher of sentence-transformers, computes the vectors of both models, and writes the
files of the student.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from transformers.utils import logging

from hf_pretrain.errors import InputError
from hf_pretrain.modeling.backbone import without_autocast
from hf_pretrain.modeling.losses import ExampleSum
from hf_pretrain.modeling.pooling import MODULES, SentenceModules

logger = logging.get_logger(__name__)


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
