"""The journal: the trainer's append-only record, one JSON event a line. Everything shown anywhere comes from it.

Every event has `seq` (0, 1, 2, …), `time` (seconds since 1970) and `event`; a line ends with `check`, a CRC-32 of what stands before it in
the line, so that no flipped bit is taken for a figure:

    started     step, config_digest, resumed_from, total_steps, device, device_name, ranks, micro_batch, precision, parameters,
                flops_per_token, versions, code; where the machine counts joules energy_counters (their names); after a rollback also
                rolled_back_from; of a fork forked_from; of a post-training post_trains (its base)
    step        step, epoch, loss (nats a token), learning_rate, gradient_norm (before clipping), skipped_steps (so far), tokens (so far),
                tokens_per_s, step_time_s, data_wait_share (of that time); in post-training completion_tokens (those of the step that are
                learned; tokens counts questions, too, and no padding); on a GPU mfu (of its dense peak) and peak_memory_gb (of the first
                rank's); about once a second energy_j (of all energy_counters since the last one, see model/training/energy.py); every
                `journal.norms_every` steps parameter_norm and update_norm, with `journal.per_layer` also layers: each
                parameter's [gradient, parameter, update] norms
    validation  step, loss, bits_per_byte, windows
    sample      step, prompt, text
    checkpoint  step, name, digest, model_sha256, seconds (until it was durable), stall_s (of these, training waited), odd_rows (see
                model/stream/packing.py); written when it is sealed, some steps later
    warning     step, kind, message
    stopped     step, reason, checkpoint
    finished    step, tokens, checkpoint, digest, model_sha256
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from model import disk
from model.digest import checked_line, parse_checked
from model.say import say
from model.secrets import redacted

Event = dict[str, Any]

parse = parse_checked
"""The event of one whole line; None if it is not the line that was written."""


class Journal:
    """The writing end. One process writes, from any of its threads; any number read.

    A disk that takes nothing stops no training: what could not be written is kept, and written as soon as that is possible.

    Args:
        path: the file. What a kill tore at its end is cut off; damaged lines are taken out, and the file as it was is kept beside
            checkpoints that were set aside.
        fence: called before each event; may raise.
    """

    def __init__(self, path: Path, fence: Callable[[], None] = lambda: None) -> None:
        self.path, self._fence, self._lock = path, fence, threading.Lock()
        self.damage: str | None = None
        """What was found damaged, if anything was."""
        lines = _lines(path)
        events = [event for _, event in lines if event is not None]
        damaged = [number for number, (_, event) in enumerate(lines, 1) if event is None]
        if damaged:
            self._take_out(b"".join(line for line, event in lines if event is not None), damaged)
        elif path.exists():
            self._detach_links()
        self._seq = events[-1]["seq"] + 1 if events else 0
        self._end = sum(len(line) for line, event in lines if event is not None)
        self._unwritten: list[bytes] = []
        self._failed: str | None = None
        self._file = path.open("ab", buffering=0)
        self._file.truncate(self._end)

    def _take_out(self, whole: bytes, damaged: list[int]) -> None:
        kept = self.path.parent / "aside" / "damaged"
        kept.mkdir(parents=True, exist_ok=True)
        target = kept / f"{self.path.stem}.{time.strftime('%Y%m%d-%H%M%S')}.{os.getpid()}{self.path.suffix}"
        shutil.copyfile(self.path, target)
        disk.write_file(self.path, whole)
        some = ", ".join(map(str, damaged[:5])) + (", …" if len(damaged) > 5 else "")
        self.damage = f"{self.path.name}: {len(damaged)} damaged lines ({some}) were taken out; as it was it lies in {target}"

    def _detach_links(self) -> None:
        """DVC may have linked the file into its cache: appending would change the cached copy, too."""
        if self.path.is_symlink() or self.path.stat().st_nlink > 1 or not os.access(self.path, os.W_OK):
            copy = self.path.with_name(f".{self.path.name}.partial")
            shutil.copyfile(self.path, copy)
            disk.rename(copy, self.path)

    def append(self, event: str, **fields: Any) -> Event:
        """Write one event; it is in the operating system's hands when this returns, unless the disk is full.

        Raises:
            UserError: the fence's.
        """
        if event in ("warning", "stopped"):  # they quote errors, and those quote URLs
            fields = {name: redacted(value) if isinstance(value, str) else value for name, value in fields.items()}
        with self._lock:
            self._fence()
            record = self._add(event, fields)
            self._write()
        return record

    def warn(self, step: int, kind: str, message: str) -> None:
        """A warning, for people at a terminal and in the flow's log, too."""
        self.append("warning", step=step, kind=kind, message=message)
        say(f"warning: {message}")

    def _add(self, event: str, fields: dict[str, Any]) -> Event:
        record = {"seq": self._seq, "time": round(time.time(), 3), "event": event, **fields}
        self._unwritten.append(checked_line(record))
        self._seq += 1
        return record

    def _write(self) -> bool:
        """Write what is not written yet; whether that went well. What was written by half is cut off again."""
        if not self._unwritten:
            return True
        try:
            disk.write(self._file, b"".join(self._unwritten))
        except BaseException as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
            if not isinstance(error, OSError):
                raise
            if self._failed is None:
                self._failed = f"{self.path.name} could not be written ({error.strerror or error}); its events were kept and came later"
                say(f"warning: {self.path}: {error.strerror or error}; its events are kept until it can be written")
            return False
        self._end += sum(map(len, self._unwritten))
        self._unwritten.clear()
        if self._failed is not None:
            message, self._failed = self._failed, None
            self._add("warning", {"step": 0, "kind": "journal", "message": message})
            return self._write()
        return True

    def sync(self) -> None:
        """Make everything written durable.

        Raises:
            OSError: it is not.
        """
        with self._lock:
            if not self._write():
                raise OSError(f"{self.path} cannot be written")
        disk.fsync(self.path)  # not under the lock: no step waits for it

    def close(self) -> None:
        """Make it durable and let go of the file. What the disk did not take to the end is told of on standard error."""
        try:
            self.sync()
        except OSError as error:
            say(f"warning: the last {len(self._unwritten)} events are not in the journal: {error}")
        self._file.close()


class Silence:
    """The journal of a rank that does not write."""

    damage = None

    def append(self, event: str, **fields: Any) -> None:
        """Write nothing."""

    def warn(self, step: int, kind: str, message: str) -> None:
        """Say nothing."""

    def sync(self) -> None:
        """Nothing was written."""

    def close(self) -> None:
        """Nothing was opened."""


def _lines(path: Path) -> list[tuple[bytes, Event | None]]:
    """The lines and their events, None where one is damaged; without what a kill tore at the end. A missing file has none."""
    if not path.exists():
        return []
    lines = (line + b"\n" for line in path.read_bytes().split(b"\n")[:-1])
    return [(line, parse_checked(line)) for line in lines]


def read_all(path: Path) -> list[Event]:
    """Every event that is as it was written, superseded ones included. A missing file is an empty journal."""
    return [event for _, event in _lines(path) if event is not None]


def read_current(path: Path) -> list[Event]:
    """The events that still hold: after a resume, those past the checkpoint it went on from are superseded."""
    return list(without_superseded(read_all(path)))


def without_superseded(events: list[Event]) -> Iterator[Event]:
    """Drop what a later `started` took back: events of steps beyond the one it goes on from."""
    resumed_at = [(event["seq"], event["step"]) for event in events if event["event"] == "started"]
    for event in events:
        if all(event["seq"] >= seq or event.get("step", 0) <= step for seq, step in resumed_at):
            yield event
