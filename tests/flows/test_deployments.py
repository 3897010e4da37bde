"""`prefect deploy --all` says success even for a flow that cannot be imported: here each deployment's is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.schemas.schedules import CronSchedule
from prefect.flows import Flow, load_flow_from_entrypoint

from tasks.project import Project

ROOT = Path(__file__).parents[2]
DEPLOYMENTS: list[dict[str, Any]] = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]


def load(deployment: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Flow[Any, Any]:
    monkeypatch.chdir(ROOT)
    return load_flow_from_entrypoint(deployment["entrypoint"])


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: deployment["name"])
def test_it_loads_and_takes_its_parameters(deployment: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    flow = load(deployment, monkeypatch)
    parameters = deployment.get("parameters", {})
    flow.validate_parameters({**{name: None for name in flow.parameters.required if name not in parameters}, **parameters})
    assert set(parameters) <= set(flow.parameters.properties)
    assert deployment["work_pool"]["name"] == "gpu"
    assert parameters.get("experiment") in [*Project(ROOT).experiment_names(), None]


def test_the_names_that_people_type() -> None:
    names = {f"{deployment['entrypoint'].partition(':')[2].replace('_', '-')}/{deployment['name']}" for deployment in DEPLOYMENTS}
    assert names == {"train-gpt2/quickstart", "train-gpt2/samples2m", "train-gpt2/samples2m-muon", "re-evaluate/nightly"}


def test_the_nightly_run_has_its_schedule() -> None:
    schedule = next(deployment for deployment in DEPLOYMENTS if deployment["name"] == "nightly")["schedules"][0]
    assert CronSchedule(**schedule).cron == "0 3 * * *"


def test_the_run_form_has_typed_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    schema = load(DEPLOYMENTS[0], monkeypatch).parameters
    assert schema.required == ["experiment"]
    assert schema.properties["experiment"]["type"] == "string"
    assert "object" in str(schema.properties["overrides"])
    assert "overrides.yaml" in schema.properties["overrides"]["description"]
