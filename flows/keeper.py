"""How processes are ended, one batch after the other; and the process that does it when the one that started them could not: it was killed,
or its terminal was closed.

`python -m flows.keeper` reads the batches from standard input, a pipe: a line for each, the ids of its processes. When the pipe closes, it
ends them, the last batch first.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import psutil

PATIENCE_S = 45.0
"""A worker gives its flows 30 s to stop resumably."""

OWN_GROUP: dict[str, Any] = {"creationflags": 0x200} if sys.platform == "win32" else {"start_new_session": True}
"""For subprocess.Popen: whom Ctrl-C in the terminal does not reach, so that we say who ends when. (0x200: CREATE_NEW_PROCESS_GROUP)"""


def end(leaders: Sequence[psutil.Process], patience: float = PATIENCE_S) -> None:
    """Ask these to end, all at once; wait for them and for what they started. What is left after `patience` seconds is killed.

    The flows of a worker are asked first, and it sleeps meanwhile: left alone it kills them before they could tell Prefect how they
    ended, and it would begin the next one.
    """
    deadline = time.monotonic() + patience
    family = {process for leader in leaders for process in [leader, *_children(leader, recursive=True)]} | set(_in_groups_of(leaders))
    workers = [leader for leader in leaders if _is_worker(leader)]
    flows = [child for worker in workers for child in _children(worker)]
    try:
        for process in workers if flows else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        for process in flows:
            _ask(process)
        _wait(flows, deadline)
    finally:
        for process in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
    orphans = _in_groups_of([leader for leader in leaders if not _lives(leader)])
    for process in [*leaders, *orphans]:
        _ask(process)
    _wait(family, deadline)
    kill(leaders, family)


def kill(leaders: Sequence[psutil.Process], family: Iterable[psutil.Process] = ()) -> None:
    """End them at once, a worker's flows and their process groups, too. A training is elsewhere: it notices, saves, and leaves."""
    flows = [child for leader in leaders if _is_worker(leader) for child in _children(leader)]
    for process in {*leaders, *flows, *family, *_in_groups_of(leaders)}:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    for process in leaders:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
            process.wait(5.0)


def start_keeper() -> subprocess.Popen[bytes]:
    """The keeper of this process; `tell` it what to keep, and let it go with `dismiss`."""
    return subprocess.Popen([sys.executable, "-m", "flows.keeper"], stdin=subprocess.PIPE, bufsize=0, **OWN_GROUP)


def tell(keeper: subprocess.Popen[bytes], pid: int | None) -> None:
    """One more process of this batch; None: the batch is complete."""
    assert keeper.stdin is not None
    with contextlib.suppress(OSError):  # somebody killed it: then we end them ourselves, as ever
        keeper.stdin.write(b"\n" if pid is None else b" %d" % pid)


def dismiss(keeper: subprocess.Popen[bytes]) -> None:
    """Everything is ended: it has nothing to do."""
    keeper.kill()
    keeper.wait()


def _ask(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        if sys.platform == "win32":
            process.send_signal(signal.CTRL_BREAK_EVENT)
        else:
            process.terminate()


def _wait(processes: Iterable[psutil.Process], deadline: float) -> None:
    while any(map(_lives, processes)) and time.monotonic() < deadline:
        time.sleep(0.1)


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _is_worker(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return process.cmdline()[1:5] == ["-m", "prefect", "worker", "start"]
    return False


def _children(process: psutil.Process, recursive: bool = False) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.children(recursive=recursive)
    return []


def _in_groups_of(leaders: Sequence[psutil.Process]) -> Iterator[psutil.Process]:
    """Also of a leader that is gone: its children go on."""
    if sys.platform == "win32":
        return
    groups = {leader.pid for leader in leaders}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            if os.getpgid(process.pid) in groups:
                yield process


def _keep() -> None:
    batches: list[list[psutil.Process]] = []
    for line in sys.stdin:
        batch = []
        for pid in line.split():
            with contextlib.suppress(psutil.NoSuchProcess):
                batch.append(psutil.Process(int(pid)))
        batches.append(batch)
    for batch in reversed(batches):
        end(batch)


if __name__ == "__main__":
    _keep()
