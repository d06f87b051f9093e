"""All text as one stream, cut into lanes: the input of models with a memory.

A lane is a row of the batch. A model that remembers the segment before must get, in the same row of the next batch,
the text that follows. So `LaneStream` cuts the stream into as many equal lanes as a batch has rows, and the n-th batch
holds the n-th window of every lane: `LaneDataset` for Transformer-XL, and `XLNetWindows`, whose window is a stretch
that is kept as memory and then two segments with their separators.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import datasets
import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from hf_pretrain.data import draws
from hf_pretrain.data.documents.token_store import TokenStore
from hf_pretrain.data.examples.epochs import DrawnDataset
from hf_pretrain.data.examples.packing import interleaved, share_room
from hf_pretrain.errors import InputError, check_range

_NUM_SPECIAL = 3


class LaneStream:
    """Documents, each followed by a separator, as one stream of tokens in equal lanes.

    Args:
        documents: Documents in the document schema (``input_ids``, ``word_starts``, ``sent_starts``).
        tokenizer: Gives the separator: ``eos_token``, or ``sep_token`` where there is none.
        num_lanes: Number of lanes: in training, the examples of a step over all devices.
        complete: Whether the lanes hold every token; the last ones may then be shorter or empty, as an evaluation
            wants it. Otherwise all are equally long, and the last tokens of the stream, fewer than lanes, are left out.

    Raises:
        InputError: If the tokenizer has no separator, or there are fewer tokens than lanes to train on.
    """

    def __init__(
        self,
        documents: datasets.Dataset,
        *,
        tokenizer: PreTrainedTokenizerBase,
        num_lanes: int,
        complete: bool = False,
    ) -> None:
        separator = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        if separator is None:
            raise InputError("the tokenizer has no eos_token and no sep_token to put between documents: add one")
        check_range(num_lanes, "[1, inf)", name="num_lanes")
        self.store = TokenStore(documents)
        self.separator = separator
        self.num_lanes = num_lanes
        self.complete = complete
        # Stream positions of the separators, one behind each document.
        self._ends = self.store.begins[1:] + np.arange(self.store.num_documents)
        self.lane_length = -(-self.num_tokens // num_lanes) if complete else self.num_tokens // num_lanes
        """Tokens of a lane; if the stream is complete, of all but the last ones."""
        if not self.lane_length:
            raise InputError(
                f"num_lanes={num_lanes}: the text has only {self.num_tokens} tokens; give more text or a smaller batch"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens of the stream, separators included."""
        return self.store.num_tokens + self.store.num_documents

    def read(self, lane: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the tokens of positions ``[start, stop)`` of a lane.

        Args:
            lane: Number of the lane.
            start: First position; -1 is the token before the lane: the last of the lane before it, or a separator.
            stop: Position after the last, at most ``lane_length``; tokens behind the text's end are left out.

        Returns:
            ``input_ids`` int32, ``word_starts`` bool and ``sent_starts`` bool, each of at most ``stop - start``.
        """
        assert 0 <= lane < self.num_lanes and -1 <= start <= stop <= self.lane_length
        begin = lane * self.lane_length
        return self.read_range(begin + start, begin + stop)

    def read_range(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the tokens of positions ``[start, stop)`` of the whole stream, as `read` does; -1 is a separator."""
        stop = min(stop, self.num_tokens)
        if start >= stop:
            return np.empty(0, np.int32), np.empty(0, np.bool_), np.empty(0, np.bool_)
        first, last = np.searchsorted(self._ends, [start, stop])
        separators = self._ends[first:last] - start
        if start == -1:
            separators = np.concatenate([[0], separators])
        is_text = np.ones(stop - start, dtype=np.bool_)
        is_text[separators] = False
        ids = np.full(len(is_text), self.separator, dtype=np.int32)
        words, sentences = np.ones_like(is_text), np.ones_like(is_text)
        low, high = max(start, 0) - first, stop - last
        if low < high:
            ids[is_text], words[is_text] = self.store.read(low, high)
            sentences[is_text] = self.store.sent_starts(low, high)
        return ids, words, sentences


class LaneDataset(Dataset[dict[str, Any]]):
    """Windows of a stream with their next tokens as labels; index ``time * num_lanes + lane``, to be read in order.

    The label of the last token of a window is the first token of the next one, and that of the separator before the text is
    the text's first token: N tokens have N targets, whatever the window and the number of lanes.

    Args:
        stream: The lanes.
        window: Tokens of a window; the last one of a lane, or of a document, may be shorter.
        reset_at_documents: Whether a window ends with its document, and the next one begins without memory. Lanes are then
            equal in windows instead of tokens.

    Raises:
        InputError: If the lanes of the text to train on are shorter than a window.
    """

    def __init__(self, stream: LaneStream, *, window: int, reset_at_documents: bool = False) -> None:
        check_range(window, "[1, inf)", name="window", hint="give the length of a segment in tokens")
        self.stream = stream
        self.window = window
        self.reset_at_documents = reset_at_documents
        if reset_at_documents:
            # A document's separator belongs to it.
            counts = -(-(np.diff(stream.store.begins) + 1) // window)
            # Number of each document's first window and, at the end, of all windows.
            self._first_windows = np.concatenate([[0], np.cumsum(counts)])
            total = int(self._first_windows[-1])
            self.num_windows = -(-total // stream.num_lanes) if stream.complete else total // stream.num_lanes
            is_short = self.num_windows == 0
        else:
            self.num_windows = -(-stream.lane_length // window)
            is_short = stream.lane_length < window
        if is_short and not stream.complete:
            raise InputError(
                f"{stream.num_tokens} tokens in {stream.num_lanes} lanes do not fill windows of {window}: "
                "give more text, a smaller batch (all devices and accumulation steps count) or shorter segments"
            )

    @property
    def num_lanes(self) -> int:
        """Number of lanes, the examples of a step."""
        return self.stream.num_lanes

    def __len__(self) -> int:
        """Return the number of windows of all lanes."""
        return self.num_windows * self.num_lanes

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one window.

        Returns:
            ``input_ids`` and ``labels``, ``int32 [n]`` with n at most ``window`` and 0 where a lane has ended; ``lane``, its
            number; ``memory_reset``, whether nothing before this window is to be remembered.

        Raises:
            IndexError: If there is no such window.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} windows")
        time, lane = divmod(index, self.num_lanes)
        start, stop, is_new = (
            self._document_window(time, lane) if self.reset_at_documents else self._window(time, lane)
        )
        ids, _, _ = self.stream.read_range(start - 1, stop)
        return {"input_ids": ids[:-1], "labels": ids[1:], "lane": lane, "memory_reset": is_new or time == 0}

    def _window(self, time: int, lane: int) -> tuple[int, int, bool]:
        """Return the stream positions of the targets of a window, and whether a document begins with it."""
        length = self.stream.lane_length
        start = time * self.window
        return lane * length + start, lane * length + min(start + self.window, length), False

    def _document_window(self, time: int, lane: int) -> tuple[int, int, bool]:
        number = lane * self.num_windows + time
        if number >= self._first_windows[-1]:
            return self.stream.num_tokens + 1, self.stream.num_tokens + 1, True
        document = int(np.searchsorted(self._first_windows, number, side="right")) - 1
        skipped = number - int(self._first_windows[document])
        # Each document before this one has added a separator.
        begin, end = (self.stream.store.begins[document : document + 2] + [document, document + 1]).tolist()
        start = begin + skipped * self.window
        return start, min(start + self.window, end), skipped == 0

    def __repr__(self) -> str:
        """Show how the stream is cut."""
        return f"{type(self).__name__}({self.num_windows} windows of {self.window} tokens in {self.num_lanes} lanes)"


class BidirectionalLaneDataset(LaneDataset):
    """Windows of a stream for two models at once, one of which reads each lane from its end to its beginning.

    At a time step the backward model is as far from the end of its lane as the forward one is from the beginning. Each goes on
    where it stopped, and each has every token as a target once. Before the end of the text stands a separator.

    Args:
        stream: The lanes.
        window: Tokens of a window; the last one of a lane, for either direction, may be shorter.
    """

    def __init__(self, stream: LaneStream, *, window: int) -> None:
        super().__init__(stream, window=window)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one window of each direction.

        Returns:
            As of [`LaneDataset`], and ``backward_input_ids`` and ``backward_labels``, ``int32 [n]`` in the order in which they
            are read: from right to left, each token with the one on its left as its label.

        Raises:
            IndexError: If there is no such window.
        """
        example = super().__getitem__(index)
        time, lane = divmod(index, self.num_lanes)
        begin = lane * self.stream.lane_length
        end = min(begin + self.stream.lane_length, self.stream.num_tokens) - time * self.window
        start = max(begin, end - self.window)
        ids = self.stream.read_range(start, end + 1)[0] if start < end else np.empty(0, np.int32)
        if start < end == self.stream.num_tokens:
            ids = np.append(ids, np.int32(self.stream.separator))
        return example | {
            "time": time,
            "backward_input_ids": ids[:0:-1],
            "backward_labels": ids[-2::-1] if len(ids) else ids,
        }


class _Tokens(NamedTuple):
    """A stretch of a lane in the lane's direction: `[n]` each. A border is where a sentence begins, or ended."""

    ids: np.ndarray
    word_starts: np.ndarray
    is_border: np.ndarray


class XLNetWindows(DrawnDataset):
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
        super().__init__()

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

    def _segments(self, lane: int, start: int, uniforms: np.ndarray) -> tuple[_Tokens, _Tokens, _Tokens]:
        """Return the first stretch, A and B of the window at `start`, given draws for B's kind, A's end and B's start."""
        begin, room = start + self.reuse_len, self.text_length
        # A and B each take at most the room for both, so text beyond twice that changes nothing.
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
        a_length, b_length = share_room(a_length, len(b.ids), room=room)
        return first, _cut(text, 0, a_length), _cut(b, 0, b_length)

    def _elsewhere(self, lane: int, length: int, uniform: float) -> _Tokens:
        """Return at least `length` tokens from anywhere in a lane, stretched to sentence borders that are not too far."""
        room = self.text_length
        begin = int(uniform * (self.stream.lane_length - length + 1))
        low = max(begin - room, 0)
        tokens = self._read(lane, low, begin + length + room)
        borders = np.flatnonzero(tokens.is_border)
        before, after = borders[borders <= begin - low], borders[borders >= begin + length - low]
        start = int(before[-1]) if before.size else begin - low
        return _cut(tokens, start, int(after[0]) if after.size else len(tokens.ids))

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
        lengths = [len(first.ids) + len(a.ids) + 1, len(b.ids) + 1, 1]
        special = ((), (), (self.sep_id,), (self.sep_id, self.cls_id))
        example = interleaved(special, [tokens[:2] for tokens in (first, a, b)])
        return example | {"token_type_ids": np.repeat(np.arange(3), lengths)}

    def __repr__(self) -> str:
        """Show how many windows there are."""
        length = self.reuse_len + self.text_length + _NUM_SPECIAL
        return f"{type(self).__name__}({self.num_windows} windows of {length} tokens in {self.num_lanes} lanes)"


def _cut(tokens: _Tokens, start: int, stop: int) -> _Tokens:
    return _Tokens(*(values[start:stop] for values in tokens))
