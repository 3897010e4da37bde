"""What every stage's `main` does: one argument, one line for an error, and exit codes that the flow and scripts rely on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from model.errors import EXIT_FAULT, EXIT_STOPPED, EXIT_USER, Interrupted, Stopped, UserError
from model.secrets import redacted
from model.stop import StopRequest
from tasks.project import Project, find_project

Step = Callable[[Project, str], None]

ERROR = "error: "
"""Begins the one line that says what went wrong; the flow looks for it."""
STOPPED = "stopped: "
"""Follows it if nothing went wrong."""
WARNING = "warning: "
"""Begins a line about what was passed over; the work goes on."""


def run_step(step: Step, argv: Sequence[str] | None = None) -> NoReturn:
    """Run `step(project, experiment)` for the experiment named on the command line, and exit.

    0 done · 1 a fault (with its traceback) · 2 the user's mistake · 75 stopped, the same command goes on.
    SIGTERM, SIGINT and Windows' SIGBREAK arrive in the step as `Interrupted`, and if that leads nowhere, the process is left; a step that
    would rather finish something first sets handlers of its own.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) != 1 or arguments[0].startswith("-"):
        _say(f"give one experiment's name: python -m tasks.{step.__name__} quickstart")
        sys.exit(EXIT_USER)
    stop = StopRequest()
    stop.last_words = lambda: _say(f"{STOPPED}{stop.reason} received")
    stop.on_signals()
    try:
        with stop.interruptible():
            step(find_project(), arguments[0])
    except Stopped as stopped:
        _stopped(str(stopped))
    except (Exception, Interrupted) as error:
        if isinstance(error, Interrupted):  # by our handler or by one of the step's own
            _stopped(f"{error} received")
        if stop.interrupted:
            _stopped(f"{stop.reason} received")
        if isinstance(error, UserError):
            _say(str(error))
            sys.exit(EXIT_USER)
        print(redacted("".join(traceback.format_exception(error))).rstrip(), file=sys.stderr)
        _say(f"{type(error).__name__}: {error}")
        sys.exit(EXIT_FAULT)
    sys.exit(0)


def start_apart(root: Path, *command: str, **options: Any) -> subprocess.Popen[str]:
    """A Python module as a process of its own in the project's folder, whose lines, errors among them, come through a pipe."""
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=root,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        **options,
    )


def stop_signals() -> list[signal.Signals]:
    """The signals that ask for a stop on this system: Ctrl-C's and SIGTERM, on Windows Ctrl-Break's, too."""
    return [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGBREAK") if name in signal.Signals.__members__]


def _stopped(why: str) -> NoReturn:
    _say(f"{STOPPED}{why}")
    sys.exit(EXIT_STOPPED)


def _say(message: str) -> None:
    print(ERROR + " ".join(redacted(message).split()), file=sys.stderr, flush=True)
