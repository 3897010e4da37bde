"""Services that run side by side under one terminal: started in batches, watched, and ended in the opposite order, whatever happens."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil

from flows import keeper
from flows.stop import STOP
from model.errors import EXIT_STOPPED
from model.secrets import redacted
from tasks.steps import stop_signals

STARTS_WITHIN_S = 180.0
_TAIL = 1 << 16
"""So much of a log is looked through for the line that tells."""
_TELLING = (re.compile(r"^[\w.]+(Error|Exception)\b"), re.compile(r"\b(error|fatal|critical|already in use)\b", re.IGNORECASE))
"""What a telling line looks like: the end of a traceback, else any complaint."""


@dataclass(frozen=True)
class Service:
    """A Python module that is run with its arguments, and goes on until it is ended."""

    name: str
    command: list[str]
    environment: dict[str, str] = field(repr=False)


class Desk:
    """The processes. Each leads a group of its own, so that Ctrl-C reaches them through us and in order; a keeper beside them ends them
    if we cannot. What each prints goes to `logs`/<name>.log."""

    def __init__(self, folder: Path, logs: Path) -> None:
        self._folder = folder
        self._logs = logs
        self._batches: list[dict[str, psutil.Popen]] = []
        self._keeper = keeper.start_keeper()
        for number in stop_signals():
            signal.signal(number, self._on_signal)

    def start(self, *services: Service) -> None:
        """Start a batch: services that may be ended all at once."""
        if STOP.is_set():
            return
        batch: dict[str, psutil.Popen] = {}
        self._batches.append(batch)
        for service in services:
            with self._log(service.name).open("wb") as log:
                batch[service.name] = psutil.Popen(
                    [sys.executable, "-m", *service.command],
                    cwd=self._folder,
                    env=service.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    **keeper.OWN_GROUP,
                )
            keeper.tell(self._keeper, batch[service.name].pid)
            print(f"{service.name} starts", flush=True)
        keeper.tell(self._keeper, None)

    def wait_until(self, name: str, answers: Callable[[], bool]) -> None:
        """Wait until a service answers, or the desk is asked to stop.

        Raises:
            ConnectionError: it does not in time, or one of the services ended.
        """
        deadline = time.monotonic() + STARTS_WITHIN_S
        while not STOP.is_set() and not answers():
            self.check()
            if time.monotonic() > deadline:
                raise ConnectionError(f"{name} does not answer: {self._why(name)}")
            STOP.wait(0.3)

    def check(self) -> None:
        """All are alive.

        Raises:
            ConnectionError: one has ended; all others are to be ended, too.
        """
        for batch in self._batches:
            for name, process in batch.items():
                if process.poll() is not None:
                    raise ConnectionError(f"{name} ended with exit code {process.returncode}: {self._why(name)}")

    def end(self) -> None:
        """End them, last started first."""
        for batch in reversed(self._batches):
            print(f"{' and '.join(batch)} end{'s' * (len(batch) == 1)}", flush=True)
            keeper.end(list(batch.values()))
        keeper.dismiss(self._keeper)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """The first Ctrl-C (or SIGTERM) asks for the end, the second has it at once."""
        if STOP.is_set():
            for batch in reversed(self._batches):
                keeper.kill(list(batch.values()))
            keeper.dismiss(self._keeper)
            os._exit(EXIT_STOPPED)
        STOP.set()

    def _log(self, name: str) -> Path:
        return self._logs / f"{name.replace(' ', '-')}.log"

    def _why(self, name: str) -> str:
        """The telling line of a service's log, else its last one; and where the log is."""
        log = self._log(name)
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL))
            lines = [" ".join(line.split()) for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        telling = [[line for line in lines if pattern.search(line)] for pattern in _TELLING]
        line = next((found[-1] for found in [*telling, lines] if found), "it printed nothing")
        return f"{redacted(line)[:400]} (all of it in {log})"
