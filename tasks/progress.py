"""How far a training is, read from its journal. The terminal's bar, the flow's artifact and `gpt2 status` all show this."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from model.training.journal import Event, parse

SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class Reading:
    """The state of a training at its last step."""

    step: int
    total_steps: int
    loss: float | None
    learning_rate: float
    tokens_per_s: float
    tokens: int
    validation_bits_per_byte: float | None
    seconds_left: float | None

    def line(self) -> str:
        """One line for people."""
        parts = [f"step {self.step:,}/{self.total_steps:,}", f"loss {self.loss:.3f}" if self.loss is not None else "loss is not finite"]
        if self.validation_bits_per_byte is not None:
            parts.append(f"validation {self.validation_bits_per_byte:.3f} bits/byte")
        parts += [f"lr {self.learning_rate:.1e}", f"{self.tokens_per_s:,.0f} tokens/s"]
        if self.seconds_left is not None:
            minutes, seconds = divmod(round(self.seconds_left), 60)
            hours, minutes = divmod(minutes, 60)
            parts.append(f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left")
        return " · ".join(parts)


class Progress:
    """Follows one journal. `read` costs only what was written since the last time."""

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._position = 0
        self._total_steps = 0
        self._began: tuple[float, int] | None = None
        self._step_event: Event | None = None
        self._validation: float | None = None
        self.checkpoint: str | None = None
        """The name of the checkpoint that was sealed last, as far as it was read."""
        self._printed = time.monotonic()
        self._printed_step = -1

    def read(self) -> Reading | None:
        """The newest state; None before the first step."""
        for event in self._new_events():
            if event["event"] == "started":
                self._total_steps, self._began, self._step_event = event["total_steps"], None, None
            elif event["event"] == "step":
                self._step_event = event
                self._began = self._began or (event["time"], event["step"])
            elif event["event"] == "validation":
                self._validation = event["bits_per_byte"]
            elif event["event"] == "checkpoint":
                self.checkpoint = event["name"]
        newest = self._step_event
        if newest is None or self._began is None:
            return None
        elapsed, steps = newest["time"] - self._began[0], newest["step"] - self._began[1]
        left = max(0, self._total_steps - newest["step"]) * elapsed / steps if steps else None
        return Reading(
            step=newest["step"],
            total_steps=self._total_steps,
            loss=newest["loss"],
            learning_rate=newest["learning_rate"],
            tokens_per_s=newest["tokens_per_s"],
            tokens=newest["tokens"],
            validation_bits_per_byte=self._validation,
            seconds_left=left,
        )

    def print_now_and_then(self) -> None:
        """Print a line if something happened and the last one is a while ago."""
        if time.monotonic() - self._printed < SECONDS_BETWEEN_LINES:
            return
        reading = self.read()
        if reading is not None and reading.step != self._printed_step:
            print(reading.line(), flush=True)
            self._printed, self._printed_step = time.monotonic(), reading.step

    def _new_events(self) -> list[Event]:
        try:
            if self._journal.stat().st_size < self._position:
                self._position = 0  # a new journal took its place
            with self._journal.open("rb") as file:
                file.seek(self._position)
                written = file.read()
        except FileNotFoundError:
            return []
        whole = written[: written.rfind(b"\n") + 1]
        self._position += len(whole)
        return [event for line in whole.splitlines(keepends=True) if (event := parse(line)) is not None]
