"""The packer: documents back to back, cut into windows."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class OddRows(NamedTuple):
    """How many training samples were out of the ordinary; see model/stream/reader.py for what is done with them."""

    empty_field: int = 0
    """A field of the text was null or empty."""
    not_utf8: int = 0
    """Bytes that are not UTF-8 were replaced."""
    end_of_text: int = 0
    """The text itself contains `<|endoftext|>`."""
    lost: int = 0
    """In a damaged part of a file, under `data.quarantine`."""
    too_long: int = 0
    """In post-training: no window holds it, so it is left out."""
    unanswered: int = 0
    """In post-training: the question or the answer is empty, so it is left out."""

    def plus(self, *others: OddRows) -> OddRows:
        """The sum of all."""
        return OddRows(*map(sum, zip(self, *others, strict=True)))


class Position(NamedTuple):
    """Where a token stands in a lane."""

    epoch: int = 0
    sample: int = 0
    """Number of its sample within the lane's epoch."""
    offset: int = 0
    """Number of the token within its document. In post-training the sample is a group's first, and this the window's number there."""
    odd: OddRows = OddRows()
    """Of the samples before this one, since the run began."""

    def as_list(self) -> list[int]:
        """For a state: [epoch, sample, offset, empty_field, not_utf8, end_of_text, lost, too_long, unanswered]."""
        return [self.epoch, self.sample, self.offset, *self.odd]

    @classmethod
    def from_list(cls, numbers: list[int]) -> Position:
        """What `as_list` gave."""
        epoch, sample, offset, *odd = numbers
        return cls(epoch, sample, offset, OddRows(*odd))


_START = Position()


@dataclass(frozen=True)
class Documents:
    """Some documents back to back."""

    tokens: np.ndarray
    """uint16; each document ends with `<|endoftext|>`."""
    starts: np.ndarray
    """int64 [documents + 1]: where each begins in `tokens`, and where the last one ends."""
    odd: dict[int, OddRows]
    """What was odd about the row, of those where something was, by their number here."""
    completions: np.ndarray | None = None
    """int64 [documents]: number of each document's first token of the completion; None where nobody asked."""
    first: Position = _START
    """Where the first token of the first document stands in its lane; the others follow sample by sample."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    def position(self, token: int) -> Position:
        """Where a token of these stands in the lane."""
        document = int(np.searchsorted(self.starts, token, side="right")) - 1
        odd = [oddity for number, oddity in self.odd.items() if number < document]
        return Position(
            self.first.epoch,
            self.first.sample + document,
            token - int(self.starts[document]),
            self.first.odd.plus(*odd) if odd else self.first.odd,
        )


class Place(NamedTuple):
    """A token among documents."""

    documents: Documents
    token: int

    @property
    def epoch(self) -> int:
        """The epoch it is read in."""
        return self.documents.first.epoch

    @property
    def position(self) -> Position:
        """Where it stands in its lane."""
        return self.documents.position(self.token)


class Packer:
    """Cuts a stream of documents into windows of `max_length + 1` tokens.

    A window's last token is the next window's first, so that each token but the very first is predicted exactly once.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self._waiting: deque[Documents] = deque()
        self._next = 0
        """The next window's first token, among the first of the waiting documents."""
        self._tokens = 0
        """Tokens from there on."""

    def add(self, documents: Documents, skipped: int = 0) -> None:
        """Append documents, not empty; the very first ones without their first `skipped` tokens."""
        if not self._waiting:
            self._next = skipped
        self._waiting.append(documents)
        self._tokens += len(documents.tokens) - skipped

    def window(self) -> tuple[np.ndarray, Place] | None:
        """The next window, uint16 [max_length + 1], and the place of the one after it; None if too few tokens wait."""
        if self._tokens <= self.max_length:
            return None
        first, stop = self._waiting[0].tokens, self._next + self.max_length
        if stop < len(first):
            window = first[self._next : stop + 1]
        else:
            pieces = [first[self._next :]]
            missing = self.max_length + 1 - len(pieces[0])
            while missing > 0:  # the last piece's last token stays: it is the next window's first
                self._waiting.popleft()
                pieces.append(self._waiting[0].tokens[:missing])
                missing -= len(pieces[-1])
            window, stop = np.concatenate(pieces), len(pieces[-1]) - 1
        self._next = stop
        self._tokens -= self.max_length
        return window, Place(self._waiting[0], stop)
