"""What is sent of a journal to MLflow: each event exactly once, whatever happens to either side.

Points carry their event's own time and step, so sending them again adds nothing: an answer may be lost on its way. The cursor is a tag of
the MLflow run and travels in the same call as the points: it is never ahead of them, and it is not lost with the run folder. An MLflow
that is closed or slow delays a curve; the next pass goes on from the cursor. What MLflow refuses for good (one event, whatever is wrong
with it) is told of, marked in the tag `last_refused`, and passed over: it must not hold up what comes after it.

Losses go twice, at their step and, in the group `by_tokens`, at the tokens trained on until then.

Texts are files: `samples/step_….txt`, and `warnings.txt` with every warning of the run (the tag `warnings` counts them). They go after the
points and have a cursor of their own, because the place of MLflow's files may be away while its database is not.

After a resume, the journal repeats steps that it had already told of. MLflow takes no point back and we hide none: both stay, each with
its own time, whether or not there was an outage in between. The run's final figures are right all the same, since MLflow takes those of
the highest step and, of these, the latest; and the tag `resumed_from` says where the curve last went back.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.run_folder import RunFolder
from model.secrets import redacted
from model.training.journal import Event, parse
from tasks import lease
from tasks.tracking import BY_TOKENS, note_aliases

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

POINTS_A_CALL = 900
"""MLflow takes 1,000 points and tags in one call; of more its client makes two calls, and the cursor has to go with the last points."""
CURSOR = "journal_cursor"
"""The run's tag that names the last event sent: its number and its time, so that another journal is not taken for this one."""
FILES_CURSOR = "journal_cursor_files"
"""The same for the events whose text became a file."""
WARNINGS = "warnings.txt"
"""All warnings of the run, a line each, among its artifacts."""
ALIASES_EVERY_S = 30.0
"""Between two looks at what the registry's aliases name."""
_GROUPS = {"step": "train", "validation": "validation"}
"""Events whose numbers become metrics, and the group these are shown in: `train/loss`, `validation/bits_per_byte`."""
_STATUS = {"started": "RUNNING", "stopped": "KILLED", "finished": "FINISHED"}
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
_REFUSED_BY_A_PROXY = re.compile(r"error code (400|413|414|422) ")

Report = Callable[[str], None]


class NoLease(RuntimeError):
    """The training goes on elsewhere, or was killed here: until it is clear which, this machine tells nothing of it."""


class _Unreadable(ValueError):
    """An event that is not what the journal's description says."""


class _Tail:
    """The journal's whole lines as they come; anew from the start when another file took its place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._file: tuple[int, bytes] | None = None
        self._next: tuple[int, tuple[int, bytes] | None] = (0, None)

    def new_lines(self) -> tuple[bool, list[bytes]]:
        """The lines since the last `taken`, and whether they begin at the journal's start."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                identity = (status.st_ino, file.readline())
                if not identity[1].endswith(b"\n"):
                    return False, []
                from_start = self._file != identity or status.st_size < self._offset
                offset = 0 if from_start else self._offset
                file.seek(offset)
                text = file.read()
        except FileNotFoundError:
            return False, []
        whole = text[: text.rfind(b"\n") + 1]  # the trainer may be in the middle of a line
        self._next = (offset + len(whole), identity)
        return from_start, whole.splitlines(keepends=True)

    def taken(self) -> None:
        """What `new_lines` gave is in good hands."""
        self._offset, self._file = self._next


