"""The journal, sent to MLflow: each event exactly once, whatever happens to either side.

`python -m tasks.forwarder EXPERIMENT` sends what MLflow has not got yet, once. With `--follow` it goes on until the training finishes or
stops, or its own standard input closes.

Points carry their event's own time and step, so sending them again adds nothing. The cursor is a tag of the MLflow run and travels in the
same call as the points: it is never ahead of them, and it is not lost with the run folder. An MLflow that is closed or slow delays a
curve; the next pass goes on from the cursor.

After a resume, the journal repeats steps that it had already told of. MLflow takes no point back and we hide none: both stay, each with
its own time, whether or not there was an outage in between. The run's final figures are right all the same, since MLflow takes those of
the highest step and, of these, the latest; and the tag `resumed_from` says where the curve last went back.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from model.errors import EXIT_FAULT, EXIT_USER, UserError
from model.run_folder import RunFolder
from model.training.journal import Event
from tasks.project import Project, find_project
from tasks.tracking import connect, read_config, training_run

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

POINTS_A_CALL = 1000
"""MLflow's own limit for one `log_batch`."""
CURSOR = "journal_cursor"
"""The run's tag that names the last event sent: its number and its time, so that another journal is not taken for this one."""
POLL_S, LONGEST_PAUSE_S = 1.0, 30.0
"""Between two looks at the journal; and between two attempts while MLflow does not answer."""
_GROUPS = {"step": "train", "validation": "validation"}
"""Events whose numbers become metrics, and the group these are shown in: `train/loss`, `validation/bits_per_byte`."""
_STATUS = {"started": "RUNNING", "stopped": "KILLED", "finished": "FINISHED"}


class _Tail:
    """The journal's whole lines as they come; anew from the start when another file took its place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._file_id: int | None = None

    def new_events(self) -> tuple[bool, list[Event]]:
        """The events since the last call, and whether they begin at the journal's start."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                from_start = self._file_id != status.st_ino or status.st_size < self._offset
                if from_start:
                    self._file_id, self._offset = status.st_ino, 0
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return False, []
        whole = text[: text.rfind(b"\n") + 1]  # the trainer may be in the middle of a line
        self._offset += len(whole)
        return from_start, [json.loads(line) for line in whole.splitlines()]


class Forwarder:
    """Sends one run's journal to its MLflow run. One process at a time."""

    def __init__(self, client: MlflowClient, run_id: str, run_folder: RunFolder, config_digest: str) -> None:
        self._client = client
        self._run_id = run_id
        self._config_digest = config_digest
        self._tail = _Tail(run_folder.journal)
        self._ours = False
        self._pending: list[Event] = []
        self._status = ""

    def send_new(self) -> list[Event]:
        """Send what MLflow has not got yet and return it. Whatever MLflow raises passes through; the next call goes on from there."""
        self._read()
        sent: list[Event] = []
        while self._pending:
            batch = self._next_batch()
            self._send(batch)
            self._pending = self._pending[len(batch) :]
            sent += batch
        return sent

    def close_if_unfinished(self) -> None:
        """The trainer is gone. Without a last word of it, its run has failed."""
        if self._status == "RUNNING":
            self._client.set_terminated(self._run_id, "FAILED")

    def _read(self) -> None:
        from_start, events = self._tail.new_events()
        if from_start:
            self._ours, self._pending = False, []
        ours = []
        for event in events:
            if event["event"] == "started":  # a journal may go on under another config
                self._ours = event["config_digest"] == self._config_digest
            if self._ours:
                ours.append(event)
        if from_start:
            ours = self._beyond_cursor(ours)
        self._pending += ours

    def _beyond_cursor(self, events: list[Event]) -> list[Event]:
        """Without those that MLflow has. A cursor that points into another journal counts for nothing."""
        cursor = self._client.get_run(self._run_id).data.tags.get(CURSOR)
        for index, event in enumerate(events):
            if _cursor_at(event) == cursor:
                self._status = next((_STATUS[e["event"]] for e in reversed(events[: index + 1]) if e["event"] in _STATUS), "")
                return events[index + 1 :]
        return events

    def _next_batch(self) -> list[Event]:
        points = 0
        for index, event in enumerate(self._pending):
            points += len(_numbers(event))
            if points > POINTS_A_CALL:
                return self._pending[:index]
        return self._pending

    def _send(self, batch: list[Event]) -> None:
        from mlflow.entities import RunTag

        for event in batch:
            if event["event"] == "sample":
                self._client.log_text(self._run_id, event["prompt"] + event["text"], f"samples/step_{event['step']:08d}.txt")
        self._set_status(batch)
        points = [point for event in batch for point in _points(event)]
        tags = {**_tags(batch), CURSOR: _cursor_at(batch[-1])}
        self._client.log_batch(self._run_id, points, tags=[RunTag(key, value) for key, value in tags.items()], synchronous=True)

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


