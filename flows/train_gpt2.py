"""The flow `train-gpt2`: from an experiment of params.yaml to its evaluated checkpoints."""

from typing import Any

from prefect import State, flow
from prefect.states import Completed

from flows import stages
from tasks import preflight, versioning
from tasks.project import find_project


@flow(name="train-gpt2", flow_run_name="{experiment}")
@stages.ends_by_itself
def train_gpt2(experiment: str, overrides: dict[str, Any] | None = None) -> State[Any]:
    """Train an experiment of params.yaml, register its checkpoints, evaluate each, and push all of it to the external storage.

    What is up to date is skipped, what was interrupted goes on.

    Args:
        experiment: its name in params.yaml.
        overrides: fields to change for this run, by section, such as `{"training": {"max_steps": 100}}`; they are recorded in
            overrides.yaml in place of those of the last run.
    """
    project = find_project()
    checked = preflight.check(project, experiment, overrides or {})
    with stages.sole_flow(project, experiment):
        project.record_overrides(experiment, overrides or {})
        versioning.configure_remote(project, checked)
        unfinished = stages.run_stages(project, experiment, versioning.STAGES)
        if unfinished is not None:
            return unfinished
        stages.bring_up_to_date(experiment, finished=True)
        stages.show_checkpoints(project, experiment)
    return Completed(message=f"{experiment}: all stages are up to date")