class Forwarder:
    """Sends one run's journal to its MLflow run. One process at a time.

    `report` gets a line about what is passed over.
    """

    def __init__(self, client: MlflowClient, run_id: str, run_folder: RunFolder, config_digest: str, report: Report | None = None) -> None:
        self._client = client
        self._run_id = run_id
        self._run_folder = run_folder
        self._config_digest = config_digest
        self._report = report or (lambda message: None)
        self._tail = _Tail(run_folder.journal)
        self._ours = False
        self._tokens_at: tuple[Any, Any] = (0, 0)
        self._pending: list[Event] = []
        self._files: list[Event] = []
        self._warnings: list[Event] = []
        self._status = ""
        self._ended_at = 0.0
        self._looked_at = 0.0

    def send_new(self, on_sent: Callable[[int], None] | None = None) -> list[Event]:
        """Send what MLflow has not got yet and return it; `on_sent` gets the number of events after each call.

        Whatever MLflow raises passes through; the next call goes on from there.

        Raises:
            NoLease: another machine may have the run.
        """
        self._read()
        sent: list[Event] = []
        while self._pending:
            batch = self._next_batch()
            self._send(batch)
            sent += batch
            if on_sent:
                on_sent(len(batch))
        self._send_files()
        self._look_at_aliases()
        return sent

    @property
    def run_id(self) -> str:
        """The MLflow run's."""
        return self._run_id

    @property
    def tracking_uri(self) -> str:
        """Where MLflow is."""
        return str(self._client.tracking_uri)

    @property
    def trains(self) -> bool:
        """Whether MLflow was told that training runs, and not that it ended, and this machine may tell of it."""
        return self._status == "RUNNING" and lease.may_write(self._run_folder)

    def ended_since(self, moment: float) -> bool:
        """Whether MLflow has an ending of the training that came after `moment` (seconds since 1970)."""
        return self._ended_at >= moment

    def close_if_unfinished(self) -> None:
        """The trainer is gone. Without a last word of it, its run has failed."""
        if self._status == "RUNNING":
            self._may_write()
            self._client.set_terminated(self._run_id, "FAILED")
            self._status = "FAILED"

    def _look_at_aliases(self) -> None:
        """The other way round: the trainer's retention has to know what the registry names."""
        if time.monotonic() - self._looked_at > ALIASES_EVERY_S or not self._looked_at:
            note_aliases(self._client, self._run_folder)
            self._looked_at = time.monotonic()

    def _may_write(self) -> None:
        if not lease.may_write(self._run_folder):
            name = self._run_folder.experiment
            raise NoLease(f"{name} is trained elsewhere now, or its training here was killed; gpt2 train {name} says which, and goes on")

    def _read(self) -> None:
        from_start, lines = self._tail.new_lines()
        was_ours = False if from_start else self._ours
        ours = []
        for line in lines:
            event = self._event(line)
            if event is None:
                continue
            if event["event"] == "started":  # a journal may go on under another config
                was_ours = event.get("config_digest") == self._config_digest
            if was_ours:
                ours.append(self._with_tokens(event))
        if from_start:
            self._begin(ours)
        else:
            self._pending += ours
            self._files += [event for event in ours if _is_text(event)]
            self._warnings += [event for event in ours if event["event"] == "warning"]
        self._ours = was_ours
        self._tail.taken()  # MLflow may have failed to say where it is: then all of this is read again

    def _event(self, line: bytes) -> Event | None:
        event = parse(line)
        if event is None:
            self._report(f"passed over a line of the journal that is damaged: {line[:80]!r}")
        return event

    def _with_tokens(self, event: Event) -> Event:
        """A validation does not say how many tokens its step had seen; the step before it in the journal does."""
        if event["event"] == "step" and "tokens" in event:
            self._tokens_at = (event.get("step"), event["tokens"])
        elif event["event"] == "started":
            self._tokens_at = (0, 0)
        step, tokens = self._tokens_at
        return {**event, "tokens": tokens} if event["event"] == "validation" and event.get("step") == step else event

    def _begin(self, events: list[Event]) -> None:
        """A journal from its start: leave out what MLflow has. A cursor that points into another journal counts for nothing."""
        tags = self._client.get_run(self._run_id).data.tags
        there = _up_to(tags.get(CURSOR), events)
        self._status = next((_STATUS[e["event"]] for e in reversed(events[:there]) if e["event"] in _STATUS), "")
        self._pending = events[there:]
        self._files = [event for event in events[_up_to(tags.get(FILES_CURSOR), events) :] if _is_text(event)]
        self._warnings = [event for event in events if event["event"] == "warning"]

    def _next_batch(self) -> list[Event]:
        points = 0
        for index, event in enumerate(self._pending):
            points += len(_numbers(event))
            if points > POINTS_A_CALL and index:
                return self._pending[:index]
        return self._pending[:]

    def _send(self, batch: list[Event]) -> None:
        """Send what is next. Of a batch that MLflow refuses, the halves: at the end of it is the one event that is at fault."""
        self._may_write()
        try:
            self._log(batch)
        except Exception as error:
            if not _is_refusal(error):
                raise
            if len(batch) == 1:
                self._pass_over(batch[0], error)
                return
            self._send(batch[: len(batch) // 2])
            self._send(batch[len(batch) // 2 :])
            return
        self._sent(batch)

    def _log(self, batch: list[Event]) -> None:
        from mlflow.entities import RunTag

        points = [point for event in batch for point in _points(event)]
        tags = {**self._tags(batch), CURSOR: _cursor_at(batch[-1])}
        self._set_status(batch)
        while len(points) > POINTS_A_CALL:  # of one event
            self._client.log_batch(self._run_id, points[:POINTS_A_CALL], synchronous=True)
            points = points[POINTS_A_CALL:]
        self._client.log_batch(self._run_id, points, tags=[RunTag(key, value) for key, value in tags.items()], synchronous=True)

    def _pass_over(self, event: Event, error: Exception) -> None:
        """Go on behind an event that MLflow refuses. It takes the cursor, or it is not this event that it refuses."""
        from mlflow.entities import RunTag

        why = f"{event['event']} {event['seq']}, step {event.get('step')}: {' '.join(str(error).split())[:1000]}"
        tags = [RunTag(CURSOR, _cursor_at(event)), RunTag("last_refused", why)]
        try:
            self._client.log_batch(self._run_id, tags=tags, synchronous=True)
        except Exception:
            raise error from None
        self._report(f"MLflow refuses one event, which is passed over: {why}")
        self._sent([event])

    def _sent(self, batch: list[Event]) -> None:
        del self._pending[: len(batch)]
        self._ended_at = max([self._ended_at, *(event["time"] for event in batch if event["event"] in ("finished", "stopped"))])

    def _tags(self, batch: list[Event]) -> dict[str, str]:
        """What is said about the run as a whole; the latest event has the last word."""
        tags = {}
        for event in batch:
            if event["event"] == "started":
                for key in ("device", "precision", "parameters", "code", "versions", "resumed_from", "forked_from"):
                    if event.get(key) is not None:
                        tags[key] = _text(event[key])
                command = "post-train" if "post_trains" in event else "train"
                tags |= _source(f"gpt2 {command} {self._run_folder.experiment}", event.get("code"))
            elif event["event"] == "warning":
                tags["last_warning"] = _text(f"step {event.get('step')}: {event.get('message')}")
                tags["warnings"] = str(sum(earlier["seq"] <= event["seq"] for earlier in self._warnings))
        return tags

    def _set_status(self, batch: list[Event]) -> None:
        change = next((event for event in reversed(batch) if event["event"] in _STATUS), None)
        if change is None:
            return
        status = _STATUS[change["event"]]
        if status == "RUNNING":
            self._client.update_run(self._run_id, status)
        else:
            self._client.set_terminated(self._run_id, status, _milliseconds(change))
        self._status = status

    def _send_files(self) -> None:
        """Each text under its name, the latest where there are several. Sent twice it is there once."""
        while self._files:
            self._may_write()
            name = _file_name(self._files[0])
            same = [event for event in self._files if _file_name(event) == name]
            lines = map(_warning_line, self._warnings) if name == WARNINGS else (str(same[-1].get(key, "")) for key in ("prompt", "text"))
            try:
                self._client.log_text(self._run_id, "".join(lines), name)
            except Exception as error:
                if not _is_refusal(error):
                    raise
                self._report(f"MLflow refuses {name}, which is passed over: {error}")
            rest = [event for event in self._files if _file_name(event) != name]
            if not rest:
                last = max(self._files, key=lambda event: event["seq"])
                self._client.set_tag(self._run_id, FILES_CURSOR, _cursor_at(last))
            self._files = rest


def _up_to(cursor: str | None, events: list[Event]) -> int:
    """How many of the events lie before the cursor or at it."""
    return next((index + 1 for index, event in enumerate(events) if _cursor_at(event) == cursor), 0)


def _is_text(event: Event) -> bool:
    return event["event"] in ("sample", "warning")


def _file_name(event: Event) -> str:
    return WARNINGS if event["event"] == "warning" else f"samples/step_{event.get('step', 0):08d}.txt"


def _warning_line(event: Event) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(event["time"]))
    return f"{when} UTC  step {event.get('step')}  {event.get('kind')}: {redacted(' '.join(str(event.get('message')).split()))}\n"


def _is_refusal(error: Exception) -> bool:
    """Whether MLflow (or we) will not take this batch, however often it is sent; what an outage looks like is none."""
    if isinstance(error, _Unreadable):
        return True
    code = getattr(error, "error_code", None)
    return code in _REFUSALS or (code is not None and _REFUSED_BY_A_PROXY.search(str(error)) is not None)


def _cursor_at(event: Event) -> str:
    return f"{event['seq']} {event['time']}"


def _text(value: Any) -> str:
    """A tag's value; MLflow takes 8,000 characters, some databases 5,000."""
    return redacted(value if isinstance(value, str) else json.dumps(value))[:5000]


def _source(command: str, code: Any) -> dict[str, str]:
    """The code that trains, in the tags that MLflow shows as a run's source."""
    tags = {"mlflow.source.type": "LOCAL", "mlflow.source.name": command}
    if isinstance(code, dict) and code.get("commit"):
        tags |= {"mlflow.source.git.commit": str(code["commit"]), "mlflow.source.git.dirty": str(bool(code.get("diff_sha256"))).lower()}
    return tags


def _milliseconds(event: Event) -> int:
    return round(event["time"] * 1000)


def _numbers(event: Event) -> list[tuple[str, float, Any]]:
    """The figures that an event tells: each one's metric, its value, and its place on the curve, a step or tokens."""
    group, about = _GROUPS.get(event["event"]), {"seq", "time", "step"}
    if group is None:
        return []
    if group == "validation":
        about.add("tokens")
    found = [
        (f"{group}/{key}", value, event.get("step")) for key, value in event.items() if key not in about and isinstance(value, int | float)
    ]
    if "tokens" in event:
        found += [(BY_TOKENS[name], value, event["tokens"]) for name, value, _ in found if name in BY_TOKENS]
    return found


def _points(event: Event) -> list[Metric]:
    from mlflow.entities import Metric

    numbers = _numbers(event)
    for _, _, place in numbers:
        if not (isinstance(place, int) and abs(place) < 2**63):  # what MLflow's database calls its own fault
            raise _Unreadable(f"its step is {place!r}")
    try:
        return [Metric(name, float(value), _milliseconds(event), place) for name, value, place in numbers]
    except OverflowError as error:
        raise _Unreadable(str(error)) from None
