"""What is known of a scored checkpoint. Apart from how it is found out: who only shows scores needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Scores:
    """A checkpoint's summary and, per item, what it comes from."""

    summary: dict[str, float]
    """Of the reporting half."""
    intervals: dict[str, tuple[float, float]]
    """95 %, clustered by article, of the summary's means and ratios, within what is possible; none where all items are of one article. Of
    shares that are 0 or 1 it is the exact one, as of so many observations as there are articles."""
    items: list[dict[str, Any]]
    """One row an item, both halves."""
    samples: list[dict[str, str]]
    """`prompt` and `text`: what it writes after each of the settings' prompts."""
