"""Static vectors as a model: a table with a row a token, and the mean of the rows for a text.

The table is the bare parameter `embeddings`: under this key sentence-transformers and model2vec read it from the folder too.
`save_pretrained` writes the files that they look for beside it. In the shapes: B texts, L tokens, D width.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from .configuration_static_embedding import StaticEmbeddingConfig

_NORMALIZE = "1_Normalize"


class StaticEmbeddingModel(PreTrainedModel):
    """Vectors of tokens, and of texts as their mean.

    Args:
        config: Sizes, and whether the vector of a text has length one.

    Attributes:
        embeddings: ``[vocab_size, hidden_size]``, the only parameter.

    Source: Arora et al. 2017, "A Simple but Tough-to-Beat Baseline for Sentence Embeddings" (a weighted mean of word vectors;
    here weights are multiplied into the rows).
    """

    config_class = StaticEmbeddingConfig
    base_model_prefix = "model"
    _no_split_modules: list[str] = []  # noqa: RUF012
    # Makes `save_pretrained` write this file next to the weights.
    _auto_class = "AutoModel"

    def __init__(self, config: StaticEmbeddingConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is not self:
            super()._init_weights(module)
        elif not getattr(self.embeddings, "_is_hf_initialized", False):
            init.normal_(self.embeddings, std=self.config.initializer_range)
            for token in (self.config.pad_token_id, self.config.unk_token_id):
                if token is not None and 0 <= token < len(self.embeddings):
                    self.embeddings[token].zero_()

    def get_input_embeddings(self) -> nn.Module:
        """Return a module whose `weight` is the table; it is made anew at each call, so hooks on it do not last."""
        # Not a submodule: the table would have a second name in the state.
        table = nn.Embedding(self.embeddings.shape[0], self.embeddings.shape[1], device="meta")
        table.weight = self.embeddings
        return table

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Take the `weight` of a module as the table."""
        weight: Any = value.weight
        self.embeddings = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        """Return the vectors of tokens and texts.

        Args:
            input_ids: ``[B, L]``.
            attention_mask: ``[B, L]``, 0 at tokens that do not count. Padding never does.
            inputs_embeds: ``[B, L, D]`` in place of `input_ids`.
            output_hidden_states: Whether the output has `hidden_states`, which are the vectors alone.

        Returns:
            `last_hidden_state`, ``[B, L, D]``, and `pooler_output`, ``[B, D]``: the mean over the tokens that count, zero for a
            text without any.

        Raises:
            ValueError: If not exactly one of `input_ids` and `inputs_embeds` is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        states_BLD = inputs_embeds
        if states_BLD is None:
            assert input_ids is not None, "one of the two is given"
            states_BLD = F.embedding(input_ids, self.embeddings)
        counts_BL = None if attention_mask is None else attention_mask != 0
        if input_ids is not None and self.config.pad_token_id is not None:
            is_token_BL = input_ids != self.config.pad_token_id
            counts_BL = is_token_BL if counts_BL is None else counts_BL & is_token_BL
        pooled_BD = _mean(states_BLD, counts_BL)
        if self.config.normalize:
            pooled_BD = F.normalize(pooled_BD, dim=-1)
        return BaseModelOutputWithPooling(
            last_hidden_state=states_BLD,
            pooler_output=pooled_BD.to(states_BLD.dtype),
            hidden_states=(states_BLD,) if output_hidden_states or self._returns_states() else None,
        )

    def _returns_states(self) -> bool:
        return bool(getattr(self.config, "output_hidden_states", False))

    def save_pretrained(self, save_directory: Any, is_main_process: bool = True, **kwargs: Any) -> None:
        """Save the folder, with the files by which sentence-transformers opens it.

        Args:
            save_directory: The folder.
            is_main_process: Whether this process writes.
            **kwargs: As of `PreTrainedModel.save_pretrained`.
        """
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if not is_main_process:
            return
        kinds = {"": "StaticEmbedding"} | ({_NORMALIZE: "Normalize"} if self.config.normalize else {})
        modules = [
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for number, (path, kind) in enumerate(kinds.items())
        ]
        contents: dict[str, Any] = {
            "modules.json": modules,
            "config_sentence_transformers.json": {"similarity_fn_name": "cosine"},
        }
        if self.config.normalize:
            # A folder without a file is lost on the Hub.
            keys = ("module_input_name", "module_output_name")
            contents[f"{_NORMALIZE}/config.json"] = dict.fromkeys(keys, "sentence_embedding")
        for name, content in contents.items():
            path = Path(save_directory, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _mean(states_BLD: torch.Tensor, counts_BL: torch.Tensor | None) -> torch.Tensor:  # noqa: N803
    """Return the mean over the tokens that count, in fp32, with the bits of sentence-transformers' own."""
    (num_texts, length, width), device = states_BLD.shape, states_BLD.device
    nowhere = num_texts * length
    rows_N = torch.arange(nowhere, device=device)
    if counts_BL is not None:
        rows_N = torch.where(counts_BL.flatten(), rows_N, nowhere)
    # The row behind the last stands for what does not count: padding may hold values that are not a number, and is not read.
    table_RD = F.pad(states_BLD.float().reshape(-1, width), (0, 0, 0, 1))
    offsets_B = torch.arange(num_texts, device=device) * length
    return F.embedding_bag(rows_N, table_RD, offsets_B, mode="mean", padding_idx=nowhere)


__all__ = ["StaticEmbeddingModel"]
