"""The machine that trains dies, or its storage does: what was copied to the storage is all that counts. With the real processes."""

from __future__ import annotations

import signal
import subprocess
import time

import psutil

from model.checkpoint.store import MANIFEST, step_of
from tests.faults.test_two_of_the_same import INTERVAL, LAST, NAME, Clones, clones, end, pytestmark, until

__all__ = ["clones", "pytestmark"]


def test_another_machine_goes_on_loses_one_interval_at_most_and_ends_with_the_same_weights(clones: Clones) -> None:
    alone = clones.clone("alone")
    uninterrupted = alone.start("model.training", str(alone.folder.path))
    a, b = clones.clone("a"), clones.clone("b")
    first = a.start(GPT2_HOST="machine-a", GPT2_LEASE_S="2")
    until(lambda: clones.copies(1), first, a)
    for process in a.tree(first):
        process.kill()
    assert first.wait() == -9
    copied, sealed = clones.copies(1)[-1], a.sealed()[-1]
    assert step_of(sealed) < LAST
    assert step_of(copied) >= step_of(sealed) - INTERVAL

    second = b.start(GPT2_HOST="machine-b", GPT2_LEASE_S="2")
    assert second.wait(90) == 0, b.said()
    assert uninterrupted.wait(90) == 0, alone.said()
    started = [event for event in b.journal() if event["event"] == "started"][-1]
    assert started["resumed_from"] == copied
    ours, theirs = b.journal()[-1], alone.journal()[-1]
    assert (ours["event"], ours["step"]) == ("finished", LAST)
    assert ours["model_sha256"] == theirs["model_sha256"]
    told = {event["step"] for event in b.journal() if event["event"] == "step"}
    assert told == set(range(1, LAST + 1))  # the journal came along


def test_a_killed_trainer_is_a_fault_and_one_killed_by_a_second_ctrl_c_is_not(clones: Clones) -> None:
    a = clones.clone("a", max_steps=1_000_000)

    def trainer(process: subprocess.Popen[str]) -> psutil.Process:
        return next(each for each in a.tree(process) if "model.training" in each.cmdline())

    process = a.start()
    until(a.journal, process, a)
    trainer(process).kill()
    assert process.wait(30) == 1
    assert "the trainer was killed by signal 9; the same command goes on from the last checkpoint" in a.error()

    process = a.start()
    until(lambda: len([event for event in a.journal() if event["event"] == "started"]) == 2, process, a)
    trainer(process).suspend()  # it does not even hear the first one
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 75
    assert "stopped: " in a.error()


def test_a_storage_that_is_away_for_a_while_disturbs_nothing_and_is_caught_up_with(clones: Clones) -> None:
    a = clones.clone("a", max_steps=1_000_000)
    process = a.start(GPT2_LEASE_S="2")
    until(lambda: clones.copies(1), process, a)
    while not clones.storage.is_file():
        clones.storage.rename(clones.storage.with_name("away"))
        clones.storage.write_text("a file where the folder should be")
    before = a.sealed()[-1]
    until(lambda: step_of(a.sealed()[-1]) >= step_of(before) + 2 * INTERVAL, process, a)
    clones.storage.unlink()
    clones.storage.with_name("away").rename(clones.storage)
    newest = a.sealed()[-1]
    until(lambda: clones.copies(1)[-1] >= newest, process, a, seconds=20)
    assert end(process) == 75
    assert clones.copies(1) == a.sealed()
    steps = [event["step"] for event in a.journal() if event["event"] == "step"]
    assert steps == list(range(1, len(steps) + 1))
    assert "training goes on" in a.said()
    for name in a.sealed():
        (copy,) = clones.storage.glob(f"checkpoints/{NAME}/*/token_00000001/{name}/{MANIFEST}")
        assert copy.read_bytes() == (a.folder.checkpoints / name / MANIFEST).read_bytes()
