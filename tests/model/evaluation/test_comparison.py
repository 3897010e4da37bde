"""The champion's rule: how often it is wrong, and how often it is blind.

`python -m tests.model.evaluation.test_comparison` prints the figures of docs/architecture.md.
"""

from dataclasses import dataclass

import numpy as np
import pytest

from model.config import EvaluationConfig
from model.evaluation.comparison import FALSE_PROMOTION, FORMAT_MARGIN, Evidence, challenge, confidence, difference

ITEMS = EvaluationConfig().items
MEAN = 1.0
"""Bits per byte of gold answer."""
WITHIN = 0.3
"""How much of the noise's variance the items of one article share."""


@dataclass(frozen=True)
class Noise:
    """The paired difference of two equal checkpoints, item by item."""

    deviation: float
    """Its standard deviation, as a share of the mean."""
    largest_article: int
    """Articles are of one to so many items."""


MEASURED = Noise(0.024, 1)
"""Neighbouring checkpoints of a tiny network on wiki-synth: a relative standard error of 0.18 % at 256 items, one of an article."""
HARDER = Noise(0.03, 4)
"""What the tests ask for."""


class Exam:
    """Held-out items whose answers' lengths are as wiki-synth's, and checkpoints that are planted on them."""

    def __init__(self, rng, items=ITEMS, noise=HARDER):
        self.rng, self.noise = rng, noise
        sizes = rng.integers(1, noise.largest_article + 1, items)
        self.article = np.repeat(np.arange(items), sizes)[:items]
        self.names = tuple(f"article {number}" for number in self.article)
        self.ids = tuple(f"item {number}" for number in range(items))
        self.bytes = np.ceil(rng.lognormal(np.log(300), 0.66, items))
        self.base = rng.normal(MEAN, 0.25, items)

    def checkpoint(self, difference=0.0, well_formed=None):
        """A checkpoint whose true bits per byte lie `difference` (a share of the mean) from those of the others."""
        shared, own = self.rng.normal(size=len(self.ids)), self.rng.normal(size=len(self.ids))
        luck = self.noise.deviation / np.sqrt(2) * MEAN * (np.sqrt(WITHIN) * shared[self.article] + np.sqrt(1 - WITHIN) * own)
        bits = self.bytes * (self.base + difference * MEAN + luck)
        formed = np.ones(len(self.ids)) if well_formed is None else np.asarray(well_formed, dtype=np.float64)
        return Evidence(self.ids, self.names, bits, self.bytes, self.ids, formed)


def promotions(rng, draws, difference, challengers=1, noise=HARDER):
    """The share of checkpoints that take over, each one of so many challengers."""
    exams = (Exam(rng, noise=noise) for _ in range(draws))
    return sum(challenge(exam.checkpoint(difference), exam.checkpoint(), challengers).promoted for exam in exams) / draws


def series(rng, draws, challengers, corrected=True, noise=HARDER):
    """The share of series of equal challengers, one after the other, in which any takes over."""
    count = challengers if corrected else 1
    found = 0
    for _ in range(draws):
        exam = Exam(rng, noise=noise)
        incumbent = exam.checkpoint()
        found += any(challenge(exam.checkpoint(), incumbent, count).promoted for _ in range(challengers))
    return found / draws


def test_equal_checkpoints_are_rarely_promoted():
    """One end of a 95 % interval: 2.5 %, and no more than 5 % whatever the draw."""
    assert promotions(np.random.default_rng(0), 3000, 0.0) <= 0.035


def test_of_twenty_equal_checkpoints_none_takes_over_in_nineteen_series_of_twenty():
    rng = np.random.default_rng(1)
    assert series(rng, 300, 20) <= FALSE_PROMOTION
    assert series(rng, 100, 20, corrected=False) > 0.12, "which is why the number of challengers counts"


@pytest.mark.parametrize(("challengers", "gain"), [(1, 0.01), (20, 0.015)])
def test_a_true_gain_is_seen(challengers, gain):
    """1 % against the champion alone; to be seen among twenty it has to be 1.5 %."""
    assert promotions(np.random.default_rng(2), 1000, -gain, challengers) >= 0.9


def test_rows_of_one_article_are_one_observation():
    rng = np.random.default_rng(3)
    articles = np.repeat([str(number) for number in range(20)], 20)
    luck = np.repeat(rng.normal(0, 0.02, 20), 20) + rng.normal(0, 0.02, 400)
    clustered = difference(luck, np.zeros(400), np.ones(400), list(articles))
    naive = difference(luck, np.zeros(400), np.ones(400), [str(number) for number in range(400)])
    assert clustered.high - clustered.low > 2 * (naive.high - naive.low)


