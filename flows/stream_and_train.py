"""The flow `stream-and-train`: what a worker of the pool `gpu` does for `train-gpt2` and `post-train`."""

from functools import partial

from prefect import State, flow
from prefect.states import Completed

from flows import stages
from flows.ending import ends_by_itself
from model.changes import Changes, changes_of
from model.errors import UserError
from tasks import preflight, versioning
from tasks.project import Project, find_project
from tasks.tracking import read_config


@flow(name="stream-and-train", flow_run_name="{experiment}")
@partial(ends_by_itself, may_pause=False)  # a worker with a limit dies of a run that is resumed too soon; train-gpt2 may
def stream_and_train(experiment: str, overrides: Changes | None = None, config_digest: str | None = None) -> State[object]:
    """Train an experiment of params.yaml, or go on with it; `train-gpt2` and `post-train` start this, register and evaluate.

    Args:
        experiment: its name in params.yaml.
        overrides: fields to change for this run, as in `train-gpt2`.
        config_digest: of the configuration that was asked for, with the data as they were resolved then; another one is refused.
    """
    project, changes = find_project(), changes_of(overrides)
    checked = preflight.check(project, experiment, changes)
    project.record_overrides(experiment, changes)
    versioning.configure_remote(project, checked)
    unfinished = stages.run_stages(project, experiment, ("build-config",))
    if unfinished is not None:
        return unfinished
    _refuse_another(project, experiment, config_digest)
    return stages.run_stages(project, experiment, (project.training_stage(experiment),)) or Completed(message=f"{experiment} is trained")


def _refuse_another(project: Project, experiment: str, asked_for: str | None) -> None:
    """What was asked for is what is trained here: a week later it would be too late to find out.

    Raises:
        UserError: this clone builds another configuration.
    """
    ours = read_config(project.run_folder(experiment))
    if asked_for is not None and ours.digest != asked_for:
        raise UserError(
            f"{experiment}: in {project.root} its configuration is {ours.digest[:12]} (data {ours.dataset.digest[:12]}, revision "
            f"{ours.dataset.revision}), asked for is {asked_for[:12]}: check out the same commit; pin data.revision if the data moved"
        )
