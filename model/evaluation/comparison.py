"""Is one checkpoint better than another? Paired on the same items, and rows of one article count as one observation.

The champion rule: a challenger takes over if it needs significantly fewer bits for the gold answers of the choosing half, and its answers'
format is not worse beyond a margin. What it promises, and what it was measured to do: docs/architecture.md, "Evaluation and the champion".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from model.evaluation.intervals import Interval, clustered

if TYPE_CHECKING:
    from model.evaluation.scores import Scores

FORMAT_MARGIN = 0.05
"""How much worse a challenger's format adherence may be (share of the questions, the point estimate).

Of the estimate and not of its interval: 256 questions of which one in ten changes sides know it to 2 points, so an interval that had to lie
above -5 points would turn away three of ten challengers whose format is as good. A challenger that is truly 10 points worse passes in one
of a hundred.
"""
FALSE_PROMOTION = 0.05
"""The largest probability with which any of several checkpoints that are no better may take over in one evaluation."""


@dataclass(frozen=True)
class Evidence:
    """What comparing looks at of one checkpoint's scores. Two of one evaluation set have the same items in the same order."""

    ids: tuple[str, ...]
    """The items of the choosing half."""
    articles: tuple[str, ...]
    answer_bits: np.ndarray
    answer_bytes: np.ndarray
    asked: tuple[str, ...]
    """The questions that were answered."""
    well_formed: np.ndarray

    @classmethod
    def of(cls, scores: Scores) -> Evidence:
        """From a row an item."""
        choose = [row for row in scores.items if row["half"] == "choose"]
        asked = [row for row in scores.items if row["well_formed"] is not None]
        return cls(
            ids=tuple(row["id"] for row in choose),
            articles=tuple(row["article"] for row in choose),
            answer_bits=np.array([row["answer_bits"] for row in choose], dtype=np.float64),
            answer_bytes=np.array([row["answer_bytes"] for row in choose], dtype=np.float64),
            asked=tuple(row["id"] for row in asked),
            well_formed=np.array([row["well_formed"] for row in asked], dtype=np.float64),
        )


@dataclass(frozen=True)
class Verdict:
    """Whether the challenger takes over, and why, in a sentence for people."""

    promoted: bool
    reason: str


def confidence(challengers: int) -> float:
    """The level of the interval that has to lie below zero: 95 %, and from three challengers on what keeps the probability that any of them
    takes over by luck at `FALSE_PROMOTION` (Bonferroni; one end of the interval counts)."""
    return max(0.95, 1 - 2 * FALSE_PROMOTION / max(1, challengers))


def challenge(challenger: Evidence, incumbent: Evidence, challengers: int = 1) -> Verdict:
    """The champion rule. `challengers`: how many checkpoints compete with the incumbent in this evaluation."""
    assert (challenger.ids, challenger.asked) == (incumbent.ids, incumbent.asked), "one evaluation set, one list of items"
    if len(set(challenger.articles)) < 2 or not challenger.answer_bytes.sum():
        return Verdict(False, f"stays: the answers of {len(challenger.ids)} items of fewer than two articles, or empty ones, tell nothing")
    level = confidence(challengers)
    interval = difference(challenger.answer_bits, incumbent.answer_bits, challenger.answer_bytes, challenger.articles)
    wider = interval.at(level)
    shown = f"{interval.mean:+.4f} bits per byte of gold answer (95 % interval {interval.low:+.4f} to {interval.high:+.4f})"
    if interval.high >= 0:
        return Verdict(False, f"stays: not significantly better, {shown}")
    if wider.high >= 0:
        why = f"among {challengers} challengers luck may do that ({level:.2%} interval {wider.low:+.4f} to {wider.high:+.4f})"
        return Verdict(False, f"stays: not significantly better, {shown}: {why}")
    before, now = incumbent.well_formed.mean(), challenger.well_formed.mean()
    # Counted in questions: 0.90 - 0.95 is no less than -0.05 for a reader, whatever it is for a computer.
    if round(float(incumbent.well_formed.sum() - challenger.well_formed.sum()), 6) > FORMAT_MARGIN * len(challenger.asked):
        fell = f"format adherence fell from {before:.0%} to {now:.0%}, by more than {FORMAT_MARGIN:.0%} of the questions"
        return Verdict(False, f"stays: better at {shown}, but {fell}")
    return Verdict(True, f"takes over: {shown}")


def difference(
    ours: Sequence[float] | np.ndarray,
    theirs: Sequence[float] | np.ndarray,
    weights: Sequence[float] | np.ndarray,
    articles: Sequence[str],
) -> Interval:
    """Ours minus theirs, sum over sum of the weights (bytes; ones give the mean), with its 95 % interval, clustered by article.

    Raises:
        ValueError: there are fewer than two articles, or the weights sum to nothing.
    """
    return clustered(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64), weights, articles)
