"""A run's journal as curves over tokens and hours. What a resume superseded is in no curve, but in the hours and joules that it took."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from model.training.journal import Event, without_superseded

STEP_FIELDS = ("loss", "learning_rate", "gradient_norm", "tokens_per_s", "mfu")


@dataclass(frozen=True)
class Series:
    """A figure along the training; NaN where it is not known or was not finite."""

    tokens: np.ndarray
    hours: np.ndarray
    values: np.ndarray

    def __bool__(self) -> bool:
        return bool(np.isfinite(self.values).any())


@dataclass(frozen=True)
class Mark:
    """Something that happened in between."""

    kind: str
    """`resumed`, `rolled back` or `warning`."""
    step: int
    tokens: float
    hours: float
    message: str


@dataclass(frozen=True)
class Segment:
    """The work of one process, from its start (or from a rollback) to its last event."""

    started: Event
    seconds: float
    joules: float | None
    """Measured; None: the machine does not count."""


@dataclass(frozen=True)
class History:
    """What the journal says of the configuration that was trained last."""

    events: list[Event]
    """Those that still hold."""
    steps: dict[str, Series]
    """By the fields of `STEP_FIELDS`, a value a step."""
    validation: Series
    validation_loss: dict[int, float]
    """By step."""
    marks: list[Mark]
    segments: list[Segment]
    steps_lost: int
    """Computed and then superseded, because a resume went on from before them."""

    @property
    def started(self) -> Event:
        """The newest start."""
        return self.segments[-1].started

    @property
    def seconds(self) -> float:
        """All work, pauses left out."""
        return sum(segment.seconds for segment in self.segments)

    def last(self, kind: str) -> Event | None:
        """The newest event of a kind that still holds."""
        return next((event for event in reversed(self.events) if event["event"] == kind), None)


def history(events: list[Event]) -> History | None:
    """From all events of a journal, superseded ones included; None if no training began."""
    own = _of_last_configuration(events)
    if not own:
        return None
    clock = dict(zip((event["seq"] for event in own), _hours(own), strict=True))
    current = list(without_superseded(own))
    steps = [event for event in current if event["event"] == "step"]
    validations = [event for event in current if event["event"] == "validation"]
    tokens_at = {0: 0.0} | {event["step"]: float(event["tokens"]) for event in steps}

    def series(chosen: list[Event], field: str) -> Series:
        return Series(
            np.array([tokens_at.get(event["step"], math.nan) for event in chosen], dtype=np.float64),
            np.array([clock[event["seq"]] for event in chosen], dtype=np.float64),
            np.array([_number(event.get(field)) for event in chosen], dtype=np.float64),
        )

    before = dict(zip((event["seq"] for event in own[1:]), own, strict=False))
    marks = []
    for event in current:
        kind = _kind_of_mark(event, first=event["seq"] == own[0]["seq"])
        if kind is not None:
            message = event.get("message") or _how_it_went_on(event, before[event["seq"]])
            step = event["step"]
            marks.append(Mark(kind, step, tokens_at.get(step, 0.0), clock[event["seq"]], message))
    return History(
        events=current,
        steps={field: series(steps, field) for field in STEP_FIELDS},
        validation=series(validations, "loss"),
        validation_loss={event["step"]: event["loss"] for event in validations},
        marks=marks,
        segments=_segments(own, clock),
        steps_lost=sum(event["event"] == "step" for event in own) - len(steps),
    )


def _of_last_configuration(events: list[Event]) -> list[Event]:
    """A journal may begin with what another configuration left."""
    starts = [event for event in events if event["event"] == "started"]
    if not starts:
        return []
    wanted, kept, ours = starts[-1]["config_digest"], [], False
    for event in events:
        if event["event"] == "started":
            ours = event["config_digest"] == wanted
        if ours:
            kept.append(event)
    return kept


def _hours(events: Iterable[Event]) -> list[float]:
    """The clock of each event: it runs while a process trains, and stands between them."""
    found, seconds, before = [], 0.0, None
    for event in events:
        if before is not None and not _begins_a_process(event):
            seconds += max(0.0, event["time"] - before)
        before = event["time"]
        found.append(seconds / 3600)
    return found


def _begins_a_process(event: Event) -> bool:
    return event["event"] == "started" and "rolled_back_from" not in event


def _segments(events: list[Event], clock: dict[int, float]) -> list[Segment]:
    found: list[Segment] = []
    parts: list[list[Event]] = []
    for event in events:
        if event["event"] == "started":
            parts.append([])
        parts[-1].append(event)
    ends = [clock[part[0]["seq"]] for part in parts[1:]] + [clock[parts[-1][-1]["seq"]]]
    for part, end in zip(parts, ends, strict=True):
        joules = sum(event.get("energy_j", 0.0) for event in part) if part[0].get("energy_counters") else None
        found.append(Segment(part[0], 3600 * (end - clock[part[0]["seq"]]), joules))
    return found


def _kind_of_mark(event: Event, first: bool) -> str | None:
    if event["event"] == "warning":
        return "warning"
    if event["event"] != "started" or first:
        return None
    return "rolled back" if "rolled_back_from" in event else "resumed"


def _how_it_went_on(event: Event, before: Event) -> str:
    place = event["resumed_from"] or "the beginning"
    if "rolled_back_from" in event:
        return f"a spike at step {event['rolled_back_from']:,}: back to {place}"
    ended = "stopped" if before["event"] == "stopped" else "broke off"
    why = before.get("reason") or before.get("message")
    return f"{ended} at step {before['step']:,}{f' ({why})' if why else ''}, went on from {place}"


def _number(value: Any) -> float:
    return float(value) if value is not None else math.nan
