"""The journal: the trainer's append-only record, one JSON event a line. Everything shown anywhere comes from it.

Every event has `seq` (0, 1, 2, …), `time` (seconds since 1970) and `event`:

    started     step, config_digest, resumed_from, total_steps, device, ranks, micro_batch, precision, parameters, flops_per_token,
                versions, code; after a rollback also rolled_back_from
    step        step, epoch, loss (nats a token), learning_rate, gradient_norm (before clipping), skipped_steps (so far), tokens (so far),
                tokens_per_s, step_time_s, data_wait_share (of that time); on a GPU mfu (of its dense peak) and peak_memory_gb (of the first
                rank's); every `journal.norms_every` steps parameter_norm and update_norm, with `journal.per_layer` also layers: each
                parameter's [gradient, parameter, update] norms
    validation  step, loss, bits_per_byte, windows
    sample      step, prompt, text
    checkpoint  step, name, digest, model_sha256, seconds, odd_rows (see model/stream/packing.py)
    warning     step, kind, message
    stopped     step, reason, checkpoint
    finished    step, tokens, checkpoint, digest, model_sha256
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Event = dict[str, Any]


class Journal:
    """The writing end. One process writes; any number read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists():
            self._detach_links()
            complete, events = _complete_lines(path)
            self._seq = events[-1]["seq"] + 1 if events else 0
            if complete < path.stat().st_size:
                os.truncate(path, complete)
        else:
            self._seq = 0
        self._file = path.open("a", encoding="utf-8")

    def _detach_links(self) -> None:
        """DVC may have linked the file into its cache: appending would change the cached copy, too."""
        if self.path.is_symlink() or self.path.stat().st_nlink > 1 or not os.access(self.path, os.W_OK):
            copy = self.path.with_name(f".{self.path.name}.partial")
            shutil.copyfile(self.path, copy)
            os.replace(copy, self.path)

    def append(self, event: str, **fields: Any) -> Event:
        """Write one event; it is in the operating system's hands when this returns."""
        record = {"seq": self._seq, "time": round(time.time(), 3), "event": event, **fields}
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()
        self._seq += 1
        return record

    def sync(self) -> None:
        """Make everything written durable."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Make it durable and let go of the file."""
        self.sync()
        self._file.close()


class Silence:
    """The journal of a rank that does not write."""

    def append(self, event: str, **fields: Any) -> None:
        """Write nothing."""

    def sync(self) -> None:
        """Nothing was written."""

    def close(self) -> None:
        """Nothing was opened."""


def _complete_lines(path: Path) -> tuple[int, list[Event]]:
    """Length in bytes of the whole lines at the start of the file, and their events. A kill can tear the last line only."""
    length, events = 0, []
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        try:
            events.append(json.loads(line))
        except ValueError:
            break
        length += len(line)
    return length, events


def read_all(path: Path) -> list[Event]:
    """Every whole event, superseded ones included. A missing file is an empty journal."""
    return _complete_lines(path)[1] if path.exists() else []


def read_current(path: Path) -> list[Event]:
    """The events that still hold: after a resume, those past the checkpoint it went on from are superseded."""
    return list(without_superseded(read_all(path)))


def without_superseded(events: list[Event]) -> Iterator[Event]:
    """Drop what a later `started` took back: events of steps beyond the one it goes on from."""
    resumed_at = [(event["seq"], event["step"]) for event in events if event["event"] == "started"]
    for event in events:
        if all(event["seq"] >= seq or event.get("step", 0) <= step for seq, step in resumed_at):
            yield event
