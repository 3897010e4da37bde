"""Registration and evaluation beside a training that goes on: the stages' own programs, without DVC, whose locks the training holds.

What they write is what the stages write, for whatever checkpoints there are. Once training is done the stages complete it.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable

import psutil

from model.errors import EXIT_STOPPED, EXIT_USER, Stopped, UserError
from tasks import mirror
from tasks.overview import checkpoint_list
from tasks.project import Project
from tasks.steps import ERROR, STOPPED, start_apart

PROGRAMS = ("tasks.checkpoint_register", "tasks.evaluate_each_checkpoint")
TRIES = 3
"""Checkpoints come and, by `checkpoint.keep_last`, go meanwhile."""
STOPS_WITHIN_S = 10.0
NICENESS = 10
"""A tenth of what a training on the same processors gets: enough to go on beside it. (At 19 it would stand still there.)"""


def evaluate_new(project: Project, name: str, *, on_line: Callable[[str], None], stop: threading.Event) -> list[str]:
    """Register and score the checkpoints that are not; returns the names of those that are scored now and were not before. A clone that has
    none of them takes the copies in the storage.

    The programs run at a low priority: a training on the same machine comes first.

    Raises:
        UserError: there is no such experiment, or its user made a mistake.
        Stopped: `stop` was set meanwhile.
        RuntimeError: a program failed.
    """
    folder = project.run_folder(name)
    project.experiment(name)
    if not folder.config.exists():
        on_line(f"{name} was not begun in {project.root}: it is scored where it was")
        return []
    mirror.bring_back(project, name)
    missing = _unscored(project, name)
    for attempt in range(TRIES if missing else 0):
        there = _whole(project, name)
        problem = next(filter(None, (_run(project, program, name, on_line, stop) for program in PROGRAMS)), None)
        if problem is None:
            break
        if attempt + 1 == TRIES or there <= _whole(project, name):
            raise problem
        on_line(f"checkpoints of {name} went meanwhile; once more with those that are there")
    return sorted(missing - _unscored(project, name))


def stand_back(pid: int | None = None) -> None:
    """Give a process (by default this one) a low priority."""
    psutil.Process(pid).nice(getattr(psutil, "BELOW_NORMAL_PRIORITY_CLASS", NICENESS))  # the former on Windows


def _whole(project: Project, name: str) -> set[str]:
    return {row["name"] for row in checkpoint_list(project, name) if row["whole"]}


def _unscored(project: Project, name: str) -> set[str]:
    return {row["name"] for row in checkpoint_list(project, name) if row["whole"] and row["questions"] is None}


def _run(project: Project, program: str, name: str, on_line: Callable[[str], None], stop: threading.Event) -> Exception | None:
    """Run a stage's program to its end; what went wrong."""
    process = start_apart(project.root, program, name)
    try:
        stand_back(process.pid)
        lines: list[str] = []
        reader = threading.Thread(target=_pump, args=(process, lines, on_line), daemon=True)
        reader.start()
        while reader.is_alive():
            reader.join(0.2)
            if stop.is_set():
                _end(process)
                raise Stopped(f"the evaluation of {name} was stopped; it is done when training is")
        code = process.wait()
    finally:
        _end(process)
    said = next((line.removeprefix(ERROR).removeprefix(STOPPED) for line in reversed(lines) if line.startswith(ERROR)), "")
    if code == EXIT_STOPPED:
        raise Stopped(said)
    if code == EXIT_USER:
        return UserError(said)
    return RuntimeError(said or f"{program} ended with {code}") if code else None


def _pump(process: subprocess.Popen[str], lines: list[str], on_line: Callable[[str], None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip():
            lines.append(line.rstrip())
            on_line(line.rstrip())


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.terminate()
        deadline = time.monotonic() + STOPS_WITHIN_S
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.kill()
    process.wait()
