"""Is one checkpoint better than another? Paired on the same items, and rows of one article count as one observation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z_95 = 1.959963984540054
FORMAT_MARGIN = 0.05
"""How much worse a challenger's format adherence may be (share of the questions)."""


@dataclass(frozen=True)
class Interval:
    """A mean difference and its 95 % interval."""

    mean: float
    low: float
    high: float
    clusters: int


def paired_difference(challenger: Sequence[float], incumbent: Sequence[float], articles: Sequence[str]) -> Interval:
    """Mean of challenger - incumbent over the items, with a 95 % interval from the cluster-robust standard error.

    With G articles, the variance of the mean is G/(G-1) * sum over articles of (sum of the article's deviations)^2 / n^2
    (Miller 2024, "Adding error bars to evals", section 2.2, with the usual small-sample factor).

    Raises:
        ValueError: the three differ in length, or there are fewer than two articles.
    """
    differences = np.asarray(challenger, dtype=np.float64) - np.asarray(incumbent, dtype=np.float64)
    names, cluster = np.unique(np.asarray(articles, dtype=object).astype(str), return_inverse=True)
    if len(names) < 2 or len(cluster) != len(differences):
        raise ValueError(f"{len(differences)} differences from {len(names)} articles: need two articles or more, one for each item")
    mean = float(differences.mean())
    sums = np.bincount(cluster, weights=differences - mean)
    G = len(names)
    error = math.sqrt(G / (G - 1) * float((sums**2).sum())) / len(differences)
    return Interval(mean, mean - Z_95 * error, mean + Z_95 * error, G)


@dataclass(frozen=True)
class Verdict:
    """Whether the challenger takes over, and why, in a sentence for people."""

    promoted: bool
    reason: str


def judge(bits_per_byte: Interval, challenger_format: float, incumbent_format: float) -> Verdict:
    """The champion rule: significantly fewer bits for the gold answers, and a format that is not worse beyond the margin.

    Formats are shares of well-formed answers (0 to 1).
    """
    shown = f"{bits_per_byte.mean:+.4f} bits per byte of gold answer (95 % interval {bits_per_byte.low:+.4f} to {bits_per_byte.high:+.4f})"
    if bits_per_byte.high >= 0:
        return Verdict(False, f"stays: not significantly better, {shown}")
    if challenger_format < incumbent_format - FORMAT_MARGIN:
        return Verdict(False, f"stays: better at {shown}, but format adherence fell from {incumbent_format:.0%} to {challenger_format:.0%}")
    return Verdict(True, f"takes over: {shown}")
