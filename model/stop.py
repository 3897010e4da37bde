"""Being asked to stop: signals set a flag, the loop looks at it, nothing is done inside a handler.

Only where nothing could be lost (before training's first step: imports, compilation, reading; in the other stages) a request ends what is
being done at once: by an exception, and, as those may be swallowed, a little later by leaving.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from model.errors import EXIT_STOPPED, Interrupted

_MERCY_S = 1.5
"""How long `Interrupted` may take to end what is being done, …"""
_MERCY_AT_THE_END_S = 90.0
"""… and how long it may take to leave after that."""


class StopRequest:
    """Why the work should stop, once somebody has asked."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.interrupted = False
        """Whether `Interrupted` was raised for it, wherever that went: what is raised in a destructor goes nowhere."""
        self.last_words: Callable[[], None] = lambda: None
        """Called before the process is left."""
        self._interruptible = False

    def __bool__(self) -> bool:
        return self.reason is not None

    def ask(self, reason: str) -> None:
        """Ask for a stop; the first reason stays."""
        self.reason = self.reason or reason

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Meanwhile a request (made already, or by a signal) raises Interrupted in the main thread, at once."""
        self._interruptible = True
        try:
            if self:
                self._interrupt()
            yield
        finally:
            self._interruptible = False

    def _interrupt(self) -> None:
        if self.interrupted:
            return
        self.interrupted = True
        threading.Thread(target=self._leave, name="leave", daemon=True).start()
        raise Interrupted(self.reason)

    def _leave(self) -> None:
        time.sleep(_MERCY_S)
        if not self._interruptible:
            time.sleep(_MERCY_AT_THE_END_S)
        try:
            self.last_words()
        finally:
            os._exit(EXIT_STOPPED)

    def on_signals(self) -> None:
        """SIGINT, SIGTERM (and Windows' Ctrl-Break) ask for a stop. A second SIGINT leaves at once: sealed checkpoints are whole."""

        def handle(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT and self.reason == "SIGINT":
                os._exit(EXIT_STOPPED)
            self.ask(signal.Signals(number).name)
            if self._interruptible:
                self._interrupt()

        for name in ("SIGINT", "SIGTERM", "SIGBREAK"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), handle)

    def on_input_closed(self) -> None:
        """Ask for a stop when standard input, a pipe that the parent holds open, closes."""

        def watch() -> None:
            while os.read(0, 4096):  # not sys.stdin: a thread inside its lock breaks the interpreter's exit
                pass
            self._parent_gone()

        threading.Thread(target=watch, name="parent-watch", daemon=True).start()

    def on_parent_gone(self) -> None:
        """Ask for a stop when the process that started this one, a launcher of ranks, ends."""
        import psutil

        parent = psutil.Process().parent()

        def watch() -> None:
            while parent is not None and parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE:
                time.sleep(1.0)
            self._parent_gone()

        threading.Thread(target=watch, name="parent-watch", daemon=True).start()

    def _parent_gone(self) -> None:
        self.ask("the process that started the trainer has gone")
        signal.raise_signal(signal.SIGTERM)  # its handler runs in the main thread, which may be waiting for something
