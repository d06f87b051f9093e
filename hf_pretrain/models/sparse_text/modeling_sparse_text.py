"""Sparse vectors as a model: a column for each word, and for a text how often it holds the word, times a weight.

In the shapes: B texts, L tokens, C columns.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from .configuration_sparse_text import SparseTextConfig


class SparseTextModel(PreTrainedModel):
    """One-hot vectors, counts of words, and TF-IDF.

    Args:
        config: The columns, and how words are counted.

    Attributes:
        weights: ``[hidden_size]``, the only parameter; it counts for the method "tfidf" alone.

    Source: Salton and Buckley 1988, "Term-weighting approaches in automatic text retrieval".
    """

    config_class = SparseTextConfig
    base_model_prefix = "model"
    _no_split_modules: list[str] = []  # noqa: RUF012
    # Makes `save_pretrained` write this file next to the weights.
    _auto_class = "AutoModel"

    def __init__(self, config: SparseTextConfig) -> None:
        super().__init__(config)
        self.weights = nn.Parameter(torch.empty(config.hidden_size))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is not self:
            super()._init_weights(module)
        elif not getattr(self.weights, "_is_hf_initialized", False):
            init.ones_(self.weights)

    @can_return_tuple
    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> BaseModelOutputWithPooling:
        """Return the vectors of tokens and texts.

        Args:
            input_ids: ``[B, L]``; padding and unknown words have no column.
            attention_mask: ``[B, L]``, 0 at tokens that do not count.

        Returns:
            `last_hidden_state`, sparse ``[B, L, C]``: the weight of each token in its column; and `pooler_output`, sparse
            ``[B, C]``: the vectors of the texts. Both are coalesced and in the type of the weights.
        """
        config, (num_texts, length) = self.config, input_ids.shape
        is_word_BL = input_ids >= config.first_word_id
        if attention_mask is not None:
            is_word_BL = is_word_BL & (attention_mask != 0)
        rows_N, positions_N = is_word_BL.nonzero(as_tuple=True)
        columns_N = input_ids[rows_N, positions_N] - config.first_word_id
        # In fp64, as scikit-learn computes.
        weights_C = self.weights.double()
        if config.method != "tfidf":
            weights_C = torch.ones_like(weights_C)
        tokens_BLC = torch.sparse_coo_tensor(
            torch.stack([rows_N, positions_N, columns_N]),
            weights_C[columns_N].to(self.weights.dtype),
            (num_texts, length, config.hidden_size),
            check_invariants=False,
            is_coalesced=True,
        )
        places_2N = torch.stack([rows_N, columns_N])
        counts_BC = torch.sparse_coo_tensor(
            places_2N,
            torch.ones_like(columns_N, dtype=torch.double),
            (num_texts, config.hidden_size),
            check_invariants=False,
        ).coalesce()
        (rows_M, columns_M), values_M = counts_BC.indices(), counts_BC.values()
        if config.method == "onehot":
            values_M = torch.ones_like(values_M)
        if config.sublinear_tf:
            values_M = values_M.log() + 1
        values_M = values_M * weights_C[columns_M]
        if config.method == "tfidf" if config.normalize is None else config.normalize:
            squares_B = torch.zeros(num_texts, dtype=torch.double, device=values_M.device)
            squares_B = squares_B.index_add(0, rows_M, values_M.square())
            # A text whose words all weigh nothing stays zero.
            values_M = values_M / squares_B.clamp(min=torch.finfo(torch.double).tiny).sqrt()[rows_M]
        texts_BC = torch.sparse_coo_tensor(
            counts_BC.indices(),
            values_M.to(self.weights.dtype),
            counts_BC.shape,
            check_invariants=False,
            is_coalesced=True,
        )
        return BaseModelOutputWithPooling(last_hidden_state=tokens_BLC, pooler_output=texts_BC)


__all__ = ["SparseTextModel"]
