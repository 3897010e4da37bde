"""The Prefect side of the stages of dvc.yaml: one task each, run by DVC, and what follows them: MLflow and the storage are brought up to
date, and the report is made. The flows are made of these. Prefect's server may go while a flow runs: no stage waits for it.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout
from prefect import State, Task, task
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import TerminationSignal
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Completed, Crashed, Failed

from flows import showing
from flows.ending import under_a_worker
from flows.stop import STOP
from model.errors import Stopped, UserError
from tasks import mirror, sync, versioning
from tasks.project import Project, find_project
from tasks.report import publish
from tasks.steps import WARNING

SECONDS_TO_STOP = 27.0
"""Prefect kills a cancelled flow after 30 s."""

SKIPPED = "Cached"
"""Prefect's own name for a completed run that had nothing to do."""


class Observer(Protocol):
    """Somebody in this process who wants to see the stages pass: the terminal."""

    def began(self, stage: str) -> None: ...  # noqa: D102
    def said(self, stage: str, line: str) -> None: ...  # noqa: D102
    def ended(self, stage: str, state: State[Any]) -> None: ...  # noqa: D102


OBSERVERS: list[Observer] = []

StageTask = Task[[str, bool], State[Any]]
"""Takes the experiment, and whether its stage is up to date."""


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


def run_stages(project: Project, experiment: str, stages: tuple[str, ...], train: StageTask | None = None) -> State[Any] | None:
    """Run the stages one after the other, each as a task. None: all are done; else the state in which the flow has to end.

    `train`: the task that trains, if not here.

    Raises:
        UserError, StageFailed: what a stage failed of.
    """
    fresh = versioning.up_to_date(project, experiment)
    tasks = _TASKS if train is None else {**_TASKS, "train": train, "post-train": train}
    for stage in stages:
        if stage == project.training_stage(experiment):
            showing.name_by_steps(project, experiment)
        state = outcome(tasks[stage].submit(experiment, stage in fresh))
        if not state.is_completed():
            return as_end(state)
        if state.name != SKIPPED:
            fresh = []  # what follows a stage that ran is DVC's to judge anew
    return None


def as_end(state: State[Any]) -> State[Any]:
    """The state in which a flow ends whose task ended in this one."""
    end = Cancelled if state.is_cancelled() else Crashed
    return end(message=state.message)


def bring_up_to_date(experiment: str, finished: bool) -> None:
    """Send MLflow and the external storage what they have not got, and make the report, side by side. If one of them fails, only its own
    task does: the next run, or `gpt2 sync` and `gpt2 report`, catches up. `finished`: training is done, so what the storage got while it
    ran has served."""
    for future in (sync_tracking.submit(experiment), push_to_storage.submit(experiment, finished), make_report.submit(experiment)):
        with contextlib.suppress(Exception):
            outcome(future)


def outcome(future: PrefectFuture[Any]) -> State[Any]:
    """Wait for a task; its final state. A failed task's exception is raised here. If the flow run is cancelled meanwhile, the task is
    stopped first."""
    try:
        future.wait()
    except TerminationSignal:
        STOP.set()
        future.wait(timeout=SECONDS_TO_STOP)
        if under_a_worker():
            raise  # the worker's Prefect says how the run ends: Cancelled, if that is why
    if future.state.is_failed():
        future.result()
    return future.state


def run_stage(stage: str, experiment: str, fresh: bool) -> State[Any]:
    """Run a stage by DVC, or skip it where it is `fresh`, and let the observers see it; the state in which its task ends.

    Raises:
        UserError, StageFailed: what it failed of.
    """
    for observer in OBSERVERS:
        observer.began(stage)
    try:
        state = Completed(name=SKIPPED, message="up to date, skipped") if fresh else _run_by_dvc(stage, experiment)
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
    return Completed() if ran else Completed(name=SKIPPED, message="up to date, skipped")


def _is_worth_a_retry(task: Any, task_run: Any, state: State[Any]) -> bool:
    """A user's mistake stays one. What else broke a training (a disk, a killed process) may be gone, and it goes on where it was."""
    return not STOP.is_set() and not isinstance(state.result(raise_on_failure=False), UserError)


@task(cache_policy=NO_CACHE, task_run_name="build-config[{experiment}]")
def build_config(experiment: str, fresh: bool) -> State[Any]:
    """Validate the experiment, resolve its data, pin both."""
    return run_stage("build-config", experiment, fresh)


@task(
    cache_policy=NO_CACHE,
    task_run_name="stream-and-train[{experiment}]",
    retries=2,
    retry_delay_seconds=5,
    retry_condition_fn=_is_worth_a_retry,
)
def stream_and_train(experiment: str, fresh: bool) -> State[Any]:
    """Train, or go on with it."""
    project = find_project()
    with contextlib.nullcontext() if fresh else showing.training(project, experiment):
        return run_stage(project.training_stage(experiment), experiment, fresh)


@task(cache_policy=NO_CACHE, task_run_name="checkpoint-register[{experiment}]")
def checkpoint_register(experiment: str, fresh: bool) -> State[Any]:
    """A version of the registered model for every checkpoint."""
    return run_stage("register", experiment, fresh)


@task(cache_policy=NO_CACHE, task_run_name="evaluate-each-checkpoint[{experiment}]")
def evaluate_each_checkpoint(experiment: str, fresh: bool) -> State[Any]:
    """Score every checkpoint, and mark the champion."""
    return run_stage("evaluate", experiment, fresh)


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
            showing.link_report(experiment, made.path, made.link)
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


def _below(project: Project, path: Path) -> str:
    """From the project's folder on, as people type it."""
    return os.path.relpath(path, project.root)


_TASKS: dict[str, StageTask] = {
    "build-config": build_config,
    "train": stream_and_train,
    "post-train": stream_and_train,
    "register": checkpoint_register,
    "evaluate": evaluate_each_checkpoint,
}


def _watched_process() -> int:
    """The process with which a training has to end: the worker if one started this flow, else this process."""
    return os.getppid() if under_a_worker() else os.getpid()
