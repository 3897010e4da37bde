"""GPUs as slots: a training takes free ones, another waits and is told for whom. The locks are real, the GPUs are names."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.training.lock import gpu_lock, gpus_in_use, held_gpus

HOLD = """
import sys, time
from model.training.lock import held_gpus
def wait(why):
    print(why, flush=True)
    time.sleep(0.05)
with held_gpus(sys.argv[3:], int(sys.argv[2]), sys.argv[1], wait) as taken:
    print("took", *taken, flush=True)
    time.sleep(60)
"""


class Full(Exception):
    """There was no free one."""


def full(why: str) -> None:
    raise Full(why)


@pytest.fixture(autouse=True)
def own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[object]:
    processes: list[subprocess.Popen[str]] = []

    def start(experiment: str, count: int, *gpus: str) -> subprocess.Popen[str]:
        environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[3])}
        command = [sys.executable, "-c", HOLD, experiment, str(count), *gpus]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_each_takes_a_free_one_and_the_third_waits_for_whoever_ends(hold: object) -> None:
    assert callable(hold)
    first, second = hold("one", 1, "a", "b"), None
    assert line(first) == "took 0"
    assert gpus_in_use()
    second = hold("two", 1, "a", "b")
    assert line(second) == "took 1"
    third = hold("three", 1, "a", "b")
    said = line(third)
    assert said.startswith("three waits for 1 free GPU: GPU 0 is in use by one, process")
    assert f"process {first.pid} since" in said
    assert f"GPU 1 is in use by two, process {second.pid}" in said
    second.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while (said := line(third)) != "took 1":
        assert time.monotonic() < deadline, said


def test_who_needs_two_takes_both_or_none() -> None:
    with held_gpus(["a", "b"], 1, "one", full) as one:
        assert one == [0]
        with pytest.raises(Full, match=r"two waits for 2 free GPUs: GPU 0 is in use by one"), held_gpus(["a", "b"], 2, "two", full):
            pass
        with held_gpus(["a", "b"], 1, "three", full) as three:
            assert three == [1], "what the one that waits could have had is free"
    with held_gpus(["a", "b"], 2, "two", full) as two:
        assert two == [0, 1]
    assert not gpus_in_use()


def test_the_same_gpu_is_the_same_lock_wherever_it_stands_in_the_list() -> None:
    with held_gpus(["GPU-1f"], 1, "one", full), held_gpus(["GPU-2e", "GPU-1f"], 1, "two", full) as taken:
        assert taken == [0]
        with pytest.raises(Full), held_gpus(["GPU-1f"], 1, "three", full):
            pass


def test_no_identity_leads_elsewhere(tmp_path: Path) -> None:
    assert gpu_lock("../../x").parent.parent == tmp_path
