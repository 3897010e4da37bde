"""The Prefect side of the stages of dvc.yaml: one task each, run by DVC, and what follows them: MLflow and the storage are brought up to
date, and the report is made. Both flows are made of these.

Prefect's server may go while a flow runs: no stage waits for it. Only at its end does a flow need the server, and it waits for that so long
as `ends_by_itself` says.
"""

import contextlib
import contextvars
import functools
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, Protocol, cast
from uuid import UUID

from filelock import FileLock, Timeout
from prefect import State, task
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, create_table_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.context import FlowRunContext
from prefect.exceptions import TerminationSignal
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelled, Completed, Crashed, Failed

from flows.checkpoint_page import cells
from flows.stop import STOP
from model.errors import EXIT_FAULT, EXIT_STOPPED, EXIT_USER, Stopped, UserError
from tasks import mirror, sync, versioning
from tasks.overview import checkpoint_list
from tasks.progress import Progress
from tasks.project import Project, find_project
from tasks.report import publish
from tasks.steps import WARNING

SECONDS_TO_STOP = 27.0
"""Prefect kills a cancelled flow after 30 s."""

SECONDS_TO_REPORT = 30.0
"""How long a flow in a terminal waits at its end for a Prefect server that is gone: a restart takes 10 to 30 s."""

SECONDS_TO_REPORT_UNDER_A_WORKER = 600.0

SECONDS_BETWEEN_UPDATES = 5.0
SECONDS_BETWEEN_LOG_LINES = 60.0


class Observer(Protocol):
    """Somebody in this process who wants to see the stages pass: the terminal."""

    def began(self, stage: str) -> None: ...  # noqa: D102
    def said(self, stage: str, line: str) -> None: ...  # noqa: D102
    def ended(self, stage: str, state: State[Any]) -> None: ...  # noqa: D102


OBSERVERS: list[Observer] = []


class Busy(UserError):
    """Another flow of this machine works on the experiment."""


@contextlib.contextmanager
def sole_flow(project: Project, experiment: str, patience: float = 60.0) -> Iterator[None]:
    """Meanwhile, no other flow of this machine works on the experiment. One that is being cancelled gets `patience` seconds to leave.

    Raises:
        Busy: another one does.
        Stopped: while it waited.
    """
    lock = FileLock(project.scratch_folder() / f"{experiment}.lock")
    deadline = time.monotonic() + patience
    while True:
        try:
            lock.acquire(timeout=0)
            break
        except Timeout:
            if STOP.wait(1.0):
                raise Stopped(f"stopped while another flow worked on {experiment}") from None
            if time.monotonic() > deadline:
                raise Busy(f"{experiment}: another flow works on it; wait for it, or cancel it") from None
    try:
        yield
    finally:
        lock.release()


def run_stages(project: Project, experiment: str, stages: tuple[str, ...]) -> State[Any] | None:
    """Run the stages one after the other, each as a task. None: all are done; else the state in which the flow has to end.

    Raises:
        UserError, StageFailed: what a stage failed of.
    """
    fresh = versioning.up_to_date(project, experiment)
    for stage in stages:
        state = _finished(_TASKS[stage].submit(experiment, stage in fresh))
        if not state.is_completed():
            end = Cancelled if state.is_cancelled() else Crashed
            return end(message=state.message)
        if state.name != _SKIPPED:
            fresh = []  # what follows a stage that ran is DVC's to judge anew
    return None


def bring_up_to_date(experiment: str, finished: bool) -> None:
    """Send MLflow and the external storage what they have not got, and make the report, side by side. If one of them fails, only its own
    task does: the next run, or `gpt2 sync` and `gpt2 report`, catches up. `finished`: training is done, so what the storage got while it
    ran has served."""
    for future in (sync_tracking.submit(experiment), push_to_storage.submit(experiment, finished), make_report.submit(experiment)):
        with contextlib.suppress(Exception):
            _finished(future)


def show_checkpoints(project: Project, experiment: str) -> None:
    """The checkpoints with their scores as a table among the flow run's artifacts."""
    rows = [cells(row) for row in checkpoint_list(project, experiment)]
    key, description = artifact_key("checkpoints", experiment), f"Checkpoints of {experiment}, oldest first"
    _store(lambda: create_table_artifact(rows, key=key, description=description), "the table of checkpoints")


def _store(create: Callable[[], object], what: str) -> None:
    """Store an artifact, unless Prefect's server is gone: its client would try for more than a minute to reach it."""
    logger = get_run_logger()

    def store() -> None:
        try:
            create()
        except Exception as error:
            logger.warning("%s was not stored: %s", what, error)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(store,), name="artifact", daemon=True)
    thread.start()
    thread.join(SECONDS_BETWEEN_UPDATES)


P = ParamSpec("P")


