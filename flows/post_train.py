"""The flow `post-train`: from a trained network to a registered model that answers."""

from prefect import State, flow

from flows import on_gpu, pipeline
from flows.ending import ends_by_itself
from model.changes import Changes, changes_of
from tasks.post_training import check_is_one, pinned
from tasks.project import find_project


@flow(name="post-train", flow_run_name="{experiment}")
@ends_by_itself
def post_train(experiment: str, overrides: Changes | None = None) -> State[object]:
    """Fine-tune a trained network on questions with their answers, register its checkpoints as a model of their own, evaluate each beside
    the base, and push all of it to the external storage.

    It begins with the version that `post_training.base` names; if an alias has moved to another one since, it begins anew with that.
    What is up to date is skipped, what was interrupted goes on. Deployed, it trains on the pool `gpu`, else in this process.

    Args:
        experiment: its name in params.yaml: one with `post_training`.
        overrides: fields to change for this run; they are recorded in overrides.yaml in place of those of the last run.
    """
    project = find_project()
    check_is_one(project, experiment)
    living = on_gpu.living_training(experiment) if on_gpu.is_meant() else None
    begun_with = on_gpu.changes_of_run(living) if living is not None else None
    return pipeline.run(project, experiment, pinned(project, experiment, changes_of(overrides), begun_with))
