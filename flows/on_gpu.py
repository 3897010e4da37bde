"""Training on the pool `gpu`, asked for by a flow on the pool `cpu`: a flow run of its own, which goes on whatever becomes of the one that
asked for it. Whoever asks next, while it lives, waits for it instead of starting another.

Of the ways that were tried (docs/experiments.md) a sub-deployment is the one that shows where training runs, is cancelled with its parent,
and outlives it if that only dies.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from prefect import State, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Cancelling, Completed, Crashed, Failed

from flows import stages
from flows.ending import under_a_worker
from flows.stop import STOP
from model.changes import Changes, changes_of
from model.errors import UserError
from tasks.project import Project, find_project
from tasks.stream_and_train import TRAINED_ELSEWHERE
from tasks.tracking import read_config

DEPLOYMENT = "stream-and-train/gpu"
SECONDS_BETWEEN_LOOKS = 3.0
SECONDS_BETWEEN_LINES = 60.0
SECONDS_TO_CANCEL = 22.0
"""A cancelled flow has 30 s, and so has the training that it cancels."""
SECONDS_TO_LEAVE = 15.0
"""For one that was taken for dead: it looks at its own state every few seconds, stops, and lets go of the run."""
LONGEST_PENDING = timedelta(minutes=15)
"""Between a worker's taking a run and its first sign of life, after which the heartbeats are waited for."""
_TAG = "trains:"
"""Begins the tag of every flow run that trains; the experiment follows."""
_ENDED = {StateType.COMPLETED, StateType.FAILED, StateType.CANCELLED, StateType.CRASHED}
_LIVING = [each for each in StateType if each not in _ENDED]


def is_meant() -> bool:
    """Whether this flow run is a deployed one: a worker runs it, and training is the pool `gpu`'s."""
    return under_a_worker() and runtime.deployment.id is not None


def living_training(experiment: str) -> FlowRun | None:
    """The flow run that trains the experiment now, or waits to; the oldest if there are several."""
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(
                tags=FlowRunFilterTags(all_=[f"{_TAG}{experiment}"]),
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_LIVING)),
            ),
            sort=FlowRunSort.EXPECTED_START_TIME_ASC,
            limit=1,
        )
    return found[0] if found else None


def in_training() -> list[str]:
    """The experiments that are trained now, on whatever machine; none if Prefect's server does not answer."""
    with contextlib.suppress(Exception), get_client(sync_client=True) as client:
        return _in_training(client)
    return []


def _in_training(client: SyncPrefectClient) -> list[str]:
    running = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING])))
    found = client.read_flow_runs(flow_run_filter=running, limit=200)
    return sorted({tag.removeprefix(_TAG) for run in found for tag in run.tags if tag.startswith(_TAG)})


def changes_of_run(training: FlowRun) -> dict[str, Any]:
    """The overrides that a training was started with."""
    return changes_of(Changes.model_validate(training.parameters.get("overrides") or {}))


def refuse_other_changes(living: FlowRun, experiment: str, changes: dict[str, Any]) -> None:
    """A training can be joined by those who ask for the same.

    Raises:
        UserError: it was started with other overrides.
    """
    theirs = changes_of_run(living)
    if theirs != changes:
        raise UserError(
            f"overrides: {experiment} is being trained with others ({theirs or 'none'}) by the flow run {living.name}; cancel that, wait "
            "for it, or give the same"
        )


@task(cache_policy=NO_CACHE, task_run_name="stream-and-train[{experiment}]")
def join(experiment: str, config_digest: str | None) -> State[Any]:
    """Wait for the training that is going on, of this configuration. (This clone may have built another one, or none.)"""
    return _trained(find_project(), experiment, config_digest) or Completed()


@task(cache_policy=NO_CACHE, task_run_name="stream-and-train[{experiment}]")
def train_there(experiment: str, fresh: bool) -> State[Any]:
    """Train on the pool `gpu`, wait for it, and have here what it made."""
    project = find_project()
    stage = project.training_stage(experiment)
    if fresh:
        return stages.run_stage(stage, experiment, fresh)
    unfinished = _trained(project, experiment, read_config(project.run_folder(experiment)).digest)
    if unfinished is not None:
        return unfinished
    here = stages.run_stage(stage, experiment, fresh=False)
    return Completed(message="trained on the pool gpu") if here.is_completed() else here