def ends_by_itself(flow: Callable[P, State[Any]]) -> Callable[P, State[Any]]:
    """For the function of a flow: once it is over, the process ends in bounded time, whether or not Prefect's server takes the news.

    Left alone, Prefect's engine tries for minutes, calls a run that went well crashed, prints tracebacks, and does not leave while its
    queues hold anything.
    """

    @functools.wraps(flow)
    def run(*arguments: P.args, **options: P.kwargs) -> State[Any]:
        if not _under_a_worker():  # which keeps the complaints about an outage in its log; in a terminal they are noise
            logging.raiseExceptions = False
            logging.getLogger("prefect._internal.concurrency").disabled = True
        try:
            state = flow(*arguments, **options)
        except Exception as error:
            code = EXIT_USER if isinstance(error, UserError) else EXIT_STOPPED if isinstance(error, Stopped) else EXIT_FAULT
            _leave_unless_reported(code, f"error: {error}")
            raise
        if state.is_completed():
            _leave_unless_reported(0, state.message or "")
        else:
            stopped = state.is_cancelled() or state.is_crashed()
            _leave_unless_reported(EXIT_STOPPED if stopped else EXIT_FAULT, f"error: {state.message}")
        return state

    return run


def _leave_unless_reported(code: int, outcome: str) -> None:
    """From now on the engine reports to Prefect how the flow ended. If it cannot, say so and leave with the flow's own exit code."""
    context = FlowRunContext.get()
    flow_run = context.flow_run if context else None
    if flow_run is None:
        return
    patience = SECONDS_TO_REPORT_UNDER_A_WORKER if _under_a_worker() else SECONDS_TO_REPORT
    server = PREFECT_API_URL.value()

    def watch() -> None:
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            if flow_run.state is not None and flow_run.state.is_final():
                return
            time.sleep(0.2)
        if sys.stdout.isatty():
            print("\x1b[?25h", end="", flush=True)  # the cursor, which the progress bar hides
        print(" ".join(outcome.split()), file=sys.stderr)
        print(f"warning: Prefect at {server} is gone: its page of this run stays as it is; nothing else is missing", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_FAULT if _under_a_worker() else code)  # a worker has to notice

    threading.Thread(target=watch, name="ending", daemon=True).start()


def artifact_key(what: str, experiment: str) -> str:
    """`checkpoints-my-experiment`: Prefect takes lower-case letters, digits and dashes."""
    return f"{what}-{re.sub('[^a-z0-9]+', '-', experiment.lower())}"


def _finished(future: PrefectFuture[Any]) -> State[Any]:
    """Wait for a task; its final state. A failed task's exception is raised here. If the flow run is cancelled meanwhile, the task is
    stopped first."""
    try:
        future.wait()
    except TerminationSignal:
        STOP.set()
        future.wait(timeout=SECONDS_TO_STOP)
        if _under_a_worker():
            raise  # the worker's Prefect says how the run ends: Cancelled, if that is why
    if future.state.is_failed():
        future.result()
    return future.state


_SKIPPED = "Cached"
"""Prefect's own name for a completed run that had nothing to do."""


def _run_stage(stage: str, experiment: str, fresh: bool) -> State[Any]:
    for observer in OBSERVERS:
        observer.began(stage)
    try:
        state = Completed(name=_SKIPPED, message="up to date, skipped") if fresh else _run_by_dvc(stage, experiment)
    except Exception:
        for observer in OBSERVERS:
            observer.ended(stage, Failed(message="failed"))
        raise
    for observer in OBSERVERS:
        observer.ended(stage, state)
    return state


def _run_by_dvc(stage: str, experiment: str) -> State[Any]:
    logger = get_run_logger()

    def on_line(line: str) -> None:
        (logger.warning if line.startswith(WARNING) else logger.info)(line)
        for observer in OBSERVERS:
            observer.said(stage, line)

    try:
        ran = versioning.run_stage(find_project(), stage, experiment, on_line=on_line, stop=STOP, watch_pid=_watched_process())
    except Stopped as stopped:
        return Cancelled(message=str(stopped)) if STOP.is_set() else Crashed(message=str(stopped))
    return Completed() if ran else Completed(name=_SKIPPED, message="up to date, skipped")


def _is_worth_a_retry(task: Any, task_run: Any, state: State[Any]) -> bool:
    """A user's mistake stays one. What else broke a training (a disk, a killed process) may be gone, and it goes on where it was."""
    return not STOP.is_set() and not isinstance(state.result(raise_on_failure=False), UserError)


@task(cache_policy=NO_CACHE, task_run_name="build-config[{experiment}]")
def build_config(experiment: str, fresh: bool) -> State[Any]:
    """Validate the experiment, resolve its data, pin both."""
    return _run_stage("build-config", experiment, fresh)


@task(
    cache_policy=NO_CACHE,
    task_run_name="stream-and-train[{experiment}]",
    retries=2,
    retry_delay_seconds=5,
    retry_condition_fn=_is_worth_a_retry,
)
def stream_and_train(experiment: str, fresh: bool) -> State[Any]:
    """Train, or go on with it."""
    with contextlib.nullcontext() if fresh else _progress_artifact(experiment):
        return _run_stage("train", experiment, fresh)


@task(cache_policy=NO_CACHE, task_run_name="checkpoint-register[{experiment}]")
def checkpoint_register(experiment: str, fresh: bool) -> State[Any]:
    """A version of the registered model for every checkpoint."""
    return _run_stage("register", experiment, fresh)


