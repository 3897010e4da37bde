"""Which crashed runs begin again by themselves, and how often: on a real Prefect server, without a worker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.settings import temporary_settings
from prefect.states import Cancelled, Crashed, Running

from flows.resume import resume
from tests.flows.prefect_server import PrefectServer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    server = PrefectServer(tmp_path_factory.mktemp("prefect"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def client(server: PrefectServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[SyncPrefectClient]:
    monkeypatch.chdir(ROOT)
    with temporary_settings({"api.url": server.api}), get_client(sync_client=True) as client:
        yield client


@pytest.fixture
def training(client: SyncPrefectClient, request: pytest.FixtureRequest) -> UUID:
    """A deployment of a flow named like the real one; each test has its own."""

    @flow(name="train-gpt2")
    def train(experiment: str, overrides: dict[str, Any] | None = None) -> None: ...

    return client.create_deployment(client.create_flow(train), name=request.node.name[:100])


def crashed(client: SyncPrefectClient, deployment: UUID, **overrides: Any) -> FlowRun:
    run = client.create_flow_run_from_deployment(deployment, parameters={"experiment": "quickstart", "overrides": overrides})
    return crash(client, run)


def crash(client: SyncPrefectClient, run: FlowRun) -> FlowRun:
    client.set_flow_run_state(run.id, Running(), force=True)
    client.set_flow_run_state(run.id, Crashed(message="no sign of life"), force=True)
    return client.read_flow_run(run.id)


def said(run: FlowRun) -> tuple[str, str]:
    state = resume(f"prefect.flow-run.{run.id}", return_state=True)  # type: ignore[call-overload]
    return state.name, state.message


def begun(client: SyncPrefectClient, deployment: UUID, but: set[UUID]) -> list[FlowRun]:
    return [run for run in client.read_flow_runs(limit=200) if run.deployment_id == deployment and run.id not in but]


def test_it_begins_again_with_the_same_parameters_and_once_only(client: SyncPrefectClient, training: UUID) -> None:
    run = crashed(client, training, training={"max_steps": 7})
    assert said(run) == ("Completed", "quickstart goes on, 1 of 3 times")
    (again,) = begun(client, training, {run.id})
    assert again.parameters == {"experiment": "quickstart", "overrides": {"training": {"max_steps": 7}}}
    assert again.state is not None
    assert again.state.is_scheduled()
    said(run)  # an event may arrive twice
    assert len(begun(client, training, {run.id})) == 1


def test_it_is_resumed_as_often_as_its_policy_says(client: SyncPrefectClient, training: UUID) -> None:
    run, known = crashed(client, training, orchestration={"auto_resume": 2}), set()
    for time in (1, 2):
        known.add(run.id)
        assert said(run) == ("Completed", f"quickstart goes on, {time} of 2 times")
        (again,) = begun(client, training, known)
        run = crash(client, again)
    known.add(run.id)
    name, message = said(run)
    assert name == "Failed"
    assert "orchestration.auto_resume allows 2, 2 were made" in message
    assert begun(client, training, known) == []


def test_a_policy_of_none_resumes_nothing(client: SyncPrefectClient, training: UUID) -> None:
    run = crashed(client, training, orchestration={"auto_resume": 0})
    assert said(run)[0] == "Failed"
    assert begun(client, training, {run.id}) == []


def test_what_somebody_cancelled_is_left(client: SyncPrefectClient, training: UUID) -> None:
    run = crashed(client, training)
    client.set_flow_run_state(run.id, Cancelled(), force=True)
    assert said(run) == ("Completed", f"{run.name} is Cancelled by now: left as it is")
    assert begun(client, training, {run.id}) == []


def test_what_somebody_began_again_by_hand_is_left(client: SyncPrefectClient, training: UUID) -> None:
    run = crashed(client, training)
    by_hand = client.create_flow_run_from_deployment(training, parameters={"experiment": "quickstart"})
    assert said(run) == ("Completed", "quickstart was begun again by hand: left to that")
    assert begun(client, training, {run.id, by_hand.id}) == []


def test_another_experiments_run_is_no_reason_to_leave_it(client: SyncPrefectClient, training: UUID) -> None:
    run = crashed(client, training)
    client.create_flow_run_from_deployment(training, parameters={"experiment": "samples2m"})
    assert said(run)[1] == "quickstart goes on, 1 of 3 times"


def test_other_flows_and_runs_without_a_worker_are_left(client: SyncPrefectClient, training: UUID) -> None:
    @flow(name="re-evaluate")
    def other(experiment: str) -> None: ...

    evaluation = client.create_deployment(client.create_flow(other), name="other")
    assert "no deployed training" in said(crashed(client, evaluation))[1]
    in_a_terminal = client.create_flow_run(other, parameters={"experiment": "quickstart"})
    assert "no deployed training" in said(crash(client, in_a_terminal))[1]


def test_a_post_training_is_begun_again_too(client: SyncPrefectClient) -> None:
    @flow(name="post-train")
    def tune(experiment: str, overrides: dict[str, Any] | None = None) -> None: ...

    deployment = client.create_deployment(client.create_flow(tune), name="of-quickstart")
    parameters: dict[str, Any] = {"experiment": "quickstart-tuned", "overrides": {}}
    assert said(crash(client, client.create_flow_run_from_deployment(deployment, parameters=parameters)))[1] == (
        "quickstart-tuned goes on, 1 of 3 times"
    )
    parameters["overrides"] = {"orchestration": {"auto_resume": 0}}
    name, message = said(crash(client, client.create_flow_run_from_deployment(deployment, parameters=parameters)))
    assert name == "Failed"
    assert message.endswith("prefect deployment run post-train/of-quickstart goes on")
