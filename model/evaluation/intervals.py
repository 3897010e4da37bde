"""95 % intervals of means and ratios over items, where the items of one article count as one observation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    mean: float
    low: float
    high: float
    clusters: int
    """Articles that it comes from."""

    @property
    def error(self) -> float:
        """The standard error."""
        return (self.high - self.mean) / student_t(0.95, self.clusters - 1)

    def at(self, level: float) -> Interval:
        """The interval of another level, such as 0.99."""
        reach = student_t(level, self.clusters - 1) * self.error
        return Interval(self.mean, self.mean - reach, self.mean + reach, self.clusters)


def clustered(numerators: Sequence[float] | np.ndarray, denominators: Sequence[float] | np.ndarray, articles: Sequence[str]) -> Interval:
    """The ratio of the sums of `numerators` and `denominators`, an entry an item; with ones below it is the mean.

    The error is the linearised one of a ratio, by clusters (Cochran 1977, "Sampling techniques", sections 6.3 and 11.2; Miller 2024,
    "Adding error bars to evals", section 2.2): with G articles and residuals e = numerator - ratio * denominator, the variance is
    G/(G-1) * sum over articles of (sum of the article's e)^2 / (sum of the denominators)^2. The interval is Student's t with G-1 degrees.

    Raises:
        ValueError: the three differ in length, there are fewer than two articles, or the denominators sum to nothing.
    """
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    names, cluster = np.unique(np.asarray(articles, dtype=object).astype(str), return_inverse=True)
    if not len(above) == len(below) == len(cluster) or len(names) < 2:
        raise ValueError(f"{len(above)} items of {len(names)} articles: need two articles or more, one for each item")
    total = float(below.sum())
    if total <= 0:
        raise ValueError("the denominators sum to nothing")
    G, ratio = len(names), float(above.sum()) / total
    sums = np.bincount(cluster, weights=above - ratio * below)
    reach = student_t(0.95, G - 1) * math.sqrt(G / (G - 1) * float((sums**2).sum())) / total
    return Interval(ratio, ratio - reach, ratio + reach, G)


def student_t(level: float, degrees: int) -> float:
    """How many standard errors a two-sided interval of `level` reaches, by degrees of freedom: exact for one and two, else Abramowitz &
    Stegun 26.7.5, which at 95 % is right to 0.2 % from three on.

    Raises:
        ValueError: less than one degree.
    """
    if degrees < 1:
        raise ValueError(f"{degrees} degrees of freedom: need one or more")
    if degrees == 1:
        return math.tan(math.pi * level / 2)
    if degrees == 2:
        return level * math.sqrt(2 / (1 - level**2))
    z = NormalDist().inv_cdf((1 + level) / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / degrees**power for power, term in enumerate(terms))
