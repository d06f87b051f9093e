"""All text as one stream, cut into lanes that are read side by side: the input of models with a memory.

A model that remembers the segment before must get, in the same row of the next batch, the text that follows. So the stream is
cut into as many equal parts, the lanes, as a batch has rows, and the n-th batch holds the n-th window of every lane.
"""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from hf_pretrain.data.token_store import TokenStore
from hf_pretrain.errors import InputError


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
        if num_lanes < 1:
            raise InputError(f"num_lanes={num_lanes} must be positive")
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
            stop: Position after the last, at most ``lane_length``; what lies behind the text's end is left out.

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
        places = self._ends[first:last] - start
        if start == -1:
            places = np.concatenate([[0], places])
        is_text = np.ones(stop - start, dtype=np.bool_)
        is_text[places] = False
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
        if window < 1:
            raise InputError(f"window={window} must be positive: give the length of a segment in tokens")
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
        start, stop, is_new = self._document_window(time, lane) if self.reset_at_documents else self._place(time, lane)
        ids, _, _ = self.stream.read_range(start - 1, stop)
        return {"input_ids": ids[:-1], "labels": ids[1:], "lane": lane, "memory_reset": is_new or time == 0}

    def _place(self, time: int, lane: int) -> tuple[int, int, bool]:
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
