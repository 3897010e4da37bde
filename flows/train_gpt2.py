"""The flow `train-gpt2`: from an experiment of params.yaml to its evaluated checkpoints."""

from prefect import State, flow
from prefect.client.schemas.objects import FlowRun
from prefect.states import Completed

from flows import on_gpu, showing, stages
from flows.automations import tell_champion
from flows.ending import ends_by_itself
from model.changes import Changes, changes_of
from tasks import preflight, versioning
from tasks.news import standing
from tasks.project import Project, find_project


@flow(name="train-gpt2", flow_run_name="{experiment}")
@ends_by_itself
def train_gpt2(experiment: str, overrides: Changes | None = None) -> State[object]:
    """Train an experiment of params.yaml, register its checkpoints, evaluate each, and push all of it to the external storage.

    What is up to date is skipped, what was interrupted goes on. Deployed, it trains on the pool `gpu`, else in this process.

    Args:
        experiment: its name in params.yaml.
        overrides: fields to change for this run; they are recorded in overrides.yaml in place of those of the last run.
    """
    project, changes = find_project(), changes_of(overrides)
    elsewhere = on_gpu.is_meant()
    checked = preflight.check(project, experiment, changes, trains_here=not elsewhere)
    with stages.sole_flow(project, experiment):
        living = on_gpu.living_training(experiment) if elsewhere else None
        if living is not None:
            on_gpu.refuse_other_changes(living, experiment, changes)
        before = standing(project, experiment)
        project.record_overrides(experiment, changes)
        versioning.configure_remote(project, checked)
        unfinished = _run(project, experiment, elsewhere, living)
        if unfinished is not None:
            return unfinished
        tell_champion(project, experiment, before)
        stages.bring_up_to_date(experiment, finished=True)
        showing.show_checkpoints(project, experiment)
    return Completed(message=f"{experiment}: all stages are up to date")


def _run(project: Project, experiment: str, elsewhere: bool, living: FlowRun | None) -> State[object] | None:
    """None if all stages are done, else the state in which the flow has to end."""
    if not elsewhere:
        return stages.run_stages(project, experiment, versioning.STAGES)
    if living is not None:
        state = stages.outcome(on_gpu.join.submit(experiment, living.parameters.get("config_digest")))
        if not state.is_completed():
            return stages.as_end(state)
        return stages.run_stages(project, experiment, versioning.STAGES)
    return stages.run_stages(project, experiment, versioning.STAGES, train=on_gpu.train_there)
