"""Intervals: against tables, a sum done by hand, and how often they hold the truth."""

import numpy as np
import pytest

from model.evaluation.intervals import clustered, student_t


@pytest.mark.parametrize(
    ("degrees", "t"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (10, 2.2281), (30, 2.0423), (120, 1.9799), (10**6, 1.95997)],
)
def test_students_t_is_the_tables(degrees, t):
    assert student_t(0.95, degrees) == pytest.approx(t, rel=2e-3 if degrees < 5 else 2e-4)


@pytest.mark.parametrize(("degrees", "t"), [(1, 63.657), (2, 9.9248), (5, 4.0321), (10, 3.1693), (30, 2.7500), (120, 2.6174)])
def test_students_t_of_another_level(degrees, t):
    assert student_t(0.99, degrees) == pytest.approx(t, rel=5e-3 if degrees < 10 else 2e-4)
    interval = clustered(np.arange(degrees + 1.0), np.ones(degrees + 1), [str(i) for i in range(degrees + 1)])
    assert interval.at(0.99).high - interval.mean == pytest.approx(interval.error * t, rel=5e-3)
    assert interval.at(0.95).low == pytest.approx(interval.low)


def test_a_mean_by_hand():
    interval = clustered([0.0, 1.0, 3.0, 1.0], [1, 1, 1, 1], ["a", "a", "b", "c"])
    # deviations from 1.25 by article: a: -1.25 - 0.25 = -1.5, b: 1.75, c: -0.25; variance: 3/2 * (2.25 + 3.0625 + 0.0625) / 16
    error = (1.5 * 5.375 / 16) ** 0.5
    assert interval.mean == 1.25
    assert interval.clusters == 3
    assert (interval.low, interval.high) == pytest.approx((1.25 - 4.3027 * error, 1.25 + 4.3027 * error), abs=1e-3)
    assert interval.error == pytest.approx(error)


def test_a_ratio_by_hand():
    interval = clustered([2.0, 6.0], [1, 3], ["a", "b"])
    assert (interval.mean, interval.low, interval.high) == (2.0, 2.0, 2.0)  # both articles have two a byte
    interval = clustered([3.0, 5.0], [1, 3], ["a", "b"])  # residuals 1 and -1; variance 2 * 2 / 16
    assert (interval.mean, interval.error) == (2.0, pytest.approx(0.5))


@pytest.mark.parametrize("articles", [5, 12, 60])
def test_the_truth_is_inside_19_times_of_20(articles):
    """Articles of unequal sizes and items of unequal lengths, with the luck of an article on all its items."""
    rng = np.random.default_rng(articles)
    inside = 0
    for _ in range(2000):
        cluster = np.repeat(np.arange(articles), rng.integers(3, 6, articles))
        length = rng.integers(20, 40, len(cluster))
        bits = length * (1.5 + rng.normal(0, 0.2, articles)[cluster] + rng.normal(0, 0.1, len(cluster)))
        interval = clustered(bits, length, cluster.astype(str).tolist())
        inside += interval.low <= 1.5 <= interval.high
    assert 0.925 <= inside / 2000 <= 0.975


def test_what_has_no_interval_is_refused():
    for numerators, denominators, articles in (([1.0, 1.0], [1, 1], ["a", "a"]), ([], [], []), ([1.0], [1, 1], ["a", "b"])):
        with pytest.raises(ValueError, match="two articles"):
            clustered(numerators, denominators, articles)
    with pytest.raises(ValueError, match="sum to nothing"):
        clustered([1.0, 1.0], [0, 0], ["a", "b"])
    with pytest.raises(ValueError, match="degrees"):
        student_t(0.95, 0)
