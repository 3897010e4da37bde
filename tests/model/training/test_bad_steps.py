"""Bad steps never reach the weights, and an interrupted run decides about them again as the uninterrupted one did."""

import math
import signal

import pytest

from model.checkpoint.store import CheckpointStore
from model.config import SpikeConfig, TrainingConfig
from model.errors import TooManyBadSteps
from model.training.bad_steps import BadSteps
from model.training.journal import read_all, read_current
from tests.model.training.conftest import final, start_trainer, train
from tests.model.training.test_trainer import consumed, wait_for_step


def judge_all(bad_steps, norms):
    return [bad_steps.judge(step, 1.0, norm) for step, norm in enumerate(norms)]


def config(action="none", **fields):
    return TrainingConfig(spike=SpikeConfig(action=action, threshold=3.0, history=8), **fields)


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_not_finite_is_skipped_whatever_is_set(loss, norm):
    bad_steps = BadSteps(config())
    assert bad_steps.judge(1, loss, norm) == "skip"
    assert bad_steps.skipped == 1
    assert bad_steps.judge(2, 1.0, 1.0) == "good"


def test_a_spike_is_far_above_the_median_of_enough_steps():
    assert judge_all(BadSteps(config("skip")), [1, 50, 1, 1]) == ["good"] * 4
    assert judge_all(BadSteps(config("skip")), [1] * 8 + [2.9, 3.1, 3.1, 1]) == ["good"] * 9 + ["skip", "skip", "good"]
    assert judge_all(BadSteps(config("rollback")), [1] * 8 + [3.1]) == ["good"] * 8 + ["rollback"]
    assert judge_all(BadSteps(config("none")), [1] * 8 + [1000]) == ["good"] * 9


def test_its_state_decides_the_same():
    norms = [1.0, 1.1, 0.9, 1.2, 1.0, 1.3, 1.0, 0.8, 3.2, 1.0, 9.0, 1.0]
    whole = BadSteps(config("skip"))
    expected = judge_all(whole, norms)
    assert "skip" in expected
    for cut in range(len(norms)):
        first, second = BadSteps(config("skip")), BadSteps(config("skip"))
        found = judge_all(first, norms[:cut])
        second.load(first.state)
        assert found + judge_all(second, norms[cut:]) == expected
        assert second.state == whole.state


def test_too_many_in_a_row_end_the_run_with_a_clear_word():
    bad_steps = BadSteps(config(max_bad_steps=3))
    for _ in range(5):
        judge_all(bad_steps, [math.nan, math.nan, 1.0])
    with pytest.raises(TooManyBadSteps, match=r"step 2: 3 bad steps in a row \(training\.max_bad_steps\)"):
        judge_all(bad_steps, [math.nan, math.nan, math.nan])


def test_too_many_rollbacks_to_one_checkpoint_end_the_run():
    bad_steps = BadSteps(config("rollback", max_bad_steps=2))
    for _ in range(2):
        assert judge_all(bad_steps, [1.0] * 8 + [9.0])[-1] == "rollback"
        bad_steps.rolled_back(None)
    bad_steps.regular_checkpoint()
    for _ in range(2):
        assert judge_all(bad_steps, [1.0] * 8 + [9.0])[-1] == "rollback"
        bad_steps.rolled_back(None)
    with pytest.raises(TooManyBadSteps, match=r"rolled back 2 times to one checkpoint \(training\.max_bad_steps\)"):
        judge_all(bad_steps, [1.0] * 8 + [9.0])


SPIKY = {"threshold": 1.25, "history": 8}
"""So near the median that ordinary batches are spikes."""


def spiky(action):
    return {"training": {"spike": {"action": action, **SPIKY}, "learning_rate": 1e-2, "max_bad_steps": 100, "gradient_accumulation": 1}}


def warnings(folder):
    return [event["message"] for event in read_current(folder.journal) if event["event"] == "warning"]


@pytest.mark.slow
@pytest.mark.parametrize("action", ["skip", "rollback"])
def test_interrupted_or_not_the_same_steps_are_bad(new_run, action):
    whole, cut = new_run("whole", **spiky(action)), new_run("cut", **spiky(action))
    train(whole)
    assert warnings(whole), "a run without a spike proves nothing"
    for step, number in ((9, signal.SIGTERM), (23, signal.SIGKILL), (31, signal.SIGTERM)):
        process = start_trainer(cut)
        wait_for_step(cut, step, process)
        process.send_signal(number)
        process.communicate(timeout=30)
        assert process.returncode in (75, -9)
    train(cut)
    assert final(cut) == final(whole)
    assert consumed(cut) == consumed(whole)
    for checkpoint in CheckpointStore(cut.checkpoints).checkpoints():
        checkpoint.verify()


@pytest.mark.slow
def test_a_skipped_step_leaves_the_weights_and_is_counted(new_run):
    folder = new_run("skipping", **spiky("skip"))
    train(folder)
    steps = [event for event in read_current(folder.journal) if event["event"] == "step"]
    assert steps[-1]["skipped_steps"] == len(warnings(folder)) > 0
    assert all("skipped: loss" in message for message in warnings(folder))


@pytest.mark.slow
def test_a_rollback_goes_back_to_a_regular_checkpoint_and_on_with_other_data(new_run):
    folder = new_run("rolling", **spiky("rollback"))
    train(folder)
    started = [event for event in read_all(folder.journal) if event["event"] == "started"]
    back = [event for event in started if "rolled_back_from" in event]
    assert back
    assert all(event["step"] == (event["rolled_back_from"] - 1) // 10 * 10 for event in back)
    assert [event["step"] for event in read_current(folder.journal) if event["event"] == "step"] == list(range(1, 41))
    before = {e["step"]: e["loss"] for e in read_all(folder.journal)[: read_all(folder.journal).index(back[0])] if e["event"] == "step"}
    after = {event["step"]: event["loss"] for event in read_current(folder.journal) if event["event"] == "step"}
    repeated = range(back[0]["step"] + 1, back[0]["rolled_back_from"])
    assert all(before[step] != after[step] for step in repeated)


@pytest.mark.slow
def test_a_training_that_explodes_ends_with_one_line(new_run):
    folder = new_run("exploding", training={"learning_rate": 1e30, "gradient_clip": 0.0, "warmup_steps": 0, "max_bad_steps": 4})
    errors = train(folder, exit_code=1)
    assert "4 bad steps in a row (training.max_bad_steps)" in errors
    told = [line for line in errors.strip().splitlines() if not line.startswith("warning: skipped")]
    assert len(told) == 1
    assert warnings(folder)[-1] in errors
    losses = [event["loss"] for event in read_current(folder.journal) if event["event"] == "step"]
    assert losses[-3:] == [None, None, None]
