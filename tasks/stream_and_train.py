"""stream-and-train: the trainer as its own process group, with a forwarder to MLflow and a mirror to the storage beside it.

`python -m tasks.stream_and_train EXPERIMENT`. The trainer talks to nobody; if MLflow or the storage is slow or gone, a curve is late.
Of all machines that share the storage one at a time trains an experiment (tasks/lease.py).
"""

from __future__ import annotations

import contextlib
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

from model.checkpoint.store import CheckpointStore, step_of
from model.config import Experiment
from model.errors import EXIT_FAULT, EXIT_STOPPED, EXIT_USER, Interrupted, Stopped, UserError
from model.run_folder import RunFolder
from tasks import lease, mirror
from tasks.curves import write_curves
from tasks.progress import Progress
from tasks.project import Project
from tasks.starting_point import named_checkpoint
from tasks.steps import run_step, stop_signals
from tasks.tracking import read_config

WATCH_PID = "GPT2_WATCH_PID"
"""Environment: the process (the flow's, or the worker's that runs the flow) whose death should stop the training."""
TRAINED_ELSEWHERE = "GPT2_TRAINED_ELSEWHERE"
"""Environment: set where another machine has trained to the end. What it made is fetched, nothing is trained."""
FORWARDER_GRACE_S = 30.0
"""How long a finished training waits for MLflow to take the last figures; the next run or evaluation sends what is left."""
WINDOWS = sys.platform == "win32"


def stream_and_train(project: Project, name: str) -> None:
    """Train to the end, or go on with it.

    Raises:
        Stopped: asked to, or a parent died; everything is saved.
        UserError: another machine trains this experiment, or has taken it over from here.
        RuntimeError: the trainer was killed.
    """
    asked: list[int] = []
    _note_signals(asked, and_stop=True)
    ancestors = watched_ancestors()
    folder, experiment = project.run_folder(name), project.experiment(name)
    with lease.holding(project, name) as held:
        if folder.begin_anew.exists():
            mirror.set_aside(project, name)
            folder.begin_anew.unlink()
        mirror.bring_back(project, name)
        experiment, left = _for_what_is_left(folder, experiment)
        named = named_checkpoint(project, name, read_config(folder))
        _note_signals(asked)
        if asked or not all(map(_alive, ancestors)):
            raise Stopped(f"training of {name} had not begun")
        trainer = _start_trainer(project.root, folder, experiment, named)
        forwarder = _start_beside(project.root, "tasks.forwarder", name, "--follow")
        held.when_lost = lambda: _kill(trainer, forwarder)
        copying: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if left or (TRAINED_ELSEWHERE not in os.environ and not mirror.is_complete(project, name)):
            copying = mirror.mirroring(
                project,
                name,
                held,
                finished=lambda: trainer.returncode == 0,
                stopping=lambda: bool(asked) or not all(map(_alive, ancestors)),
            )
        with copying:
            told = 0
            progress = Progress(folder.journal)
            while trainer.poll() is None:
                if held.lost is not None:
                    _kill(trainer, forwarder)
                if not told and not all(map(_alive, ancestors)):
                    asked.append(signal.SIGTERM)
                while told < len(asked):
                    _tell(trainer, again=told > 0 and asked[told] == signal.SIGINT)
                    told += 1
                if WATCH_PID not in os.environ:
                    progress.print_now_and_then()
                time.sleep(0.2)
            _let_finish(forwarder, 5.0 if trainer.returncode else FORWARDER_GRACE_S)
    _draw_curves(folder)
    if held.lost is not None:
        raise held.lost
    if trainer.returncode == EXIT_STOPPED:
        raise Stopped(f"training of {name} stopped, all saved; the same command goes on")
    if asked and _was_killed(trainer):
        raise Stopped(f"training of {name} was ended at once; the same command goes on from the last checkpoint")
    if _was_killed(trainer):
        raise RuntimeError(f"the trainer was killed by signal {-trainer.returncode}; the same command goes on from the last checkpoint")
    if trainer.returncode:
        sys.exit(trainer.returncode)


def _for_what_is_left(folder: RunFolder, experiment: Experiment) -> tuple[Experiment, int]:
    """The experiment, and how many steps are left. A training that has all its steps needs no GPU to say so.

    Raises:
        UserError: it has not, and was to be finished by another machine.
    """
    total = read_config(folder).total_steps
    newest = max((step_of(path.name) for path in CheckpointStore(folder.checkpoints).folders()), default=0)
    if newest >= total:
        hardware = experiment.hardware.model_copy(update={"device": "cpu", "devices": 1, "compile": False})
        return experiment.model_copy(update={"hardware": hardware}), 0
    if TRAINED_ELSEWHERE in os.environ:
        raise UserError(
            f"storage.base_folder: {folder.experiment} was trained to step {total:,} elsewhere, and here is step {newest:,} only: the "
            "storage has no copy of the rest; send it from there (gpt2 sync), then run it again"
        )
    return experiment, total - newest


def _note_signals(asked: list[int], and_stop: bool = False) -> None:
    """From now on, add requests to stop to a list; and stop at once, where there is no trainer to tell yet."""

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)  # a library may swallow what is raised here
        if and_stop:
            raise Interrupted(signal.Signals(number).name)

    for number in stop_signals():
        signal.signal(number, ask)


def _draw_curves(folder: RunFolder) -> None:
    try:
        write_curves(folder)
    except OSError as error:  # what it took to train this far counts for more; DVC will miss what is missing
        print(f"warning: the curves for dvc plots were not written: {error}", file=sys.stderr)


def _start_trainer(root: Path, folder: RunFolder, experiment: Experiment, named: Path | None) -> subprocess.Popen[bytes]:
    machine = {"hardware": experiment.hardware, "journal": experiment.journal}
    fields = [f"{name}.{field}={json.dumps(value)}" for name, section in machine.items() for field, value in section.model_dump().items()]
    begin_with = [f"--checkpoint={named}"] if named is not None else []
    return _start_beside(root, "model.training", str(folder.path), "--watch-stdin", *begin_with, *(f"--set={field}" for field in fields))


def _start_beside(root: Path, module: str, *arguments: str) -> subprocess.Popen[bytes]:
    """A process group of its own, so that a Ctrl-C reaches it through us only. It sees our death: its standard input is a pipe we hold."""
    group: dict[str, Any] = {"creationflags": 0x200} if WINDOWS else {"start_new_session": True}  # CREATE_NEW_PROCESS_GROUP
    return subprocess.Popen([sys.executable, "-m", module, *arguments], cwd=root, stdin=subprocess.PIPE, **group)


def _tell(trainer: subprocess.Popen[bytes], again: bool) -> None:
    """Pass a stop request on. A second Ctrl-C does not wait for the save: the last sealed checkpoint is whole."""
    if again:
        _kill(trainer)
    elif trainer.poll() is None:
        trainer.send_signal(signal.CTRL_BREAK_EVENT if WINDOWS else signal.SIGTERM)  # type: ignore[attr-defined, unused-ignore]


def _kill(*processes: subprocess.Popen[bytes]) -> None:
    """End them and what they started (ranks have process groups of their own) without another word of theirs."""
    for process in processes:
        if process.poll() is not None:
            continue  # its number may be another's by now
        with contextlib.suppress(psutil.Error):
            for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    each.kill()


def _was_killed(process: subprocess.Popen[bytes]) -> bool:
    """Windows has no signals: there, a killed process has some exit code."""
    return process.returncode < 0 or (WINDOWS and process.returncode not in (0, EXIT_FAULT, EXIT_USER, EXIT_STOPPED))


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
