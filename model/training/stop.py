"""Being asked to stop: signals set a flag, the loop looks at it, nothing is done inside a handler."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from model.errors import EXIT_STOPPED


class StopRequest:
    """Why training should stop, once somebody has asked."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def __bool__(self) -> bool:
        return self.reason is not None

    def ask(self, reason: str) -> None:
        """Ask for a stop; the first reason stays."""
        self.reason = self.reason or reason

    def on_signals(self) -> None:
        """SIGINT, SIGTERM (and Windows' Ctrl-Break) ask for a stop. A second SIGINT leaves at once: sealed checkpoints are whole."""

        def handle(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT and self.reason == "SIGINT":
                os._exit(EXIT_STOPPED)
            self.ask(signal.Signals(number).name)

        for name in ("SIGINT", "SIGTERM", "SIGBREAK"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), handle)

    def on_parent_gone(self) -> None:
        """Ask for a stop when standard input, a pipe that the parent holds open, closes."""

        def watch() -> None:
            while os.read(0, 4096):  # not sys.stdin: a thread inside its lock breaks the interpreter's exit
                pass
            self.ask("the process that started the trainer has gone")

        threading.Thread(target=watch, name="parent-watch", daemon=True).start()
