"""The parts of ELMo: a word from its characters, and an LSTM of one direction.

In the shapes: B rows, T words, K characters of a word, P width of a direction, C cells.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .configuration_elmo import ElmoConfig

NUM_CHARACTERS = 262
"""Bytes, the marks of beginning and end of sentences and words, padding; 0 is a word that is not there."""


class Highway(nn.Module):
    """`g * relu(W x) + (1 - g) * x`, where the gate g is near 0 in the beginning.

    Source: Srivastava et al., "Highway networks" (2015).
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gate = nn.Linear(size, size)
        self.transform = nn.Linear(size, size)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the mixture, of the shape of the inputs ``[..., size]``."""
        gate = self.gate(inputs).sigmoid()
        mixed: torch.Tensor = gate * F.relu(self.transform(inputs)) + (1 - gate) * inputs
        return mixed


class CharacterEmbedding(nn.Module):
    """Vectors of words from their characters: convolutions, the maximum over the characters, highway layers, a projection.

    Args:
        config: Sizes. With a vocabulary, the characters of its words lie in the buffer `characters`, ``int32 [V, K]``.

    Source: Peters et al. (2018), section 3.4; Kim et al., "Character-Aware Neural Language Models" (2016).
    """

    def __init__(self, config: ElmoConfig) -> None:
        super().__init__()
        self.num_embeddings = config.vocab_size
        self.activation = F.relu if config.character_activation == "relu" else torch.tanh
        self.table = nn.Embedding(NUM_CHARACTERS, config.character_embedding_size, padding_idx=0)
        filters = config.filters or []
        self.convolutions = nn.ModuleList(
            [nn.Conv1d(config.character_embedding_size, number, width) for width, number in filters]
        )
        total = sum(number for _, number in filters)
        self.highways = nn.ModuleList([Highway(total) for _ in range(config.num_highway_layers)])
        self.projection = nn.Linear(total, config.projection_size)
        if config.vocab_size:
            empty = torch.zeros(config.vocab_size, config.max_characters, dtype=torch.int32)
            self.register_buffer("characters", empty)

    def forward(
        self, input_ids: torch.Tensor | None = None, character_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the vectors ``[..., P]`` of words, given as ids ``[...]`` or as characters ``[..., K]``."""
        if character_ids is None:
            assert input_ids is not None
            table: Any = self.characters
            character_ids = table[input_ids].long()
        vectors_NEK = self.table(character_ids.flatten(0, -2)).transpose(1, 2)
        pooled = [self.activation(convolution(vectors_NEK).amax(-1)) for convolution in self.convolutions]
        words = torch.cat(pooled, dim=-1)
        for highway in self.highways:
            words = highway(words)
        projected: torch.Tensor = self.projection(words)
        return projected.unflatten(0, character_ids.shape[:-1])


class TokenEmbedding(nn.Embedding):
    """Vectors of tokens from a table, called as [`CharacterEmbedding`] is."""

    def __init__(self, config: ElmoConfig) -> None:
        super().__init__(config.vocab_size, config.projection_size, padding_idx=config.pad_token_id)

    def forward(
        self, input_ids: torch.Tensor | None = None, character_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the vectors ``[..., P]`` of tokens ``[...]``; characters are of no use here."""
        assert input_ids is not None
        return super().forward(input_ids)


class ElmoLSTM(nn.LSTM):
    """One layer of one direction, which reads from left to right: LSTM with a projection, and with limits if there are any.

    Without limits the layer is one fused call. With them each step is computed here: no kernel clips inside the recurrence.

    Args:
        config: Sizes and limits.

    Source: Sak et al., "Long short-term memory based recurrent neural network architectures" (2014).
    """

    def __init__(self, config: ElmoConfig) -> None:
        super().__init__(config.projection_size, config.cell_size, proj_size=config.projection_size, batch_first=True)
        self.cell_clip, self.projection_clip = config.cell_clip, config.projection_clip

    def read(
        self, inputs_BTP: torch.Tensor, state_BS: torch.Tensor | None, lengths_B: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Read words.

        Args:
            inputs_BTP: ``[B, T, P]``, padding last.
            state_BS: ``[B, P + C]`` the last output and the cells; zeros if None.
            lengths_B: ``[B]`` words of each row. None: all are T long, or the new state is of no use.

        Returns:
            The outputs ``[B, T, P]``, arbitrary at padding, and the new state.
        """
        if state_BS is None:
            state_BS = inputs_BTP.new_zeros(len(inputs_BTP), self.proj_size + self.hidden_size)
        if self.cell_clip is None and self.projection_clip is None:
            return self._read_at_once(inputs_BTP, state_BS, lengths_B)
        return self._read_in_steps(inputs_BTP, state_BS, lengths_B)

    def _read_at_once(
        self, inputs_BTP: torch.Tensor, state_BS: torch.Tensor, lengths_B: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        state = tuple(part.unsqueeze(0).contiguous() for part in state_BS.split([self.proj_size, self.hidden_size], 1))
        length = inputs_BTP.shape[1]
        if lengths_B is None:
            outputs_BTP, (output_1BP, cell_1BC) = self(inputs_BTP, state)
            return outputs_BTP, torch.cat([output_1BP[0], cell_1BC[0]], dim=1)
        # The lengths have to be on the host. No row of a packed batch is empty: one that is keeps its state.
        packed = pack_padded_sequence(inputs_BTP, lengths_B.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
        packed_outputs, (output_1BP, cell_1BC) = self(packed, state)
        outputs_BTP, _ = pad_packed_sequence(packed_outputs, batch_first=True, total_length=length)
        new_BS = torch.cat([output_1BP[0], cell_1BC[0]], dim=1)
        return outputs_BTP, torch.where(lengths_B[:, None] > 0, new_BS, state_BS)

    def _read_in_steps(
        self, inputs_BTP: torch.Tensor, state_BS: torch.Tensor, lengths_B: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = cast(list[torch.Tensor], self.all_weights[0])
        # Not sliced: the gradient of a slice is as large as all steps together.
        gates = F.linear(inputs_BTP, weight_ih, bias_ih + bias_hh).unbind(1)
        output_BP, cell_BC = state_BS.split([self.proj_size, self.hidden_size], 1)
        outputs = []
        for step, gates_BG in enumerate(gates):
            entered, forgotten, new, shown = (gates_BG + output_BP @ weight_hh.T).chunk(4, dim=1)
            new_cell_BC = _clipped(forgotten.sigmoid() * cell_BC + entered.sigmoid() * new.tanh(), self.cell_clip)
            new_output_BP = _clipped((shown.sigmoid() * new_cell_BC.tanh()) @ weight_hr.T, self.projection_clip)
            if lengths_B is not None:
                is_word_B1 = (step < lengths_B)[:, None]
                new_cell_BC = torch.where(is_word_B1, new_cell_BC, cell_BC)
                new_output_BP = torch.where(is_word_B1, new_output_BP, output_BP)
            cell_BC, output_BP = new_cell_BC, new_output_BP
            outputs.append(output_BP)
        return torch.stack(outputs, dim=1), torch.cat([output_BP, cell_BC], dim=1)


def _clipped(values: torch.Tensor, limit: float | None) -> torch.Tensor:
    return values if limit is None else values.clamp(-limit, limit)