def _tags(batch: list[Event]) -> dict[str, str]:
    """What is said about the run as a whole; the latest event has the last word."""
    tags = {}
    for event in batch:
        if event["event"] == "started":
            for key in ("device", "precision", "parameters", "code", "versions", "resumed_from"):
                if event.get(key) is not None:
                    tags[key] = _text(event[key])
        elif event["event"] == "warning":
            tags["last_warning"] = f"step {event['step']}: {event['message']}"[:5000]
    return tags


def _cursor_at(event: Event) -> str:
    return f"{event['seq']} {event['time']}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _milliseconds(event: Event) -> int:
    return round(event["time"] * 1000)


def _numbers(event: Event) -> dict[str, float]:
    """The figures that an event tells of its step."""
    if event["event"] not in _GROUPS:
        return {}
    about = {"seq", "time", "step"}
    return {key: value for key, value in event.items() if key not in about and isinstance(value, int | float)}


def _points(event: Event) -> list[Metric]:
    from mlflow.entities import Metric

    group = _GROUPS.get(event["event"])
    return [Metric(f"{group}/{key}", float(value), _milliseconds(event), event["step"]) for key, value in _numbers(event).items()]


def follow(open_forwarder: Callable[[], Forwarder], parent_gone: threading.Event, report: Callable[[str], None]) -> bool:
    """Send events as they come, until training finishes or stops, or the parent is gone; True if MLflow has them all.

    MLflow may be away at any time, from the beginning, too: it is tried again after a growing pause, and once more at the end.
    """
    began = time.time()
    forwarder, pause, complaint = None, POLL_S, ""
    while True:
        last_pass = parent_gone.is_set()
        try:
            forwarder = forwarder or open_forwarder()
            sent = forwarder.send_new()
            if last_pass:
                forwarder.close_if_unfinished()
            # An older ending may lie in the journal while the trainer is still starting up.
            if last_pass or any(event["event"] in ("finished", "stopped") and event["time"] >= began for event in sent):
                return True
            pause = POLL_S
        except UserError:
            raise
        except Exception as error:  # this process is here so that nothing MLflow does can reach training
            if str(error) != complaint:
                complaint = str(error)
                report(f"MLflow does not take what training tells (trying again): {complaint}")
            if last_pass:
                return False
            pause = min(2 * pause, LONGEST_PAUSE_S)
        parent_gone.wait(pause)


def open_forwarder(project: Project, name: str, lock: FileLock) -> Forwarder:
    """The forwarder of an experiment's run. `lock` keeps a second one out; Timeout while another process has it."""
    lock.acquire()
    run_folder = project.run_folder(name)
    config = read_config(run_folder)
    client = connect(project, project.experiment(name))
    return Forwarder(client, training_run(client, project, name, config), run_folder, config.digest)


def _watch_stdin(parent_gone: threading.Event) -> None:
    """Set the event when standard input closes. os.read, because a thread inside sys.stdin's lock breaks the interpreter's exit."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        parent_gone.set()

    threading.Thread(target=wait, daemon=True).start()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tasks.forwarder", description="Send the journal of EXPERIMENT to MLflow.")
    parser.add_argument("experiment")
    parser.add_argument("--follow", action="store_true", help="go on until training ends or standard input closes")
    options = parser.parse_args(arguments)
    try:
        project = find_project()
        lock = FileLock(project.run_folder(options.experiment).path / ".tracking.lock", timeout=0)
        if not options.follow:
            open_forwarder(project, options.experiment, lock).send_new()
            return 0
        parent_gone = threading.Event()
        if not sys.stdin.isatty():
            # The signals are meant for the trainer, whose last word comes after them; when to end is for the parent to say.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            _watch_stdin(parent_gone)
        sent_all = follow(lambda: open_forwarder(project, options.experiment, lock), parent_gone, _say)
    except UserError as error:
        _say(str(error))
        return EXIT_USER
    except Exception as error:
        _say(f"MLflow did not take the journal; the next start goes on from there: {error}")
        return EXIT_FAULT
    return 0 if sent_all else EXIT_FAULT


def _say(message: str) -> None:
    print(f"tracking: {' '.join(message.split())}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