def test_long_answers_weigh_more():
    """Bits per byte is a ratio of sums: what an answer of 900 bytes says counts for more than ten of ten."""
    ours, theirs = np.array([900.0, 12.0, 12.0]), np.array([910.0, 10.0, 10.0])
    interval = difference(ours, theirs, [900.0, 10.0, 10.0], ["a", "b", "c"])
    assert interval.mean == pytest.approx(-6 / 920)


def better(exam, well_formed):
    return exam.checkpoint(-0.05, well_formed)


def formed(share):
    return np.arange(ITEMS) < round(share * ITEMS)


def test_a_worse_format_keeps_the_incumbent_and_says_so():
    exam = Exam(np.random.default_rng(4))
    incumbent = exam.checkpoint(well_formed=formed(1.0))
    allowed = int(FORMAT_MARGIN * ITEMS)
    assert challenge(better(exam, np.arange(ITEMS) >= allowed), incumbent).promoted
    assert not challenge(better(exam, np.arange(ITEMS) >= allowed + 1), incumbent).promoted
    verdict = challenge(better(exam, formed(0.9)), incumbent)
    assert not verdict.promoted
    assert verdict.reason.startswith("stays: better at -0.0")
    assert "format adherence fell from 100% to 90%" in verdict.reason


def test_an_equal_format_is_no_hindrance_and_a_much_worse_one_is():
    """Of the questions one in ten changes sides between two checkpoints of equal format."""
    rng = np.random.default_rng(5)

    def passed(fell):
        exam = Exam(rng)
        flips = rng.choice([-1, 0, 1], ITEMS, p=[0.05 + fell / 2, 0.9, 0.05 - fell / 2])
        before = rng.random(ITEMS) < 0.9
        now = np.where(flips < 0, 0, np.where(flips > 0, 1, before))
        before = np.where(flips < 0, 1, np.where(flips > 0, 0, before))
        return challenge(better(exam, now), exam.checkpoint(well_formed=before)).promoted

    assert sum(passed(0.0) for _ in range(300)) / 300 >= 0.97
    assert sum(passed(0.1) for _ in range(300)) / 300 <= 0.03


def test_the_reason_says_what_was_measured_and_what_keeps_the_incumbent():
    exam = Exam(np.random.default_rng(6))
    incumbent = exam.checkpoint()
    assert challenge(exam.checkpoint(-0.05), incumbent).reason.startswith("takes over: -0.0")
    assert challenge(exam.checkpoint(0.05), incumbent).reason.startswith("stays: not significantly better, +0.0")
    close = (challenge(exam.checkpoint(-0.007), incumbent, 200) for _ in range(50))
    assert any("among 200 challengers luck may do that" in verdict.reason for verdict in close)


@pytest.mark.parametrize(("challengers", "level"), [(0, 0.95), (1, 0.95), (2, 0.95), (4, 0.975), (20, 0.995)])
def test_the_more_compete_the_surer_it_has_to_be(challengers, level):
    assert confidence(challengers) == pytest.approx(level)


def test_too_few_articles_tell_nothing():
    exam = Exam(np.random.default_rng(7), items=2)
    one = Evidence(exam.ids, ("a", "a"), exam.bytes * 0.1, exam.bytes, exam.ids, np.ones(2))
    other = Evidence(exam.ids, ("a", "a"), exam.bytes, exam.bytes, exam.ids, np.ones(2))
    verdict = challenge(one, other)
    assert not verdict.promoted
    assert "fewer than two articles" in verdict.reason
    empty = Evidence(exam.ids, ("a", "b"), np.zeros(2), np.zeros(2), exam.ids, np.ones(2))
    assert not challenge(empty, empty).promoted


def test_another_list_of_items_is_refused():
    exam, other = Exam(np.random.default_rng(8)), Exam(np.random.default_rng(9), items=ITEMS - 1)
    with pytest.raises(AssertionError, match="one evaluation set"):
        challenge(exam.checkpoint(), other.checkpoint())


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    for name, noise in (("as measured", MEASURED), ("harder", HARDER)):
        print(f"{name}: {ITEMS} items, paired difference {noise.deviation:.1%} of the mean, articles of 1 to {noise.largest_article}")
        print(f"  an equal challenger takes over: {promotions(rng, 10_000, 0.0, noise=noise):.2%}")
        print(f"  any of 20 equal challengers: {series(rng, 1000, 20, noise=noise):.2%}", end="")
        print(f"; if each were asked for 95 %: {series(rng, 500, 20, False, noise):.2%}")
        for gain in (0.01, 0.015):
            seen = ", ".join(f"{promotions(rng, 3000, -gain, count, noise):.1%} of {count}" for count in (1, 5, 20))
            print(f"  {gain:.1%} better takes over, as one of so many challengers: {seen}")
