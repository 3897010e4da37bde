"""The packer: documents back to back, cut into windows."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np


class Position(NamedTuple):
    """Where a token stands in a lane."""

    epoch: int
    sample: int
    """Number of its sample within the lane's epoch."""
    offset: int
    """Number of the token within its document."""


class Packer:
    """Cuts a stream of documents into windows of `max_length + 1` tokens.

    A window's last token is the next window's first, so that each token but the very first is predicted exactly once.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        self.tokens = 0
        """Tokens that wait for their window."""
        self._documents: deque[tuple[Position, np.ndarray]] = deque()

    def add(self, position: Position, tokens: np.ndarray) -> None:
        """Append a document, or the rest of one, that starts at `position`; uint16, not empty."""
        self._documents.append((position, tokens))
        self.tokens += len(tokens)

    @property
    def position(self) -> Position | None:
        """Where the next window's first token stands; None while no token waits."""
        return self._documents[0][0] if self._documents else None

    def window(self) -> np.ndarray | None:
        """The next window, uint16 [max_length + 1], or None if too few tokens wait."""
        if self.tokens <= self.max_length:
            return None
        window = np.empty(self.max_length + 1, dtype=np.uint16)
        filled = 0
        while True:
            position, tokens = self._documents[0]
            piece = tokens[: len(window) - filled]
            window[filled : filled + len(piece)] = piece
            filled += len(piece)
            if filled == len(window):
                break
            self._documents.popleft()
        kept = len(piece) - 1  # the last token of this window stays: it is the next one's first
        self._documents[0] = (position._replace(offset=position.offset + kept), tokens[kept:])
        self.tokens -= self.max_length
        return window
