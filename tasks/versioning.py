"""The adapter to DVC: what is up to date, run one stage, push. DVC runs as a process of its own; nothing else here knows it.

A stage is started as the leader of its own process group. Its lines come back as they appear, a stop request goes down to the stage
(never to DVC, which then records what happened and lets go of its locks), and `GPT2_WATCH_PID` names the process with which the
training must end.
"""

from __future__ import annotations

import collections
import configparser
import contextlib
import itertools
import json
import math
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil

from model.config import Experiment
from model.errors import EXIT_STOPPED, EXIT_USER, Stopped, UserError
from model.params import read_long_yaml
from model.secrets import redacted
from tasks import pushed
from tasks.project import Project
from tasks.steps import ERROR, STOPPED

STAGES = ("build-config", "train", "register", "evaluate")
"""The stages of dvc.yaml, in their order. A post-training has `post-train` in the place of `train`: see `stages_of`."""

REMOTE = "storage"
"""The DVC remote of .dvc/config."""

_SKIPPED = "didn't change, skipping"
_BUSY = ("is busy, it is being blocked by", "Unable to acquire lock")
_CHATTER = re.compile(
    r"Running stage |> python |(Generating|Updating) lock file |To (track|enable) |\tgit add|\tdvc config|Use `dvc push`|Stage '"
    r"|Data and pipelines are up to date|ERROR: failed to reproduce|\s+\(PID |If there are no processes with such PIDs"
    rf"|{ERROR}"
)
"""DVC's own lines, and the one that the exception repeats."""

Report = Callable[[str], None]


def stages_of(project: Project, experiment: str) -> tuple[str, ...]:
    """The experiment's stages in dvc.yaml, in their order."""
    return tuple(project.training_stage(experiment) if stage == "train" else stage for stage in STAGES)


class StageFailed(RuntimeError):
    """A stage ended with a fault, of which the message is one line; the lines that came before say more."""


def stage_states(project: Project, experiment: str) -> dict[str, str]:
    """What DVC says of each stage: `done`, `changed` (what it read or wrote is not what its last run did), `never run`, or `running`."""
    recorded, stages = _recorded_stages(project), stages_of(project, experiment)
    changed = _changed_stages(project, experiment, stages)
    found = {}
    for stage in stages:
        state = changed if changed is not None else _changed_stages(project, experiment, [stage])
        if f"{stage}@{experiment}" not in recorded and state is not None:
            found[stage] = "never run"
        else:
            found[stage] = "running" if state is None else "changed" if stage in state else "done"
    return found


def up_to_date(project: Project, experiment: str) -> list[str]:
    """The stages that DVC would skip now, up to the first that it would run: what follows that one is not known before it ran."""
    stages = stages_of(project, experiment)
    changed = _changed_stages(project, experiment, stages)
    return [] if changed is None else list(itertools.takewhile(lambda stage: stage not in changed, stages))


def run_stage(
    project: Project,
    stage: str,
    experiment: str,
    *,
    on_line: Report,
    stop: threading.Event,
    watch_pid: int,
    grace: float = 25.0,
    patience: float = 60.0,
    force: bool = False,
) -> bool:
    """Run one stage of one experiment under DVC, and wait for it. True: it ran. False: DVC found it up to date (`force` does not ask).

    `on_line` gets the stage's own lines. When `stop` is set the stage is asked to stop resumably, and after `grace` seconds made to.
    If another DVC process works on the same files it waits up to `patience` seconds for it.

    Raises:
        UserError: the stage said that its user made a mistake, or another process still works on this experiment.
        Stopped: the stage was stopped, by `stop` or by something else, and can go on.
        StageFailed: anything else.
    """
    deadline = time.monotonic() + patience
    repro = ["repro", *(["--force"] if force else []), "--single-item", f"{stage}@{experiment}"]
    waiting = False
    while True:
        if stop.is_set():
            raise Stopped(f"stopped before {stage} of {experiment}; the same command goes on")
        exit_code, lines = _run(project, repro, on_line, stop, watch_pid, grace)
        if exit_code == 0:
            return not any(_SKIPPED in line for line in lines)
        if stop.is_set():
            raise Stopped(_complaint(lines) or f"{stage} of {experiment} was stopped; the same command goes on")
        if not _is_busy(lines):
            break
        if time.monotonic() > deadline:
            raise UserError(f"{experiment}: another process works on it: {_blocker(lines)}; wait for it, or end it")
        if not waiting:
            on_line(f"waiting for another process that works on {experiment}: {_blocker(lines)}")
            waiting = True
        stop.wait(2.0)
    stage_code = _stage_exit_code(lines)
    if stage_code == EXIT_USER:
        raise UserError(_complaint(lines) or f"{stage} of {experiment} ended with {EXIT_USER}")
    if stage_code == EXIT_STOPPED:
        raise Stopped(_complaint(lines) or f"{stage} of {experiment} was stopped; the same command goes on")
    raise StageFailed(f"{stage} of {experiment} failed: {_complaint(lines) or _last_words(lines)}")


