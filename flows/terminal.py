"""What a person sees while a flow runs in this process: a line a stage, a bar (or now and then a line) while it trains."""

import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from prefect import State
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from flows.stages import OBSERVERS
from flows.stop import STOP
from tasks.progress import SECONDS_BETWEEN_LINES, Reading
from tasks.progress import Progress as JournalProgress
from tasks.steps import WARNING

_SECONDS_BETWEEN_LOOKS = 0.25


class Terminal:
    """An observer of the stages that writes to standard output. A context: while it is open it follows the journal."""

    def __init__(self, journal: Path) -> None:
        self.console = Console(soft_wrap=True, highlight=False)
        self._journal = journal
        self._bar = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=12),
            TextColumn("{task.description}", markup=False),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._row = self._bar.add_task("", total=None, visible=False)
        self._stage = ""
        self._began = 0.0
        self._training: JournalProgress | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="terminal", daemon=True)

    def __enter__(self) -> "Terminal":
        OBSERVERS.append(self)
        self._bar.start()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        OBSERVERS.remove(self)
        self._closing.set()
        self._thread.join()
        self._bar.stop()

    def began(self, stage: str) -> None:
        """A stage begins."""
        self._stage, self._began = stage, time.monotonic()
        self._bar.update(self._row, description=stage, total=None, completed=0, visible=True)
        if stage in ("train", "post-train"):
            training = JournalProgress(self._journal)
            training.read()  # what an earlier attempt did is not news
            self._training = training

    def said(self, stage: str, line: str) -> None:
        """A stage printed a line."""
        self.console.print(f"  {line}", style="yellow" if line.startswith(WARNING) else "dim", markup=False)

    def ended(self, stage: str, state: State[Any]) -> None:
        """A stage is over."""
        self._training = None
        self._bar.update(self._row, visible=False)
        if state.is_completed():
            took = f"{time.monotonic() - self._began:.0f} s"
            self.console.print(f"[green]✓[/] {stage:<14}{state.message or took}")
        elif state.is_failed():
            self.console.print(f"[red]✗[/] {stage:<14}{state.message}")
        else:
            self.console.print(f"[yellow]■[/] {stage:<14}{state.message}")

    def _follow(self) -> None:
        printed_at, said_stopping = time.monotonic(), False
        shown: Reading | None = None
        while not self._closing.wait(_SECONDS_BETWEEN_LOOKS):
            if STOP.is_set() and not said_stopping:
                said_stopping = True
                self.console.print("[yellow]stopping[/]: the step is finished and saved; Ctrl-C again leaves at once")
            training = self._training
            reading = training.read() if training else None
            if reading is None or reading == shown:
                continue
            shown = reading
            if self.console.is_terminal:
                self._bar.update(self._row, total=reading.total_steps, completed=reading.step, description=reading.line())
            elif time.monotonic() - printed_at >= SECONDS_BETWEEN_LINES:
                printed_at = time.monotonic()
                print(f"  {reading.line()}", file=sys.stdout, flush=True)