@task(cache_policy=NO_CACHE, task_run_name="evaluate-each-checkpoint[{experiment}]")
def evaluate_each_checkpoint(experiment: str, fresh: bool) -> State[Any]:
    """Score every checkpoint, and mark the champion."""
    return _run_stage("evaluate", experiment, fresh)


@task(cache_policy=NO_CACHE, task_run_name="sync-tracking[{experiment}]")
def sync_tracking(experiment: str) -> State[Any]:
    """Send MLflow what it has not got of the journal."""
    for observer in OBSERVERS:
        observer.began("sync")
    try:
        part = sync.sync_tracking(find_project(), experiment, STOP)
        state: State[Any] = Failed(message=part.problem) if part.problem else Completed(message=f"MLflow: {part.message}")
    except Stopped as stopped:
        state = Cancelled(message=str(stopped))
    except Exception as error:
        state = Failed(message=f"MLflow did not get the journal, the next run tries again: {error}")
    if state.is_failed():
        get_run_logger().warning(state.message)
    for observer in OBSERVERS:
        observer.ended("sync", state)
    return state


@task(cache_policy=NO_CACHE, task_run_name="push-to-storage[{experiment}]")
def push_to_storage(experiment: str, finished: bool) -> State[Any]:
    """Copy what DVC tracks to the external storage."""
    logger, project = get_run_logger(), find_project()
    for observer in OBSERVERS:
        observer.began("push")
    try:
        versioning.push(project, experiment, on_line=logger.info, stop=STOP)
        if finished:
            mirror.prune(project, experiment)
        state: State[Any] = Completed()
    except Stopped as stopped:
        state = Cancelled(message=str(stopped))
    except Exception as error:
        state = Failed(message=f"not pushed, the next run tries again: {error}")
        logger.warning(state.message)
    for observer in OBSERVERS:
        observer.ended("push", state)
    return state


@task(cache_policy=NO_CACHE, task_run_name="make-report[{experiment}]")
def make_report(experiment: str) -> State[Any]:
    """Make the page of the run, put it among the artifacts of its run in MLflow, and link it here."""
    project = find_project()
    for observer in OBSERVERS:
        observer.began("report")
    try:
        made = publish.publish_apart(project, experiment, STOP)
        state: State[Any] = Failed(message=made.problem) if made.path is None else Completed(message=_below(project, made.path))
        if made.path is not None:
            _link_report(experiment, made.path, made.link)
        if made.problem is not None:
            get_run_logger().warning(made.problem)
    except Stopped as stopped:
        state = Cancelled(message=str(stopped))
    except Exception as error:
        state = Failed(message=f"no report was made: {error}")
        get_run_logger().warning(state.message)
    for observer in OBSERVERS:
        observer.ended("report", state)
    return state


def _link_report(experiment: str, path: Path, link: str | None) -> None:
    lines = [f"The report of {experiment}: `{path}`", f"[in MLflow]({link})" if link else "", f"`gpt2 report {experiment}` makes it anew."]
    key, markdown = artifact_key("report", experiment), "\n\n".join(filter(None, lines))
    _store(lambda: create_markdown_artifact(markdown, key=key, description=f"Report of {experiment}"), "the link to the report")


def _below(project: Project, path: Path) -> str:
    """From the project's folder on, as people type it."""
    return os.path.relpath(path, project.root)


_TASKS = {
    "build-config": build_config,
    "train": stream_and_train,
    "register": checkpoint_register,
    "evaluate": evaluate_each_checkpoint,
}


@contextlib.contextmanager
def _progress_artifact(experiment: str) -> Iterator[None]:
    """Meanwhile, show in Prefect how far the training is. Its server may be away: a thread of its own waits for it, and no step does."""
    done = threading.Event()
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(_publish, experiment, done, get_run_logger()), name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(SECONDS_BETWEEN_UPDATES)


def _publish(experiment: str, done: threading.Event, logger: logging.Logger | logging.LoggerAdapter[Any]) -> None:
    progress = Progress(find_project().run_folder(experiment).journal)
    before = progress.read()  # of an earlier attempt: not news
    artifact: UUID | None = None
    logged_at = time.monotonic()
    while True:
        last = done.wait(SECONDS_BETWEEN_UPDATES)
        reading = progress.read()
        if reading is not None and reading != before:
            before = reading
            try:
                percent = round(100 * reading.step / max(reading.total_steps, 1), 2)
                if artifact is None:
                    key = artifact_key("training", experiment)
                    artifact = cast(UUID, create_progress_artifact(percent, key=key, description=reading.line()))
                else:
                    update_progress_artifact(artifact, percent, description=reading.line())
            except Exception as error:
                logger.debug("progress not shown now: %s", error)
            if last or time.monotonic() - logged_at > SECONDS_BETWEEN_LOG_LINES:
                logger.info(reading.line())
                logged_at = time.monotonic()
        if last:
            return


def _under_a_worker() -> bool:
    return "PREFECT__FLOW_RUN_ID" in os.environ


def _watched_process() -> int:
    """The process with which a training has to end: the worker if one started this flow, else this process."""
    return os.getppid() if _under_a_worker() else os.getpid()