def _trained(project: Project, experiment: str, config_digest: str | None) -> State[Any] | None:
    """Have it trained; None when it is, else the state in which the task has to end. One that crashes begins again, by policy."""
    logger, last = get_run_logger(), None
    resumes = project.experiment(experiment).orchestration.auto_resume
    for attempt in range(resumes + 1):
        child = living_training(experiment)
        if child is not None and child.state is not None and child.state.is_cancelling():
            logger.info("%s is being cancelled; a new training waits for its end", child.name)
            _wait(child, STOP, logger.info)
            child = living_training(experiment)
        child = child or _start(project, experiment, config_digest)
        state = _wait(child, STOP, logger.info)
        if state is None:
            return _stopped(child)
        if state.is_completed():
            os.environ[TRAINED_ELSEWHERE] = "1"
            return None
        if not state.is_crashed():
            end = Cancelled if state.is_cancelled() else Failed
            return end(message=f"training ended {state.name}: {state.message}")
        last = state.message
        if attempt < resumes:
            logger.warning("training crashed: %s; it begins again (%s of %s)", last, attempt + 1, resumes)
            STOP.wait(SECONDS_TO_LEAVE)
    return Failed(message=f"training crashed {resumes + 1} times (orchestration.auto_resume: {resumes}), the last time: {last}")


def _start(project: Project, experiment: str, config_digest: str | None) -> FlowRun:
    """A flow run that trains the experiment, scheduled now; no other configuration of it than this one."""
    try:
        return run_deployment(  # type: ignore[return-value]
            DEPLOYMENT,
            parameters={"experiment": experiment, "overrides": project.overrides(experiment), "config_digest": config_digest},
            timeout=0,
            flow_run_name=experiment,
            tags=[f"{_TAG}{experiment}"],
            idempotency_key=str(uuid4()),  # a request that is sent again, because no answer came, asks for the same
        )
    except ObjectNotFound:
        raise UserError(f"the deployment {DEPLOYMENT} is not there; deploy it: gpt2 deploy") from None


def _wait(child: FlowRun, stop: threading.Event, report: Callable[[str], None]) -> State[Any] | None:
    """The state in which it ended; None if `stop` was set before. A server that does not answer is asked again: training does not need it.

    `report` gets a line a minute while it waits for a worker: for what.
    """
    told = time.monotonic()
    while not stop.wait(SECONDS_BETWEEN_LOOKS):
        try:
            with get_client(sync_client=True) as client:
                state = client.read_flow_run(child.id).state
                if state is not None and state.type in _ENDED:
                    return state
                if state is not None and state.is_pending() and datetime.now(UTC) - state.timestamp > LONGEST_PENDING:
                    lost = f"no sign of life for {LONGEST_PENDING.total_seconds() / 60:.0f} minutes after a worker took it"
                    client.set_flow_run_state(child.id, Crashed(message=lost), force=True)
                if state is not None and state.type != StateType.RUNNING and time.monotonic() - told > SECONDS_BETWEEN_LINES:
                    told = time.monotonic()
                    report(_waits_for(client, child))
        except Exception as error:
            if time.monotonic() - told > SECONDS_BETWEEN_LINES:
                told = time.monotonic()
                report(f"Prefect does not say how {child.name} is doing: {error}")
    return None


def _waits_for(client: SyncPrefectClient, child: FlowRun) -> str:
    now = ", ".join(_in_training(client)) or "none (does a worker of the pool gpu run?)"
    return f"{child.name} waits for a free GPU; these train: {now}"


def _stopped(child: FlowRun) -> State[Any]:
    """This flow was stopped. If somebody asked for that, training is to stop, too; if its worker only ends, training goes on."""
    own = runtime.flow_run.id
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(UUID(own)).state if own else None
            if state is None or not (state.is_cancelling() or state.is_cancelled() or state.is_paused()):
                return Crashed(message="the flow was stopped; training goes on by itself, and the next run waits for it")
            client.set_flow_run_state(child.id, Cancelling(message="cancelled with the flow that asked for it"))
            deadline = time.monotonic() + SECONDS_TO_CANCEL
            while time.monotonic() < deadline:
                now = client.read_flow_run(child.id).state
                if now is not None and now.type in _ENDED:
                    break
                time.sleep(0.5)
    except Exception as error:
        return Crashed(message=f"the flow was stopped, and Prefect does not answer ({error}); training goes on unless it is told by itself")
    return Cancelled(message="cancelled, and training with it; the same command goes on")
