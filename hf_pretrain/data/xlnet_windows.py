"""XLNet's examples: a stretch of a lane to be kept as memory, then two segments with their separators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_pretrain.data import draws
from hf_pretrain.data.epochs import EpochDataset
from hf_pretrain.data.lanes import LaneStream
from hf_pretrain.errors import InputError

_NUM_SPECIAL = 3


class _Tokens(NamedTuple):
    """A stretch of a lane in the lane's direction: `[n]` each. A border is where a sentence begins, or ended."""

    ids: np.ndarray
    word_starts: np.ndarray
    is_border: np.ndarray


class XLNetWindows(EpochDataset):
    """Windows over lanes: `reuse_len` tokens, then A SEP B SEP CLS; index `time * num_lanes + lane`, read in order.

    A follows on the first tokens and ends at a sentence border. Half of the time B follows on A, else it is drawn from
    anywhere in the lane and stretched to sentence borders; the longer of the two is cut on its right until both fit. The
    next window of the lane begins `reuse_len` tokens further on: what stood in A is read again, and memory of the
    first `reuse_len` tokens of each window is memory of the lane without a gap. Cuts and draws are keyed by seed,
    epoch and window.

    Args:
        stream: The lanes.
        tokenizer: Gives the separator and the classification token.
        window: Tokens of a window.
        reuse_len: Tokens of its first stretch; None for half the window, rounded up.
        bidirectional: Whether the lanes are read twice, forwards and then, as many lanes again, backwards.
        seed: Seed of the run.

    Raises:
        InputError: If the tokenizer lacks a token, or lengths or lanes are too short.

    Source:
        `_split_a_and_b` and `create_tfrecords` of the official `data_utils.py`; XLNet (Yang et al. 2019, section 2.5).
    """

    def __init__(
        self,
        stream: LaneStream,
        *,
        tokenizer: PreTrainedTokenizerBase,
        window: int = 512,
        reuse_len: int | None = None,
        bidirectional: bool = False,
        seed: int = 0,
    ) -> None:
        self.sep_id, self.cls_id = tokenizer.sep_token_id, tokenizer.cls_token_id
        if self.sep_id is None or self.cls_id is None:
            raise InputError(
                f"tokenizer={type(tokenizer).__name__} has no sep_token or no cls_token, which stand around the segments: "
                "add both with tokenizer.add_special_tokens"
            )
        assert not stream.complete, "lanes of a complete stream are not equally long"
        self.stream = stream
        self.reuse_len = (window + 1) // 2 if reuse_len is None else reuse_len
        self.text_length = window - self.reuse_len - _NUM_SPECIAL
        if self.reuse_len < 1 or self.text_length < 2:
            raise InputError(
                f"window={window} leaves {self.text_length} tokens for two segments after "
                f"reuse_len={self.reuse_len} and three special tokens: give a longer window"
            )
        self.num_lanes = stream.num_lanes * (2 if bidirectional else 1)
        self.bidirectional = bidirectional
        self.seed = seed
        room = stream.lane_length - self.reuse_len - self.text_length
        if room < 0:
            raise InputError(
                f"window={window} does not fit into lanes of {stream.lane_length} tokens: give more text, "
                f"fewer lanes than {stream.num_lanes} (a smaller batch over all devices) or a shorter window"
            )
        self.num_windows = room // self.reuse_len + 1
        # The windows of an epoch are not those of another, so there are none to wrap.
        self.base = self

    def __len__(self) -> int:
        """Return the number of windows of all lanes."""
        return self.num_windows * self.num_lanes

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the window of an index, which may carry its epoch.

        Returns:
            `input_ids` int32, `word_starts` bool and `token_type_ids` int64 (0 for the first stretch, A and its
            separator, 1 for B and its separator, 2 for the classification token), each `[window]`; `lane`;
            `memory_reset`, True for the first window of a lane; `backward`, if the lanes are bidirectional; `example_id`
            and `epoch`.
        """
        keys = self._locate(index)
        row = keys["example_id"]
        time, lane = divmod(row, self.num_lanes)
        start = time * self.reuse_len
        window_keys = draws.row_keys([row], seed=self.seed, epoch=keys["epoch"], stream="xlnet_window")
        first, a, b = self._segments(lane, start, draws.uniforms(window_keys, 3)[0])
        example = self._joined(first, a, b) | {"lane": lane, "memory_reset": time == 0}
        if self.bidirectional:
            example["backward"] = lane >= self.stream.num_lanes
        return example | keys

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return the windows of a batch of indices."""
        return [self[index] for index in indices]

    def _segments(self, lane: int, start: int, uniforms: np.ndarray) -> tuple[_Tokens, _Tokens, _Tokens]:
        """Return the first stretch, A and B of the window at `start`, given draws for B's kind, A's end and B's place."""
        begin, room = start + self.reuse_len, self.text_length
        # A and B each take at most the room for both, so what lies beyond twice that changes nothing.
        tokens = self._read(lane, start, begin + 2 * room)
        first, text = _cut(tokens, 0, self.reuse_len), _cut(tokens, self.reuse_len, len(tokens.ids))
        borders = np.flatnonzero(text.is_border)
        cuts = borders[(borders > 0) & (borders < room)]
        beyond = borders[borders >= room]
        end = int(beyond[0]) if beyond.size else len(text.ids)
        a_length = int(cuts[int(uniforms[1] * len(cuts))]) if cuts.size else end
        if cuts.size and uniforms[0] >= 0.5:
            b = _cut(text, a_length, end)
        else:
            b = self._elsewhere(lane, max(1, room - a_length), uniforms[2])
        a_length = min(a_length, max(room - len(b.ids), -(-room // 2)))
        return first, _cut(text, 0, a_length), _cut(b, 0, room - a_length)

    def _elsewhere(self, lane: int, length: int, uniform: float) -> _Tokens:
        """Return at least `length` tokens from anywhere in a lane, stretched to sentence borders that are not too far."""
        room = self.text_length
        begin = int(uniform * (self.stream.lane_length - length + 1))
        low = max(begin - room, 0)
        tokens = self._read(lane, low, begin + length + room)
        borders = np.flatnonzero(tokens.is_border)
        before, after = borders[borders <= begin - low], borders[borders >= begin + length - low]
        return _cut(
            tokens,
            int(before[-1]) if before.size else begin - low,
            int(after[0]) if after.size else len(tokens.ids),
        )

    def _read(self, lane: int, start: int, stop: int) -> _Tokens:
        """Read a lane in its direction, up to its end; the first token of the lane is a border."""
        length = self.stream.lane_length
        stop = min(stop, length)
        if lane < self.stream.num_lanes:
            tokens = _Tokens(*self.stream.read(lane, start, stop))
        else:
            # Backwards, a border is behind the token before which a sentence begins: one more is read.
            low, high = length - stop, length - start
            ids, words, begins = self.stream.read(lane - self.stream.num_lanes, low, min(high + 1, length))
            num_tokens = high - low
            begins = np.append(begins[1:], True)[:num_tokens]
            tokens = _Tokens(ids[:num_tokens][::-1], words[:num_tokens][::-1], begins[::-1])
        return tokens._replace(is_border=np.append(True, tokens.is_border[1:])) if start == 0 else tokens

    def _joined(self, first: _Tokens, a: _Tokens, b: _Tokens) -> dict[str, Any]:
        special = np.ones(1, dtype=np.bool_)
        lengths = [len(first.ids) + len(a.ids) + 1, len(b.ids) + 1, 1]
        return {
            "input_ids": np.concatenate([first.ids, a.ids, [self.sep_id], b.ids, [self.sep_id, self.cls_id]]).astype(
                np.int32
            ),
            "word_starts": np.concatenate(
                [first.word_starts, a.word_starts, special, b.word_starts, special, special]
            ),
            "token_type_ids": np.repeat(np.arange(3), lengths),
        }

    def __repr__(self) -> str:
        """Show how many windows there are."""
        length = self.reuse_len + self.text_length + _NUM_SPECIAL
        return f"{type(self).__name__}({self.num_windows} windows of {length} tokens in {self.num_lanes} lanes)"


def _cut(tokens: _Tokens, start: int, stop: int) -> _Tokens:
    return _Tokens(*(values[start:stop] for values in tokens))
