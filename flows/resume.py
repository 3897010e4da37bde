"""The flow `resume`: a training that crashed begins again from its last checkpoint, by policy, without anybody asking."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from prefect import State, flow, get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId, FlowRunFilter, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.states import Completed, Failed, Scheduled

from flows.ending import ends_by_itself
from model.changes import Changes, changes_of
from tasks.project import find_project


@flow(name="resume", flow_run_name="resume")
@ends_by_itself
def resume(flow_run: str) -> State[Any]:
    """Start a crashed run of `train-gpt2` or `post-train` again, with the same parameters, as often as its experiment's
    `orchestration.auto_resume` says.

    A run that somebody cancelled, began again by hand, or that no worker runs, is left as it is.

    Args:
        flow_run: its id, or the resource `prefect.flow-run.ID` of the event that tells of its crash.
    """
    logger = get_run_logger()
    with get_client(sync_client=True) as client:
        crashed = client.read_flow_run(UUID(flow_run.removeprefix("prefect.flow-run.")))
        experiment = crashed.parameters.get("experiment")
        flow_name = client.read_flow(crashed.flow_id).name
        if flow_name not in ("train-gpt2", "post-train") or crashed.deployment_id is None or not isinstance(experiment, str):
            return Completed(message=f"{crashed.name} is no deployed training: left as it is")
        if crashed.state is None or not crashed.state.is_crashed():
            return Completed(message=f"{crashed.name} is {crashed.state_name} by now: left as it is")
        first = next((tag for tag in crashed.tags if tag.startswith(_TAG)), f"{_TAG}{crashed.id}")
        tries = len(_tagged(client, first))
        if _begun_since(client, crashed, experiment, first):
            return Completed(message=f"{experiment} was begun again by hand: left to that")
        changes = changes_of(Changes.model_validate(crashed.parameters.get("overrides") or {}))
        allowed = find_project().with_overrides(experiment, changes).orchestration.auto_resume
        if tries >= allowed:
            return Failed(
                message=f"{experiment} crashed and is not resumed: orchestration.auto_resume allows {allowed}, {tries} were made; when the "
                f"cause is gone, prefect deployment run {flow_name}/{client.read_deployment(crashed.deployment_id).name} goes on"
            )
        again = client.create_flow_run_from_deployment(
            crashed.deployment_id,
            parameters=crashed.parameters,
            state=Scheduled(scheduled_time=datetime.now(UTC) + TO_LEAVE),
            name=experiment,
            tags=[*(tag for tag in crashed.tags if not tag.startswith(_TAG)), first],
            idempotency_key=f"resume-{crashed.id}",
        )
    logger.info("%s crashed (%s); it goes on as the flow run %s", crashed.name, crashed.state.message, again.id)
    return Completed(message=f"{experiment} goes on, {tries + 1} of {allowed} times")


TO_LEAVE = timedelta(seconds=15)
"""Given to a run that was only taken for dead: it looks at its own state every few seconds, and lets go of the experiment."""

_TAG = "resumes:"
"""Begins the tag of all flow runs that were started for one that crashed: its id follows."""


def _tagged(client: SyncPrefectClient, tag: str) -> list[FlowRun]:
    return client.read_flow_runs(flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[tag])), limit=200)


def _begun_since(client: SyncPrefectClient, crashed: FlowRun, experiment: str, first: str) -> bool:
    """Whether a run of the same experiment was created after the crashed one, not by this flow."""
    assert crashed.deployment_id is not None
    of_the_deployment = DeploymentFilter(id=DeploymentFilterId(any_=[crashed.deployment_id]))
    found = client.read_flow_runs(deployment_filter=of_the_deployment, sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=200)
    return any(
        run.created is not None
        and crashed.created is not None
        and run.created > crashed.created
        and run.parameters.get("experiment") == experiment
        and first not in run.tags
        for run in found
    )