def push(project: Project, experiment: str, *, on_line: Report, stop: threading.Event, patience: float = 60.0) -> None:
    """Copy what the stages of an experiment wrote to the external storage, and note there where `gpt2 restore` finds its checkpoints.

    Raises:
        StageFailed: the storage did not take it; a later push catches up.
        Stopped: `stop` was set meanwhile.
    """
    _push(project, experiment, on_line, stop, patience)
    try:
        try:
            pushed.note_pushed(project, experiment)
        except pushed.NotThere as lost:
            on_line(f"{lost}: pushing again")
            try:
                _push(project, experiment, on_line, stop, patience)
                pushed.note_pushed(project, experiment)
            except BaseException:
                with contextlib.suppress(Exception):  # what failed before says why
                    lost.put_back()
                raise
    except (Stopped, StageFailed):
        raise
    except Exception as error:  # every file system of fsspec has errors of its own
        raise StageFailed(f"pushed, but gpt2 restore will not find it: {redacted(str(error))}") from error


def _push(project: Project, experiment: str, on_line: Report, stop: threading.Event, patience: float) -> None:
    deadline = time.monotonic() + patience
    targets = [f"{stage}@{experiment}" for stage in stages_of(project, experiment)]
    while True:
        exit_code, lines = _run(project, ["push", *targets], on_line, stop, os.getpid(), grace=0.0)
        if exit_code == 0:
            return
        if stop.is_set():
            raise Stopped(f"the push of {experiment} was stopped")
        if not _is_busy(lines) or time.monotonic() > deadline:
            raise StageFailed("dvc push: " + " ".join(lines[-3:]))
        stop.wait(2.0)


def configure_remote(project: Project, experiment: Experiment) -> None:
    """Make the experiment's `storage.base_folder` DVC's remote. What differs from .dvc/config goes into .dvc/config.local, which
    git ignores: a folder of this machine is nobody else's."""
    storage = project.storage(experiment)
    url = f"{storage.rstrip('/')}/dvc" if "://" in storage else str(Path(storage) / "dvc")
    committed, local = _remote_url(project, "config"), _remote_url(project, "config.local")
    if (local or committed) == url:
        return
    change = ["--unset", REMOTE, "url"] if committed == url else [REMOTE, "url", url]
    result = _dvc(project, "remote", "modify", "--local", *change)
    if result.returncode:
        raise StageFailed(f"storage.base_folder: DVC does not take {url} as a remote: {redacted(result.stderr.strip())}")


def _remote_url(project: Project, name: str) -> str | None:
    """The remote's URL in one of DVC's config files; a relative path is resolved from the file's folder, as DVC does it."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(project.root / ".dvc" / name, encoding="utf-8")
    url = parser.get(f"'remote \"{REMOTE}\"'", "url", fallback=None)
    if url is None or "://" in url:
        return url
    return str((project.root / ".dvc" / url).resolve())


def _recorded_stages(project: Project) -> set[str]:
    """The stages that DVC has a record of: `train@quickstart`, …"""
    lock = project.root / "dvc.lock"
    recorded = read_long_yaml(lock) if lock.exists() else None
    stages = recorded.get("stages") if isinstance(recorded, dict) else None
    return set(stages) if isinstance(stages, dict) else set()


def _changed_stages(project: Project, experiment: str, stages: Sequence[str]) -> set[str] | None:
    """Which of the stages `dvc status` calls changed; None if one of them is running."""
    if not project.was_started(experiment):
        return set(stages)
    result = _dvc(project, "status", "--json", *(f"{stage}@{experiment}" for stage in stages))
    if result.returncode == 0:
        return {target.partition("@")[0] for target in json.loads(result.stdout)}
    if _is_busy(result.stderr.splitlines()):
        return None
    raise StageFailed("dvc status: " + " ".join(redacted(result.stderr).split()))


def _dvc(project: Project, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(
        command, cwd=project.root, env=_environment(os.getpid()), stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


def _environment(watch_pid: int) -> dict[str, str]:
    """The stages' `python` is this one, whether or not its environment was activated, and their shell the plain one: DVC would take
    the user's, which for a service's account is often /usr/sbin/nologin."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    ours = {"PATH": path, "SHELL": "/bin/sh", "DVC_NO_ANALYTICS": "1", "PYTHONUNBUFFERED": "1", "GPT2_WATCH_PID": str(watch_pid)}
    return {**os.environ, **ours}


