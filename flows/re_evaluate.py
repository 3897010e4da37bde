"""The flow `re-evaluate`: register and evaluate whatever checkpoints there are. What is scored already costs nothing.

Without an experiment's name it is the nightly round: the champion rule meets the registry as it stands, what the services missed is sent,
and all that is stored is looked after.
"""

import contextlib
import os
from typing import Any

from prefect import State, flow, get_run_logger, runtime, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.states import Cancelled, Completed, Failed

from flows import showing, stages
from flows.automations import tell_champion, tell_rotten, watch
from flows.ending import ends_by_itself
from flows.night_page import Night, line, page
from flows.stop import STOP
from model.errors import Stopped, UserError
from model.params import merge
from tasks import recheck, sync, versioning
from tasks.news import standing
from tasks.project import Project, find_project

ARTIFACT = "nightly"
"""The key of the nightly report."""


def _run_name() -> str:
    return str(runtime.flow_run.parameters["experiment"] or "every experiment")


@flow(name="re-evaluate", flow_run_name=_run_name)
@ends_by_itself
def re_evaluate(experiment: str | None = None, questions: int | None = None, every_byte: bool = False) -> State[Any]:
    """Register and evaluate the checkpoints of one experiment, or of all that have some.

    All of them is the nightly round. It also sends what MLflow and the storage missed, reads the stored checkpoints (of the storage a share
    each night), and reports. One experiment's trouble keeps no other back. It fails if a checkpoint is rotten.

    Args:
        experiment: its name in params.yaml; by default all are evaluated, but for those that another flow works on.
        questions: how many held-out questions to ask, recorded as `evaluation.questions` in overrides.yaml; by default what is
            configured.
        every_byte: in the nightly round, read all of the storage, not only tonight's share.
    """
    project = find_project()
    trained = [name for name in project.experiment_names() if any(project.run_folder(name).checkpoints.glob("step_*"))]
    if experiment is None:
        return _round(project, trained, questions, every_byte)
    if experiment not in trained:
        project.experiment(experiment)
        raise UserError(f"{experiment} has no checkpoints yet; train it first: gpt2 {project.training_stage(experiment)} {experiment}")
    return _evaluate(project, experiment, questions) or Completed(message=f"{experiment}: every checkpoint is evaluated")


def _evaluate(project: Project, name: str, questions: int | None) -> State[Any] | None:
    """None if all went well, else the state in which the flow has to end."""
    with stages.sole_flow(project, name, patience=0.0):
        before = standing(project, name)
        unfinished = stages.run_stages(project, name, (*_prepared(project, name, questions), "register", "evaluate"))
        if unfinished is None:
            tell_champion(project, name, before)
            stages.bring_up_to_date(name, finished=False)
            showing.show_checkpoints(project, name)
        return unfinished


def _prepared(project: Project, name: str, questions: int | None) -> tuple[str, ...]:
    """Record what is asked for; the stages that this takes beside registering and evaluating."""
    if questions is not None:
        overrides = merge(project.overrides(name), {"evaluation": {"questions": questions}})
        project.with_overrides(name, overrides)  # is it valid?
        project.record_overrides(name, overrides)
    versioning.configure_remote(project, project.experiment(name))
    return () if questions is None else ("build-config",)


def _round(project: Project, names: list[str], questions: int | None, every_byte: bool) -> State[Any]:
    """One experiment after the other."""
    with contextlib.suppress(Exception), get_client(sync_client=True) as client:
        watch(client)
    budget = recheck.NIGHTLY_BYTES // max(len(names), 1)
    nights = []
    try:
        for name in names:
            night = Night(name)
            nights.append(night)
            _evaluate_anew(project, night, questions)
            _look_after(project, night, None if every_byte else budget)
    except Stopped as stopped:
        return Cancelled(message=str(stopped))
    text = line(nights)
    try:
        create_markdown_artifact(page(nights), key=ARTIFACT, description=text)
    except Exception as error:
        get_run_logger().warning("the report was not stored: %s", error)
    failed = any(night.is_rotten or not (night.news or night.busy) for night in nights)
    return (Failed if failed else Completed)(message=text)


def _evaluate_anew(project: Project, night: Night, questions: int | None) -> None:
    """Register, score and crown; send what is missing. What goes wrong becomes a problem of the night.

    Raises:
        Stopped: the flow is asked to stop.
    """
    name = night.experiment
    try:
        with stages.sole_flow(project, name, patience=0.0):
            before = standing(project, name)
            unfinished = stages.run_stages(project, name, (*_prepared(project, name, questions), "register"))
            if unfinished is not None:
                raise Stopped(unfinished.message)
            stages.outcome(evaluate_anew.submit(name))
            night.news = tell_champion(project, name, before)
            showing.show_checkpoints(project, name)
            stages.outcome(sync_all.submit(name))
            night.synced = True
    except stages.Busy as busy:
        night.busy = str(busy)
    except Exception as error:
        _note(night, error)
    if night.news is not None:
        with contextlib.suppress(Exception):  # it says so itself
            stages.outcome(stages.make_report.submit(name))


def _look_after(project: Project, night: Night, budget: int | None) -> None:
    """Read what is stored, and tell of what is rotten. What cannot be read becomes a problem of the night.

    Raises:
        Stopped: the flow is asked to stop.
    """
    name = night.experiment
    for look in (recheck_local.submit(name), recheck_stored.submit(name, budget, pushed=night.synced)):
        try:
            stages.outcome(look)
            found: recheck.Rechecked = look.result()
        except Exception as error:
            _note(night, error)
            continue
        night.rechecked.append(found)
        for rotten in found.rotten:
            get_run_logger().error("%s: %s is rotten in %s: %s", night.experiment, rotten.checkpoint, rotten.place, rotten.problem)
            tell_rotten(night.experiment, rotten)


def _note(night: Night, error: Exception) -> None:
    if STOP.is_set():
        raise Stopped("stopped; the next round does what is missing") from error
    get_run_logger().error("%s: %s", night.experiment, error)
    night.problems.append(str(error) or type(error).__name__)


@task(cache_policy=NO_CACHE, task_run_name="evaluate-anew[{experiment}]")
def evaluate_anew(experiment: str) -> None:
    """The stage `evaluate`, also where DVC finds it up to date: the registry, and how checkpoints are scored, are none of its files. What
    is scored under the same key stays so."""
    logger = get_run_logger()
    versioning.run_stage(find_project(), "evaluate", experiment, on_line=logger.info, stop=STOP, watch_pid=os.getpid(), force=True)


@task(cache_policy=NO_CACHE, task_run_name="sync[{experiment}]")
def sync_all(experiment: str) -> None:
    """Send MLflow and the storage what they missed."""
    parts = sync.sync(find_project(), experiment, STOP)
    if problems := [part.problem for part in parts if part.problem]:
        raise UserError("; ".join(problems))


@task(cache_policy=NO_CACHE, task_run_name="recheck-local[{experiment}]")
def recheck_local(experiment: str) -> recheck.Rechecked:
    """Read every byte of the checkpoints in the run folder."""
    return recheck.recheck_local(find_project(), experiment, STOP)


@task(cache_policy=NO_CACHE, task_run_name="recheck-storage[{experiment}]")
def recheck_stored(experiment: str, budget: int | None, pushed: bool) -> recheck.Rechecked:
    """Look at the checkpoints in the storage, and read about `budget` bytes of them; None: all. `pushed`: it has all that DVC knows of."""
    return recheck.recheck_stored(find_project(), experiment, budget, STOP, pushed=pushed)
