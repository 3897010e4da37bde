"""The flow `evaluate-new`: evaluation that follows training, so that a curve of scores grows beside the loss. Training never waits for
it."""

from typing import Any

from prefect import State, flow, get_run_logger
from prefect.states import Cancelled, Completed, Failed

from flows import on_gpu, showing
from flows.automations import tell_champion
from flows.ending import ends_by_itself, under_a_worker
from flows.stop import STOP
from model.errors import Stopped, UserError
from tasks import beside
from tasks.news import standing
from tasks.project import find_project


@flow(name="evaluate-new", flow_run_name="{experiment}: what is new")
@ends_by_itself
def evaluate_new(experiment: str) -> State[Any]:
    """Register and score what trainings have sealed and nobody has scored: an experiment's, then that of all that train now, until nothing
    is left. One run at a time does this; those that other checkpoints ask for meanwhile are not needed, and cancelled.

    DVC is busy with the training and is not asked: its stages, once their turn comes, find what is done here and fill in the rest.

    Args:
        experiment: its name in params.yaml; a new checkpoint of it asked for this run.
    """
    project, logger = find_project(), get_run_logger()
    if under_a_worker():
        beside.stand_back()
    scored: dict[str, int] = {}
    failed: dict[str, str] = {}
    more = True
    while more:
        more = False
        for name in dict.fromkeys([experiment, *on_gpu.in_training()]):
            if name in failed:
                continue
            try:
                before = standing(project, name)
                new = beside.evaluate_new(project, name, on_line=logger.info, stop=STOP)
            except Stopped as stopped:
                return Cancelled(message=str(stopped))
            except (UserError, RuntimeError) as error:
                logger.error("%s: %s", name, error)
                failed[name] = str(error)
                continue
            scored[name] = scored.get(name, 0) + len(new)
            if new:
                more = True
                tell_champion(project, name, before)
                showing.show_checkpoints(project, name)
    counts = ", ".join(f"{count} of {name}" for name, count in scored.items() if count)
    if failed:
        return Failed(message=f"not scored: {'; '.join(f'{name}: {why}' for name, why in failed.items())}; scored: {counts or 'none'}")
    return Completed(message=f"scored: {counts or 'none, all were'}")
