"""stream-and-train: the trainer as its own process group, with a forwarder to MLflow and a mirror to the storage beside it.

`python -m tasks.stream_and_train EXPERIMENT`. The trainer talks to nobody; if MLflow or the storage is slow or gone, a curve is late.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from model.config import Experiment
from model.errors import EXIT_STOPPED, Stopped
from model.run_folder import RunFolder
from tasks import mirror
from tasks.progress import Progress
from tasks.project import Project
from tasks.steps import run_step

WATCH_PID = "GPT2_WATCH_PID"
"""Environment: the process (the flow's, or the worker's that runs the flow) whose death should stop the training."""
FORWARDER_GRACE_S = 30.0
"""How long a finished training waits for MLflow to take the last figures; the next run or evaluation sends what is left."""
WINDOWS = sys.platform == "win32"


def stream_and_train(project: Project, name: str) -> None:
    """Train to the end, or go on with it.

    Raises:
        Stopped: asked to, or a parent died; everything is saved.
    """
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask)
    ancestors = watched_ancestors()
    folder, experiment = project.run_folder(name), project.experiment(name)
    mirror.bring_back(project, name)
    trainer = _start_trainer(project.root, folder, experiment)
    forwarder = _start_beside(project.root, "tasks.forwarder", name, "--follow")
    with mirror.mirroring(project, name):
        told = 0
        progress = Progress(folder.journal)
        while trainer.poll() is None:
            if not told and not all(map(_alive, ancestors)):
                asked.append(signal.SIGTERM)
            while told < len(asked):
                _tell(trainer, again=told > 0 and asked[told] == signal.SIGINT)
                told += 1
            if WATCH_PID not in os.environ:
                progress.print_now_and_then()
            time.sleep(0.2)
    _let_finish(forwarder, 5.0 if trainer.returncode else FORWARDER_GRACE_S)
    if trainer.returncode == EXIT_STOPPED:
        raise Stopped(f"training of {name} stopped, all saved; the same command goes on")
    if trainer.returncode:
        sys.exit(trainer.returncode if trainer.returncode > 0 else 1)


def _start_trainer(root: Path, folder: RunFolder, experiment: Experiment) -> subprocess.Popen[bytes]:
    machine = {"hardware": experiment.hardware, "journal": experiment.journal}
    fields = [f"{name}.{field}={json.dumps(value)}" for name, section in machine.items() for field, value in section.model_dump().items()]
    return _start_beside(root, "model.training", str(folder.path), "--watch-stdin", *(f"--set={field}" for field in fields))


def _start_beside(root: Path, module: str, *arguments: str) -> subprocess.Popen[bytes]:
    """A process group of its own, so that a Ctrl-C reaches it through us only. It sees our death: its standard input is a pipe we hold."""
    group: dict[str, Any] = {"creationflags": 0x200} if WINDOWS else {"start_new_session": True}  # CREATE_NEW_PROCESS_GROUP
    return subprocess.Popen([sys.executable, "-m", module, *arguments], cwd=root, stdin=subprocess.PIPE, **group)


def _tell(trainer: subprocess.Popen[bytes], again: bool) -> None:
    """Pass a stop request on. A second Ctrl-C does not wait for the save: the last sealed checkpoint is whole."""
    if again:
        trainer.kill()
    elif trainer.poll() is None:
        trainer.send_signal(signal.CTRL_BREAK_EVENT if WINDOWS else signal.SIGTERM)  # type: ignore[attr-defined, unused-ignore]


def _let_finish(forwarder: subprocess.Popen[bytes], seconds: float) -> None:
    assert forwarder.stdin is not None
    forwarder.stdin.close()  # tells it that nothing more comes: the trainer is gone, with or without a last word
    try:
        forwarder.wait(seconds)
    except subprocess.TimeoutExpired:
        print("MLflow does not take the figures now; they are sent at the next run or evaluation", file=sys.stderr)
        forwarder.kill()
        forwarder.wait()


def watched_ancestors() -> list[psutil.Process]:
    """The processes whose death means that nobody waits for this training: parents up to the one that WATCH_PID names, else up to dvc.

    Started by hand, nobody is watched: closing a terminal is no reason to stop.
    """
    parents = psutil.Process().parents()
    pids = [parent.pid for parent in parents]
    top = int(os.environ.get(WATCH_PID, "0"))
    if top:
        if top not in pids:
            raise Stopped(f"process {top}, which asked for this training, has gone")
        return parents[: pids.index(top) + 1]
    for depth, parent in enumerate(parents):
        try:
            if any("dvc" in Path(part).name for part in parent.cmdline()[:3]):
                return parents[: depth + 1]
        except psutil.Error:
            return []
    return []


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    run_step(stream_and_train)
