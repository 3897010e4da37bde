"""What `train-gpt2` and `post-train` have in common: all stages of an experiment, and what follows them."""

from typing import Any

from prefect import State
from prefect.client.schemas.objects import FlowRun
from prefect.states import Completed

from flows import on_gpu, showing, stages
from flows.automations import tell_champion
from tasks import preflight, versioning
from tasks.news import standing
from tasks.project import Project


def run(project: Project, experiment: str, changes: dict[str, Any]) -> State[object]:
    """Bring all stages of an experiment with these changes up to date, then MLflow, the storage and the report; the state in which the flow
    ends. Deployed, it trains on the pool `gpu`, else in this process.

    Raises:
        UserError: the experiment cannot be trained here, or another flow works on it.
        StageFailed: a stage failed.
    """
    elsewhere = on_gpu.is_meant()
    checked = preflight.check(project, experiment, changes, trains_here=not elsewhere)
    with stages.sole_flow(project, experiment):
        living = on_gpu.living_training(experiment) if elsewhere else None
        if living is not None:
            on_gpu.refuse_other_changes(living, experiment, changes)
        before = standing(project, experiment)
        project.record_overrides(experiment, changes)
        versioning.configure_remote(project, checked)
        unfinished = _run_stages(project, experiment, elsewhere, living)
        if unfinished is not None:
            return unfinished
        tell_champion(project, experiment, before)
        stages.bring_up_to_date(experiment, finished=True)
        showing.show_checkpoints(project, experiment)
    return Completed(message=f"{experiment}: all stages are up to date")


def _run_stages(project: Project, experiment: str, elsewhere: bool, living: FlowRun | None) -> State[object] | None:
    """None if all stages are done, else the state in which the flow has to end."""
    names = versioning.stages_of(project, experiment)
    if not elsewhere:
        return stages.run_stages(project, experiment, names)
    if living is not None:
        state = stages.outcome(on_gpu.join.submit(experiment, living.parameters.get("config_digest")))
        if not state.is_completed():
            return stages.as_end(state)
        return stages.run_stages(project, experiment, names)
    return stages.run_stages(project, experiment, names, train=on_gpu.train_there)