def _run(
    project: Project, arguments: list[str], on_line: Report, stop: threading.Event, watch_pid: int, grace: float
) -> tuple[int, list[str]]:
    """Run a DVC command in a process group of its own until it and all that it started are gone; its exit code and last lines."""
    group: dict[str, Any] = {"start_new_session": True}
    if sys.platform == "win32":
        group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    process = subprocess.Popen(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=project.root,
        env=_environment(watch_pid),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        **group,
    )
    arriving: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_pump, args=(process, arriving), daemon=True).start()
    lines: collections.deque[str] = collections.deque(maxlen=200)
    asked: set[int] = set()
    ended_at = stopped_at = None
    try:
        while True:
            with contextlib.suppress(queue.Empty):
                line = arriving.get(timeout=0.2)
                if line is None:  # the pipe's last writer is gone: DVC, the stage and the trainer
                    break
                lines.append(line)
                if not _CHATTER.match(line):
                    on_line(line)
            if process.poll() is not None:
                ended_at = ended_at or time.monotonic()
            if stop.is_set():
                stopped_at = stopped_at or time.monotonic()
                _ask_to_stop(process.pid, asked)
            overdue = min(ended_at or math.inf, stopped_at or math.inf) + grace
            if time.monotonic() > overdue:
                break
    finally:
        _kill_group(process)
    return process.wait(), list(lines)


def _pump(process: subprocess.Popen[str], arriving: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip():
            arriving.put(redacted(line.rstrip()))
    arriving.put(None)


def _ask_to_stop(parent_pid: int, asked: set[int]) -> None:
    """SIGTERM, once, to the stage that DVC runs. DVC itself goes on: it notes that the stage failed, and lets go of its locks. While
    it only hashes or links files there is nothing to stop.

    DVC starts a stage through a shell. Some shells become the command that they run, others (dash) wait for it and would not pass the
    signal on: those are passed over.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(parent_pid).children():
            if _is_shell(child):
                _ask_to_stop(child.pid, asked)
            elif child.pid not in asked:
                asked.add(child.pid)
                child.terminate()


def _is_shell(process: psutil.Process) -> bool:
    """Whether it is the shell that DVC starts a stage with: `/bin/sh -c "python -m …"`."""
    return process.cmdline()[-2:-1] in (["-c"], ["/c"])


def _kill_group(process: subprocess.Popen[str]) -> None:
    """End at once what is left of the group. A trainer is in a group of its own: it notices, saves, and leaves."""
    if sys.platform == "win32":
        process.kill()
    else:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def _is_busy(lines: Iterable[str]) -> bool:
    return any(busy in line for line in lines for busy in _BUSY)


def _blocker(lines: Sequence[str]) -> str:
    """Who holds DVC's lock, in DVC's words: `(PID 4711): dvc repro train@quickstart`."""
    return next((line.strip() for line in lines if line.strip().startswith("(PID ")), "a DVC command")


def _complaint(lines: Sequence[str]) -> str:
    """The one line in which the stage said what went wrong; empty if it said nothing."""
    return next((line.removeprefix(ERROR).removeprefix(STOPPED) for line in reversed(lines) if line.startswith(ERROR)), "")


def _last_words(lines: Sequence[str]) -> str:
    """For a stage that was killed, and for DVC's own errors."""
    return next((line for line in reversed(lines) if line.startswith("ERROR: ")), lines[-1] if lines else "it said nothing")


def _stage_exit_code(lines: Sequence[str]) -> int | None:
    found = [match for line in lines if (match := re.search(r"failed to run: .*exited with (-?\d+)", line))]
    return int(found[-1][1]) if found else None
