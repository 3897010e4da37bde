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
