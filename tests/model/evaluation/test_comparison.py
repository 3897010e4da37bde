"""The champion's rule: how often it is wrong, and how often it is blind."""

import numpy as np
import pytest

from model.evaluation.comparison import judge, paired_difference


def planted(rng, difference, articles=64, rows=2):
    """Two checkpoints' bits per byte on rows of articles; the rows of an article share its luck."""
    base = rng.normal(1.2, 0.3, articles * rows)
    luck = np.repeat(rng.normal(0, 0.02, articles), rows) + rng.normal(0, 0.02, articles * rows)
    names = [str(i // rows) for i in range(articles * rows)]
    return base + difference + luck, base, names


def test_a_hand_made_example():
    interval = paired_difference([1.0, 2.0, 4.0, 4.0], [1.0, 1.0, 1.0, 3.0], ["a", "a", "b", "c"])
    assert interval.mean == pytest.approx(1.25)
    # deviations from 1.25 by article: a: -1.25 - 0.25 = -1.5, b: 1.75, c: -0.25; variance: 3/2 * (2.25 + 3.0625 + 0.0625) / 16
    error = (1.5 * 5.375 / 16) ** 0.5
    assert (interval.low, interval.high) == pytest.approx((1.25 - 1.96 * error, 1.25 + 1.96 * error), abs=1e-3)
    assert interval.clusters == 3


def test_equal_checkpoints_are_rarely_promoted():
    rng = np.random.default_rng(0)
    promoted = sum(judge(paired_difference(*planted(rng, 0.0)), 1.0, 1.0).promoted for _ in range(2000))
    assert promoted / 2000 <= 0.04


def test_a_true_difference_is_seen():
    rng = np.random.default_rng(1)
    promoted = sum(judge(paired_difference(*planted(rng, -0.012)), 1.0, 1.0).promoted for _ in range(500))
    assert promoted / 500 >= 0.9


def test_rows_of_one_article_are_one_observation():
    rng = np.random.default_rng(2)
    challenger, incumbent, names = planted(rng, 0.0, articles=20, rows=20)
    clustered = paired_difference(challenger, incumbent, names)
    naive = paired_difference(challenger, incumbent, [str(i) for i in range(400)])
    assert clustered.high - clustered.low > 2 * (naive.high - naive.low)


def test_a_worse_format_keeps_the_incumbent_and_says_so():
    better = paired_difference([1.0] * 9 + [1.1], [2.0] * 10, [str(i) for i in range(10)])
    assert judge(better, 0.95, 1.0).promoted
    verdict = judge(better, 0.90, 1.0)
    assert not verdict.promoted
    assert "format adherence fell from 100% to 90%" in verdict.reason


def test_too_few_articles_are_refused():
    with pytest.raises(ValueError, match="two articles"):
        paired_difference([1.0, 1.0], [2.0, 2.0], ["a", "a"])
