"""Random SIGKILLs, in chains: a training is started and killed, again and again, until it comes to its end; it is as if nothing had been.

`--kills 1000` for more of them, `--kill-seed 1` for others.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import yaml

from model.params import merge
from tests.faults.conftest import said
from tests.faults.warm import ROOT
from tests.model.training.conftest import FIELDS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NAME = "run"
KINDS = {"trainer": 8, "group": 8, "parent": 2, "stage's tree": 0.5, "stage": 0.5, "stage's trainer": 0.5}
"""Who is killed, and how often. The last three are of a stage that is really started, which takes seconds."""
KILLED_AS = ["plain", "cache", "post-trained", "skip", "rollback"]
CURVES = {f"curves/{name}.csv" for name in ("loss", "validation_loss", "tokens_per_s")}
OF_A_STAGE = {".tracking.lock", ".tracking-run.lock", ".aliases.json", ".lease.json", ".lease.lock", ".fetch.lock", *CURVES}
"""Files in a run's folder that are not the trainer's."""
TO_NOTICE_AND_LEAVE_S = 8.0
"""A trainer whose parent died notices within 5 s; then it saves and leaves."""


class Budget:
    """The kills that are left to make, counted by kind."""

    def __init__(self, kills):
        self.kills = self.left = kills
        self.done = Counter()
        self.runs = self.lived = 0
        self._lock = threading.Lock()

    def take(self):
        """Whether one was left; it is the caller's to make, or to give back."""
        with self._lock:
            if not self.left:
                return False
            self.left -= 1
            return True

    def spend(self):
        """Nobody makes another one: something has failed."""
        with self._lock:
            self.kills, self.left = self.made, 0

    def give_back(self):
        """The training had ended by itself."""
        with self._lock:
            self.left += 1
            self.lived += 1

    def count(self, kind):
        with self._lock:
            self.done[kind] += 1

    @property
    def made(self):
        return sum(self.done.values())


def make_project(root, corpus, undisturbed, variant):
    """A project whose one experiment's training has not begun; the run folder."""
    folder = undisturbed(variant).copy_beginning(root / "runs" / NAME)
    experiment = merge(merge(FIELDS, {"data": {"path": str(corpus)}, "hardware": {"device": "cpu"}}), undisturbed(variant).fields)
    (root / "params.yaml").write_text(yaml.safe_dump({"defaults": {}, "experiments": {NAME: experiment}}))
    (root / "overrides.yaml").write_text(f"overrides: {{{NAME}: {{}}}}\n")
    (root / "dvc.yaml").write_text("stages: {}\n")
    return folder


def kill_trainer(trainer, folder, kind, when):
    """Start one and kill it after so many seconds; the exit code if it has ended by itself before."""
    reading, writing = os.pipe()
    process = trainer.start(folder, "--watch-stdin", stdin=reading)
    os.close(reading)
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(when)
        if kind == "parent":
            os.close(writing)
            writing = None
            code = process.wait(TO_NOTICE_AND_LEAVE_S)
            assert code in (0, 75), said(folder)
            return None
        process.send_signal(signal.SIGKILL, group=kind == "group")
        process.wait(30)
        return None
    finally:
        process.kill()
        if writing is not None:
            os.close(writing)


def kill_stage(folder, kind, when):
    """Start `stream_and_train` as DVC does, and kill it, what it started, or both; the exit code if it has ended by itself before."""
    environment = {name: value for name, value in os.environ.items() if name not in ("MLFLOW_TRACKING_URI", "GPT2_WATCH_PID")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    root = folder.path.parents[1]
    with (root / "stage.said").open("w") as log:
        command = [sys.executable, "-m", "tasks.stream_and_train", NAME]
        stage = subprocess.Popen(command, cwd=root, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    began, tree = time.monotonic(), []
    watched = psutil.Process(stage.pid)
    try:
        while time.monotonic() - began < when or not (kind == "stage's tree" or trainers_of(watched)):
            if stage.poll() is not None:
                return stage.returncode
            time.sleep(0.02)
        tree = watched.children(recursive=True)
        own = trainers_of(watched)
        if kind == "stage's trainer":
            for process in own:
                process.kill()
            assert stage.wait(30) != 0
        else:
            for process in [watched, *(tree if kind == "stage's tree" else [])]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            stage.wait(30)
            _, alive = psutil.wait_procs(own, TO_NOTICE_AND_LEAVE_S)
            assert not alive, f"an orphan trains on: {alive}"
        return None
    finally:
        for process in [watched, *tree]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        stage.wait(30)


def trainers_of(stage):
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in stage.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "model.training" in process.cmdline():
                    found.append(process)
    return found


def chain(number, seed, budget, trainer, root, corpus, undisturbed):
    """One run, killed until it ends or the budget is spent; then it must be as if nothing had been."""
    rng = random.Random(f"{seed} {number}")
    variant = KILLED_AS[number % len(KILLED_AS)]
    folder = make_project(root, corpus, undisturbed, variant)
    code, history = None, []
    try:
        while code is None and budget.take():
            kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
            of_a_stage = kind.startswith("stage")
            when = rng.uniform(0, 5.0 if of_a_stage else 1.2 * undisturbed(variant).seconds)
            history.append((kind, round(when, 3)))
            code = kill_stage(folder, kind, when) if of_a_stage else kill_trainer(trainer, folder, kind, when)
            if code is None:
                budget.count(kind)
            else:
                budget.give_back()
                assert code == 0, f"ended with {code}"
        if code is None:
            trainer.train(folder)
        undisturbed(variant).check_equal(folder, beside=OF_A_STAGE)
    except BaseException as error:
        error.add_note(f"chain {number} of seed {seed} ({variant}) in {folder.path} after {history}")
        raise
    budget.runs += 1
    shutil.rmtree(root)


def test_kills_at_any_time_cost_nothing_but_time(trainer, corpus, undisturbed, tmp_path, request):
    kills, seed = request.config.getoption("--kills"), request.config.getoption("--kill-seed")
    for variant in KILLED_AS:
        undisturbed(variant)
    budget, began = Budget(kills), time.monotonic()

    def chains(first):
        number = first
        while budget.made < budget.kills:
            root = tmp_path / f"chain-{number}"
            chain(number, seed, budget, trainer, root, corpus, undisturbed)
            number += 2

    with ThreadPoolExecutor(2) as pool, contextlib.ExitStack() as at_the_end:
        at_the_end.callback(budget.spend)
        for end in [pool.submit(chains, first) for first in range(2)]:
            end.result()
    by_kind = ", ".join(f"{count} {kind}" for kind, count in sorted(budget.done.items()))
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(
            f"\n{budget.made} kills ({by_kind}) in {budget.runs} runs that ended all the same, {budget.lived} of them before a kill; "
            f"{time.monotonic() - began:.0f} s, seed {seed}"
        )
    assert budget.made == kills
