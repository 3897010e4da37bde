"""What the services missed while they were away: the journal to MLflow, checkpoints and versions to the storage. Repeating it adds nothing.

Each part is tried whatever became of the others, and says in one line what it sent, or what is in its way and what to do about it.
"""

from __future__ import annotations

import collections
import contextlib
import json
import queue
import re
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

from model.errors import Stopped, UserError
from model.secrets import redacted
from model.training.journal import read_current
from tasks import lease, mirror, tracking, versioning
from tasks.forwarder import trainer_lives
from tasks.project import Project
from tasks.steps import start_apart

SILENCE_S = 20.0
"""So long without an answer, and MLflow is taken for dead."""
LONGEST_S = 300.0
"""For all of a journal, however much MLflow has missed: what is left then, the next time sends."""


@dataclass(frozen=True)
class Part:
    """What became of one service. `problem` is None if it has everything now; else one line with the cure."""

    service: str
    sent: int
    message: str
    problem: str | None = None

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return asdict(self)


def sync(project: Project, name: str, stop: threading.Event) -> list[Part]:
    """Bring MLflow and the storage up to date with what lies in the run folder.

    Raises:
        UserError: there is nothing to send: no such experiment, or it was never trained.
        Stopped: `stop` was set meanwhile.
    """
    experiment = project.experiment(name)
    folder = project.run_folder(name)
    if not folder.config.exists() or not project.was_started(name):
        raise UserError(f"{name} has nothing to send yet; train it first: gpt2 {project.training_stage(name)} {name}")
    _settle_fence(project, name)
    parts = [sync_tracking(project, name, stop)]
    finished = any(event["event"] == "finished" for event in read_current(folder.journal))
    if not finished:
        parts.append(_copy_checkpoints(project, name))
    try:
        versioning.configure_remote(project, experiment)
        parts.append(_push(project, name, stop))
    except versioning.StageFailed as error:
        parts.append(Part("storage", 0, "", f"storage.base_folder: not pushed: {error}; when the storage is back: gpt2 sync {name}"))
    if finished and parts[-1].problem is None and not mirror.is_complete(project, name):
        parts.append(_copy_checkpoints(project, name))  # whoever waits for them may be another machine, whose DVC is to record them
    return parts


def _settle_fence(project: Project, name: str) -> None:
    """A stage that was killed leaves its fence behind: is the run still this machine's? Taking the lease and giving it back says so."""
    if lease.fence(project.run_folder(name)).exists() and not trainer_lives(project, name):
        with contextlib.suppress(lease.NotOurs), lease.holding(project, name):
            pass


def sync_tracking(project: Project, name: str, stop: threading.Event, silence: float = SILENCE_S, longest: float = LONGEST_S) -> Part:
    """Send MLflow what it has not got of the journal, in a process of its own. A dead MLflow costs `silence` seconds.

    Raises:
        Stopped: `stop` was set meanwhile.
    """
    if not project.run_folder(name).journal.exists():
        return Part("MLflow", 0, "no journal yet")
    group: dict[str, Any] = {"creationflags": 0x200} if sys.platform == "win32" else {"start_new_session": True}  # CREATE_NEW_PROCESS_GROUP
    process = start_apart(project.root, "tasks.forwarder", name, "--json", **group)
    try:
        return _watch(process, project, name, stop, silence, longest)
    finally:
        process.kill()
        process.wait()


def _watch(process: subprocess.Popen[str], project: Project, name: str, stop: threading.Event, silence: float, longest: float) -> Part:
    arriving: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_pump, args=(process, arriving), daemon=True).start()
    began = heard_at = time.monotonic()
    sent, said = 0, collections.deque[str](maxlen=5)
    overdue = f"no answer within {silence:.0f} s"
    while True:
        if stop.is_set():
            raise Stopped(f"stopped while MLflow got the journal of {name}; the same command goes on")
        try:
            line = arriving.get(timeout=0.2)
        except queue.Empty:
            if time.monotonic() - heard_at > silence or time.monotonic() - began > longest:
                return _away(project, name, sent, overdue)
            continue
        if line is None:
            break
        heard_at = time.monotonic()
        told = _told(line)
        if told.get("sent_by_training"):
            return Part("MLflow", 0, "the training that runs sends it")
        sent = told.get("sent", sent)
        if not told:
            said.append(line.removeprefix("tracking: "))
            overdue = said[-1]
    if process.wait() == 0:
        note = f" ({'; '.join(said)})" if said else ""
        return Part("MLflow", sent, (f"{sent:,} events sent" if sent else "up to date") + note)
    return _away(project, name, sent, said[-1] if said else f"the forwarder ended with {process.returncode}")


def _pump(process: subprocess.Popen[str], arriving: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip():
            arriving.put(line.strip())
    arriving.put(None)


def _told(line: str) -> dict[str, Any]:
    """A line of the forwarder's that is meant for us; empty if it is one for people."""
    try:
        told = json.loads(line)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _away(project: Project, name: str, sent: int, why: str) -> Part:
    where = redacted(tracking.tracking_uri(project, project.experiment(name)))
    some = f"{sent:,} events sent, then " if sent else ""
    return Part("MLflow", sent, "", f"{some}MLflow at {where} does not take the journal: {why}; when it is back: gpt2 sync {name}")


def _copy_checkpoints(project: Project, name: str) -> Part:
    """What DVC does not know yet, because its stage has not ended."""
    if trainer_lives(project, name):
        return Part("storage", 0, "the training that runs copies its checkpoints")
    copies = mirror.Mirror.of(project, name)
    try:
        if copies.is_complete():
            return Part("storage", 0, "has every checkpoint of the unfinished run")
        with lease.holding(project, name) as held:
            copied = mirror.Mirror.of(project, name, held).copy_new()
    except lease.NotOurs as elsewhere:
        return Part("storage", 0, f"{elsewhere}; it copies its own checkpoints")
    except Exception as error:  # every file system of fsspec has errors of its own
        return Part("storage", 0, "", f"storage.base_folder: no copy to {copies.url}: {error}; when it is back: gpt2 sync {name}")
    return Part("storage", len(copied), f"{len(copied):,} checkpoint{'s' * (len(copied) != 1)} copied")


def _push(project: Project, name: str, stop: threading.Event) -> Part:
    lines: list[str] = []
    versioning.push(project, name, on_line=lines.append, stop=stop)
    pushed = next((int(found[1]) for line in lines if (found := re.search(r"(\d+) files? pushed", line))), 0)
    return Part("storage", pushed, f"{pushed:,} files pushed" if pushed else "up to date")
