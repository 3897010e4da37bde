"""The flow `train-gpt2`: from an experiment of params.yaml to its evaluated checkpoints."""

from prefect import State, flow

from flows import pipeline
from flows.ending import ends_by_itself
from model.changes import Changes, changes_of
from tasks.post_training import check_is_none
from tasks.project import find_project


@flow(name="train-gpt2", flow_run_name="{experiment}")
@ends_by_itself
def train_gpt2(experiment: str, overrides: Changes | None = None) -> State[object]:
    """Train an experiment of params.yaml, register its checkpoints, evaluate each, and push all of it to the external storage.

    What is up to date is skipped, what was interrupted goes on. Deployed, it trains on the pool `gpu`, else in this process.

    Args:
        experiment: its name in params.yaml.
        overrides: fields to change for this run; they are recorded in overrides.yaml in place of those of the last run.
    """
    project = find_project()
    check_is_none(project, experiment)
    return pipeline.run(project, experiment, changes_of(overrides))
