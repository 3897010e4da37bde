"""The process that sends a run's journal to MLflow (tasks/journal_sender.py says how), so that nothing MLflow does can reach training.

`python -m tasks.forwarder EXPERIMENT` sends what MLflow has not got yet, once. With `--follow` it goes on until the training finishes or
stops, or its own standard input closes.
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

import psutil
from filelock import FileLock, Timeout

from model.errors import EXIT_FAULT, EXIT_USER, UserError
from model.secrets import redacted
from tasks.journal_sender import Forwarder, NoLease, Report
from tasks.machine_metrics import MachineMetrics
from tasks.project import Project, find_project, read_json
from tasks.tracking import connect, read_config, training_run

POLL_S, LONGEST_PAUSE_S = 1.0, 30.0
"""Between two looks at the journal; and between two attempts while MLflow does not answer."""
SYSTEM_METRICS = "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING"
"""MLflow's own variable: `false` leaves the machine's metrics out. MLflow itself has them off unless it says `true`; here they are on."""
LAST_ATTEMPTS = 3
"""When nobody waits for more: an answer that was lost is worth another attempt, an outage is for the next run."""


def follow(
    open_forwarder: Callable[[], Forwarder], parent_gone: threading.Event, report: Report, machine: MachineMetrics | None = None
) -> bool:
    """Send events as they come, until training finishes or stops, or the parent is gone; True if MLflow has them all. `machine` measures
    meanwhile.

    MLflow may be away at any time, from the beginning, too: it is tried again after a growing pause, and some times more at the end.
    """
    began = time.time()
    forwarder, pause, complaint, last_attempts = None, POLL_S, "", LAST_ATTEMPTS
    while True:
        last_pass = parent_gone.is_set()
        try:
            forwarder = forwarder or open_forwarder()
            forwarder.send_new()
            if last_pass:
                forwarder.close_if_unfinished()
            # An older ending may lie in the journal while the trainer is still starting up.
            if last_pass or forwarder.ended_since(began):
                return True
            pause = POLL_S
            if machine:
                machine.keep_going(forwarder)
        except UserError:
            raise
        except Exception as error:  # this process is here so that nothing MLflow does can reach training
            if str(error) != complaint:
                complaint = str(error)
                report(_in_words(error))
            if last_pass:
                last_attempts -= 1
                if not last_attempts:
                    return False
                time.sleep(POLL_S)
            pause = min(2 * pause, LONGEST_PAUSE_S)
        parent_gone.wait(pause)


def _in_words(error: Exception) -> str:
    if isinstance(error, NoLease):
        return str(error)
    if isinstance(error, Timeout):
        return "another process sends this journal; waiting for it"
    return f"MLflow does not take what training tells (trying again): {error}"


def send_once(open_forwarder: Callable[[], Forwarder], trains: Callable[[], bool], on_sent: Callable[[int], None] | None = None) -> int:
    """Send what MLflow has not got; the number of events. A connection that breaks is tried again, an outage is raised.

    `trains`: whether the trainer is alive. If it is not, a run without a last word has failed.
    """
    attempts, sent, forwarder = LAST_ATTEMPTS, 0, None

    def count(events: int) -> None:
        nonlocal sent
        sent += events
        if on_sent:
            on_sent(sent)

    while True:
        try:
            forwarder = forwarder or open_forwarder()
            forwarder.send_new(count)
            if not trains():
                forwarder.close_if_unfinished()
            return sent
        except (UserError, NoLease, Timeout):
            raise
        except Exception:
            attempts -= 1
            if not attempts:
                raise
            time.sleep(POLL_S)


def open_forwarder(project: Project, name: str, lock: FileLock, report: Report | None = None, begins: bool = False) -> Forwarder:
    """The forwarder of an experiment's run. `lock` keeps a second one out; Timeout while another process has it. `begins`: see
    `training_run`."""
    lock.acquire()
    run_folder = project.run_folder(name)
    config = read_config(run_folder)
    client = connect(project, project.experiment(name))
    return Forwarder(client, training_run(client, project, name, config, begins), run_folder, config.digest, report)


def tracking_lock(project: Project, name: str) -> FileLock:
    """Held by the process that sends an experiment's journal."""
    return FileLock(project.run_folder(name).path / ".tracking.lock", timeout=0)


def trainer_lives(project: Project, name: str) -> bool:
    """Whether a trainer of this machine works on the experiment."""
    trainer = read_json(project.run_folder(name).lock.with_suffix(".json"))
    return bool(trainer and psutil.pid_exists(trainer["pid"]))


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
    parser.add_argument("--json", action="store_true", help="print after each call how many events were sent")
    options = parser.parse_args(arguments)
    # Whatever fails is tried again here, after a look at what MLflow has. Its client would repeat a request whose answer was lost, and
    # make a second run, and sleep for as long as a server's Retry-After says.
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    try:
        project = find_project()
        lock = tracking_lock(project, options.experiment)
        if not options.follow:
            return _once(project, options.experiment, lock, options.json)
        parent_gone = threading.Event()
        if not sys.stdin.isatty():
            # The signals are meant for the trainer, whose last word comes after them; when to end is for the parent to say.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            _watch_stdin(parent_gone)
        machine = MachineMetrics() if os.environ.get(SYSTEM_METRICS, "true").lower() not in ("false", "0") else None
        sent_all = follow(lambda: open_forwarder(project, options.experiment, lock, _say, begins=True), parent_gone, _say, machine)
        if machine:
            machine.end()
    except UserError as error:
        _say(str(error))
        return EXIT_USER
    except Exception as error:
        _say(str(error) if isinstance(error, NoLease) else f"MLflow did not take the journal; the next start goes on from there: {error}")
        return EXIT_FAULT
    return 0 if sent_all else EXIT_FAULT


def _once(project: Project, name: str, lock: FileLock, as_json: bool) -> int:
    def on_sent(events: int) -> None:
        if as_json:
            print(json.dumps({"sent": events}), flush=True)

    try:
        send_once(lambda: open_forwarder(project, name, lock, _say), lambda: trainer_lives(project, name), on_sent)
    except Timeout:
        if as_json:
            print(json.dumps({"sent_by_training": True}), flush=True)
        else:
            _say(f"the training of {name} that runs sends its journal itself")
    return 0


def _say(message: str) -> None:
    print(f"tracking: {redacted(' '.join(message.split()))}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
