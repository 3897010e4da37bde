"""`prefect deploy --all` says success even for a flow that cannot be imported: here each deployment's is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.schemas.schedules import CronSchedule
from prefect.flows import Flow, load_flow_from_entrypoint

from flows.automations import FLOWS
from flows.clone import PROJECT, enter
from model.errors import UserError
from tasks.project import Project

ROOT = Path(__file__).parents[2]
DEPLOYMENTS: list[dict[str, Any]] = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
NAMES = {
    "train-gpt2/quickstart": "cpu",
    "train-gpt2/samples2m": "cpu",
    "train-gpt2/samples2m-muon": "cpu",
    "post-train/quickstart": "cpu",
    "post-train/samples2m": "cpu",
    "stream-and-train/gpu": "gpu",
    "evaluate-new/follow": "cpu",
    "resume/crashed": "cpu",
    "re-evaluate/nightly": "cpu",
}
"""The names that people type, and where each runs."""


def load(deployment: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Flow[Any, Any]:
    monkeypatch.chdir(ROOT)
    return load_flow_from_entrypoint(deployment["entrypoint"])


def named(name: str) -> dict[str, Any]:
    return next(deployment for deployment in DEPLOYMENTS if deployment["name"] == name)


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: deployment["name"])
def test_it_loads_and_takes_its_parameters(deployment: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    flow = load(deployment, monkeypatch)
    parameters = deployment.get("parameters", {})
    flow.validate_parameters({**{name: "quickstart" for name in flow.parameters.required if name not in parameters}, **parameters})
    given = [trigger.get("parameters", {}) for trigger in deployment.get("triggers", [])]
    assert set().union(parameters, *given) <= set(flow.parameters.properties)
    assert parameters.get("experiment") in [*Project(ROOT).experiment_names(), None]
    assert flow.name in FLOWS, "the automations know it"


def test_each_runs_on_its_pool_with_a_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {f"{load(each, monkeypatch).name}/{each['name']}": each["work_pool"]["name"] for each in DEPLOYMENTS} == NAMES
    assert {each["work_pool"]["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] for each in DEPLOYMENTS} == {"30"}


def test_the_nightly_run_has_its_schedule() -> None:
    assert CronSchedule(**named("nightly")["schedules"][0]).cron == "0 3 * * *"


def test_the_run_form_has_the_fields_of_an_experiment_and_refuses_a_bad_one(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = load(named("quickstart"), monkeypatch)
    schema = flow.parameters.model_dump()
    assert schema["required"] == ["experiment"]
    assert "overrides.yaml" in schema["properties"]["overrides"]["description"]
    rate = schema["definitions"]["TrainingChanges"]["properties"]["learning_rate"]
    assert rate["exclusiveMinimum"] == 0
    assert rate["description"]
    with pytest.raises(Exception, match="greater than 0"):
        flow.validate_parameters({"experiment": "quickstart", "overrides": {"training": {"learning_rate": -1}}})


def test_a_worker_goes_into_its_own_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(PROJECT, raising=False)
    assert enter() == {"directory": str(ROOT)}
    assert Path.cwd() == ROOT
    monkeypatch.setenv(PROJECT, str(tmp_path))
    with pytest.raises(UserError, match=r"no params\.yaml"):
        enter()
    for name in ("params.yaml", "dvc.yaml"):
        (tmp_path / name).touch()
    assert enter() == {"directory": str(tmp_path.resolve())}
