"""One experiment, two clones, one storage: only one trains, and one that was taken over writes no more. With the real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import yaml

from model.checkpoint.store import MANIFEST, CheckpointStore
from model.run_folder import RunFolder
from model.stream.quickstart import write_corpus
from model.training.journal import Event, read_all
from tasks.build_config import build_config
from tasks.project import Project

pytestmark = pytest.mark.slow

NAME = "small"
INTERVAL, LAST = 25, 125
EXPERIMENT = {
    "seed": 3,
    "model": {"preset": "nano", "dropout": 0.1},
    "data": {"max_length": 32, "buffer_size": 64, "lanes": 2},
    "training": {"batch_size": 2, "num_epochs": 1000, "max_steps": LAST, "warmup_steps": 5, "eval_freq": 1000, "eval_iters": 1},
    "checkpoint": {"save_every_n_iterations": INTERVAL, "keep_last": 3},
    "hardware": {"device": "cpu"},
}


@dataclass
class Clones:
    """Clones of one project, on one storage, and the processes that were started in them."""

    base: Path
    seen: set[psutil.Process] = field(default_factory=set)

    @property
    def storage(self) -> Path:
        return self.base / "storage"

    def clone(self, name: str, max_steps: int = LAST) -> Clone:
        root = self.base / name
        root.mkdir()
        if not (self.base / "corpus").exists():
            write_corpus(self.base / "corpus", seed=1, rows=600, files=2)
            (self.base / "no_mlflow").mkdir()  # MLflow is of no interest here, and its import takes seconds
            (self.base / "no_mlflow" / "mlflow.py").write_text("raise ImportError('MLflow is away')\n")
        data = {**EXPERIMENT["data"], "path": str(self.base / "corpus")}
        training = {**EXPERIMENT["training"], "max_steps": max_steps}
        experiment = {**EXPERIMENT, "data": data, "training": training, "storage": {"base_folder": str(self.storage)}}
        (root / "params.yaml").write_text(yaml.safe_dump({"defaults": {}, "experiments": {NAME: experiment}}))
        (root / "overrides.yaml").write_text(f"overrides: {{{NAME}: {{}}}}\n")
        (root / "dvc.yaml").write_text("stages: {}\n")
        build_config(Project(root), NAME)
        return Clone(self, root)

    def copies(self, token: int) -> list[str]:
        """The whole copies in a token's folder, oldest first."""
        return sorted(path.parent.name for path in self.storage.glob(f"checkpoints/*/*/token_{token:08d}/*/{MANIFEST}"))


@dataclass
class Clone:
    """A project folder, as on a machine of its own."""

    clones: Clones
    root: Path

    @property
    def folder(self) -> RunFolder:
        return Project(self.root).run_folder(NAME)

    def start(self, module: str = "tasks.stream_and_train", argument: str = NAME, **environment: str) -> subprocess.Popen[str]:
        unset = ("GPT2_WATCH_PID", "GPT2_HOST", "GPT2_LEASE_S")
        inherited = {key: value for key, value in os.environ.items() if key not in unset}
        path = os.pathsep.join([str(self.clones.base / "no_mlflow"), str(Path(__file__).parents[2])])
        ours = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        with self._log.open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, argument],
                cwd=self.root,
                env={**inherited, **ours, **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                text=True,
            )
        self.clones.seen.add(psutil.Process(process.pid))
        return process

    @property
    def _log(self) -> Path:
        return self.root / "stderr.log"

    def said(self) -> str:
        """What the process that was started last, and those beside it, printed to standard error."""
        return self._log.read_text()

    def error(self) -> str:
        """The one line that says why it ended."""
        lines = [line for line in self.said().splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.said()
        return lines[0]

    def tree(self, process: subprocess.Popen[str]) -> list[psutil.Process]:
        """A stage and all below it, the stage first."""
        stage = psutil.Process(process.pid)
        found = [stage, *stage.children(recursive=True)]
        self.clones.seen.update(found)
        return found

    def journal(self) -> list[Event]:
        return read_all(self.folder.journal)

    def started(self) -> int | None:
        """The step that the last start began with."""
        return next((event["step"] for event in reversed(self.journal()) if event["event"] == "started"), None)

    def sealed(self) -> list[str]:
        return [checkpoint.name for checkpoint in CheckpointStore(self.folder.checkpoints).checkpoints()]


@pytest.fixture
def clones(tmp_path: Path) -> Iterator[Clones]:
    clones = Clones(tmp_path)
    yield clones
    for process in list(clones.seen):
        if process.is_running():
            clones.seen.update(process.children(recursive=True))
    for process in clones.seen:
        if process.is_running():
            process.kill()
    psutil.wait_procs(clones.seen, 10)


def until(
    true: Callable[[], object], process: subprocess.Popen[str] | None = None, clone: Clone | None = None, seconds: float = 60
) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, clone and clone.said()
        assert process is None or process.poll() is None, clone and clone.said()
        time.sleep(0.02)


def end(process: subprocess.Popen[str]) -> int:
    process.send_signal(signal.SIGTERM)
    return process.wait(60)


def test_a_second_one_is_refused_and_told_who_trains_where_and_since_when(clones: Clones) -> None:
    a, b = clones.clone("a", max_steps=1_000_000), clones.clone("b", max_steps=1_000_000)
    first = a.start(GPT2_HOST="machine-a", GPT2_LEASE_S="4")
    until(a.journal, first, a)
    second = b.start(GPT2_HOST="machine-b", GPT2_LEASE_S="4")
    assert second.wait(60) == 2
    assert f"{NAME} is in use by process {first.pid} on machine-a since 20" in b.error()
    assert not b.folder.journal.exists()
    assert end(first) == 75
    third = b.start(GPT2_HOST="machine-b", GPT2_LEASE_S="60")  # the first gave it back: nobody waits for a minute
    until(lambda: b.started() == a.journal()[-1]["step"], third, b, seconds=30)
    assert end(third) == 75


def test_a_paused_one_that_wakes_after_it_was_taken_over_writes_no_more(clones: Clones) -> None:
    a, b = clones.clone("a", max_steps=1_000_000), clones.clone("b", max_steps=1_000_000)
    paused = a.start(GPT2_HOST="machine-a", GPT2_LEASE_S="2")
    until(lambda: clones.copies(1), paused, a)
    tree = a.tree(paused)
    for process in tree:
        process.suspend()

    patient = b.start(GPT2_HOST="machine-b", GPT2_LEASE_S="60")
    until(lambda: "sign of life" in b.said(), patient, b)
    began = time.monotonic()
    assert end(patient) == 75
    assert time.monotonic() - began < 15, "it does not wait for the lease to expire"

    second = b.start(GPT2_HOST="machine-b", GPT2_LEASE_S="2")
    until(lambda: clones.copies(2) and not clones.copies(1), second, b)
    assert f"process {paused.pid} on machine-a" in b.said()
    assert end(second) == 75

    def contents(folder: Path) -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    there, events, sealed = contents(clones.storage), a.journal(), a.sealed()
    for process in tree:
        process.resume()
    assert paused.wait(30) == 2
    assert f"{NAME} was taken over by process {second.pid} on machine-b since 20" in a.error()
    assert not any(process.is_running() for process in tree[1:])
    assert contents(clones.storage) == there
    assert a.sealed() == sealed
    assert len(a.journal()) - len(events) < INTERVAL
