"""The row packer: windows of whole rows for post-training, in which no row sees another and only completions are learned.

A row is one document: its question (the prompt), then its completion, which ends with `<|endoftext|>`. A row takes as many positions as its
document has tokens: it is read from an end of text on, as in generation, and predicts each of its own tokens. So a window is

    inputs   E q q c c c  E q c c  E E      E: end of text, q: question, c: completion
    targets  . . c c c E  . c c E  . .      .: IGNORED

and what belongs together is told by the inputs alone: each row begins with an end of text, and there is none within it.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from model.stream.packing import Documents
from model.tokenizer import END_OF_TEXT

IGNORED = 65_535
"""In place of a target that is not learned: a question's, or none at all behind the last row."""

GROUP = 256
"""Rows that are packed together: consecutive ones of a lane's epoch, from a multiple of this number on. A resume reads one group again."""


class Row(NamedTuple):
    """A document and where its completion begins."""

    tokens: np.ndarray
    """uint16, `<|endoftext|>` at the end."""
    completion: int
    """Number of the completion's first token."""


def rows_of(documents: Documents) -> Iterator[Row | None]:
    """Each document's row; None for one that is not to be learned: it is too long, or no question with an answer."""
    assert documents.completions is not None, "the reader was not asked for completions"
    for number, completion in enumerate(documents.completions.tolist()):
        odd = documents.odd.get(number)
        if odd is not None and (odd.too_long or odd.unanswered):
            yield None
        else:
            yield Row(documents.tokens[documents.starts[number] : documents.starts[number + 1]], completion)


def packed(rows: Sequence[Row], max_length: int, one_each: bool = False) -> list[np.ndarray]:
    """Windows that hold these rows, each once: uint16 [2, max_length], inputs and targets.

    The longest row first goes where it leaves the least room (best fit decreasing: Johnson 1974, "Fast algorithms for bin packing"); the
    windows come in the order of their first rows. `one_each`: a window for each row.
    """
    places = [[number] for number in range(len(rows))] if one_each else best_fit([len(row.tokens) for row in rows], max_length)
    return [_window((rows[number] for number in members), max_length) for members in places]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which of these go together, by number; the sum of none is beyond `capacity`."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []
    """What is left in each bin, and its number; sorted."""
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        at = bisect.bisect_left(room, (lengths[number], 0))
        if at == len(room):
            left, which = capacity, len(bins)
            bins.append([])
        else:
            left, which = room.pop(at)
        bins[which].append(number)
        bisect.insort(room, (left - lengths[number], which))
    return sorted(sorted(members) for members in bins)


def _window(rows: Iterable[Row], max_length: int) -> np.ndarray:
    window = np.full((2, max_length), END_OF_TEXT, dtype=np.uint16)
    inputs, targets = window
    targets[:] = IGNORED
    at = 0
    for row in rows:
        end = at + len(row.tokens)
        inputs[at + 1 : end] = row.tokens[:-1]
        targets[at + row.completion : end] = row.tokens[row.completion :]
        at = end
    return window


def count_read(windows: np.ndarray) -> int:
    """Targets of rows in windows [windows, 2, max_length], learned or not: all positions but those behind a window's last row."""
    last = (windows[:, 0] != END_OF_TEXT)[:, ::-1].argmax(axis=1)
    return int(windows.shape[0] * windows.shape[2] - last.sum())


def count_learned(windows: np.ndarray) -> int:
    """Targets that the loss is taken of."""
    return int(np.count_nonzero(windows[:, 1] != IGNORED))
