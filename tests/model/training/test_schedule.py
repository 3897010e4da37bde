"""The learning rate, at the points people check by hand."""

import math

import pytest

from model.config import TrainingConfig
from model.training.schedule import learning_rate_factor

CONFIG = TrainingConfig(warmup_steps=10, min_learning_rate_ratio=0.1)


def test_warms_up_linearly_to_the_peak():
    assert [learning_rate_factor(step, CONFIG, 110) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])


@pytest.mark.parametrize(("schedule", "half_way", "end"), [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1.0, 1.0)])
def test_decays_to_the_minimum_and_stays(schedule, half_way, end):
    config = CONFIG.model_copy(update={"schedule": schedule})
    assert learning_rate_factor(60, config, 110) == pytest.approx(half_way)
    assert learning_rate_factor(110, config, 110) == pytest.approx(end)
    assert learning_rate_factor(5000, config, 110) == pytest.approx(end)


def test_cosine_is_a_cosine():
    quarter = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))
    assert learning_rate_factor(35, CONFIG, 110) == pytest.approx(quarter)


def test_no_warm_up_and_a_run_shorter_than_its_warm_up():
    assert learning_rate_factor(0, CONFIG.model_copy(update={"warmup_steps": 0}), 10) == 1.0
    assert learning_rate_factor(4, CONFIG, 5) == 0.5


def factors(steps, total, **fields):
    config = CONFIG.model_copy(update=fields)
    return [learning_rate_factor(step, config, total) for step in steps]


def test_warm_up_stable_decay():
    wsd = {"schedule": "linear", "decay_share": 0.2}
    assert factors((9, 10, 50, 90), 110, **wsd) == [1.0, 1.0, 1.0, 1.0]
    assert factors((95, 100, 105, 110, 5000), 110, **wsd) == pytest.approx([0.775, 0.55, 0.325, 0.1, 0.1])


def test_a_late_cosine_is_the_cosine_of_a_shorter_run():
    late = factors(range(60, 120), 110, schedule="cosine", decay_share=0.5)
    assert late == pytest.approx(factors(range(10, 70), 60, schedule="cosine"))


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_decay_of_all_steps_is_what_it_was_without_the_field(schedule):
    for step in range(10, 130):
        progress = min(1.0, (step - 10) / 100)
        remaining = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
        assert factors([step], 110, schedule=schedule, decay_share=1.0) == [0.1 + (1 - 0.1) * remaining]


@pytest.mark.parametrize("decay_share", [0.01, 0.2, 1.0])
def test_runs_that_end_before_there_is_anything_to_decay(decay_share):
    short = {"schedule": "linear", "decay_share": decay_share}
    assert factors((4, 9), 10, **short) == [0.5, 1.0]
    assert factors((9, 10), 5, **short) == [1.0, 1.0]
    assert factors((0,), 1, warmup_steps=0, **short) == [1.0]
    assert factors((1, 7), 1, warmup_steps=0, **short) == pytest.approx([0.1, 0.1])


@pytest.mark.parametrize("decay_share", [0.07, 0.3, 1.0])
def test_never_rises_after_the_warm_up_and_never_leaves_its_bounds(decay_share):
    run = factors(range(10, 300), 97, schedule="cosine", decay_share=decay_share)
    assert run == sorted(run, reverse=True)
    assert run[0] == 1.0
    assert run[-1] == pytest.approx(0.1)
