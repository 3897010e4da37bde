"""`gpt2 deploy` against a real Prefect server that wants a password, and the alerts that it sets up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.blocks.notifications import SlackWebhook
from prefect.blocks.system import Secret
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.flows import Flow
from prefect.states import Crashed, Running

from flows.automations import DEAD, FAILED, NEW_CHAMPION, ROT, tell_champion, tell_rotten
from flows.deploy import deploy
from model.errors import EXIT_FAULT, EXIT_USER, UserError
from tasks.news import standing
from tasks.project import Project
from tasks.recheck import Rotten
from tests.end_to_end.conftest import until
from tests.flows.prefect_server import PrefectServer, Webhook
from tests.tasks.conftest import NAME, make_project
from tests.tasks.test_news import write

SCRIPT = Path(__file__).with_name("tiny_flow.py")
PREFECT_YAML = """\
name: a project
deployments:
  - name: gpu
    entrypoint: tiny_flow.py:tiny
    parameters: {mode: done}
    work_pool: {name: gpu}
"""
OF_A_TEAM = {
    "job_configuration": {"command": "nice {{ command }}"},
    "variables": {"type": "object", "properties": {"command": {"type": "string"}}},
}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = make_project(tmp_path / "a project")
    (project.root / "prefect.yaml").write_text(PREFECT_YAML)
    shutil.copy(SCRIPT, project.root)
    return project


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    webhook = Webhook()
    yield webhook
    webhook.close()


def with_path(server: PrefectServer) -> dict[str, str]:
    return server.environment | {"PYTHONPATH": os.pathsep.join(sys.path)}


def gpt2(project: Project, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from flows.cli import main; main()", "deploy", *arguments]
    return subprocess.run(command, cwd=project.root, env=environment, capture_output=True, text=True)


def automations(server: PrefectServer) -> dict[str, dict[str, Any]]:
    """By name; a trigger that was written anew has another id."""
    return {automation["name"]: automation for automation in server.ask("automations/filter", {})}


@pytest.mark.slow
def test_a_server_gets_all_of_it_once_and_keeps_what_is_its_own(
    server: PrefectServer, client: SyncPrefectClient, project: Project, webhook: Webhook
) -> None:
    client.create_work_pool(WorkPoolCreate(name="cpu", type="process", base_job_template=OF_A_TEAM, concurrency_limit=7))
    secret = f"{webhook.url}/services/T0123/secret-of-the-url"
    done = gpt2(project, with_path(server), "--alert-webhook", secret)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    assert "alerts" in done.stdout
    assert "secret-of-the-url" not in done.stdout
    cpu, gpu = client.read_work_pool("cpu"), client.read_work_pool("gpu")
    assert (cpu.base_job_template, cpu.concurrency_limit) == (OF_A_TEAM, 7)
    assert gpu.type == "process"
    assert "working_dir" in gpu.base_job_template["variables"]["properties"], "its workers need no template of their own"
    assert client.read_deployment_by_name("stream-and-train/gpu").work_pool_name == "gpu"
    made = automations(server)
    assert set(made) == {DEAD, FAILED, NEW_CHAMPION, ROT}
    assert "secret-of-the-url" not in str(server.ask("block_documents/filter", {})), "nobody reads it there"

    client.pause_automation(made[FAILED]["id"])
    deploy(project, with_path(server), webhook=f"{webhook.url}/another")
    again = automations(server)
    assert {name: again[name] for name in (DEAD, NEW_CHAMPION, ROT)} == {name: made[name] for name in (DEAD, NEW_CHAMPION, ROT)}, (
        "not touched"
    )
    assert (again[FAILED]["enabled"], again[FAILED]["trigger"]) == (False, made[FAILED]["trigger"])
    deploy(project, with_path(server))
    assert set(automations(server)) == set(made), "who does not ask for alerts does not end them"


@pytest.mark.slow
def test_alerts_tell_what_happened_and_what_to_do(
    server: PrefectServer, client: SyncPrefectClient, project: Project, webhook: Webhook
) -> None:
    deploy(project, with_path(server), webhook=f"{webhook.url}/hook")
    quiet = {"env": with_path(server), "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for run in [subprocess.Popen([sys.executable, str(SCRIPT), mode], **quiet) for mode in ("fail", "done")]:  # type: ignore[call-overload]
        run.wait()

    def nothing() -> None: ...

    ours, others = (client.create_flow_run(Flow(nothing, name=name), name="a run", state=Running()) for name in ("train-gpt2", "others"))
    for run in (others, ours):
        client.set_flow_run_state(run.id, Crashed(message="the machine is gone"))
    nobody = standing(project, NAME)
    write(project, [10], [(10, "a")], {"name": "step 10", "digest": "digest 10", "version": "1"})
    assert tell_champion(project, NAME, nobody).champion_moved
    first = standing(project, NAME)
    write(project, [10, 20], [(10, "a"), (20, "b")], {"name": "step 20", "digest": "digest 20", "version": "2"})
    tell_champion(project, NAME, first)
    tell_champion(project, NAME, standing(project, NAME))  # nothing moved
    tell_rotten(NAME, Rotten("step 10", "digest 10", "the run folder", "model.safetensors: its bytes differ", "dvc checkout"))
    until(lambda: len(webhook.received) >= 5, 30, "five alerts")
    assert webhook.paths == ["/hook"] * 5
    failed, crashed, *of_checkpoints = sorted(
        webhook.texts(), key=lambda text: (not text.startswith("stream-and-train"), not text.startswith("train-gpt2"), text)
    )
    assert failed.partition(" ")[0] == "stream-and-train"
    assert ": Failed\n" in failed
    assert "it broke on purpose" in failed
    assert failed.splitlines()[-1].startswith(server.api.removesuffix("api")), "a link to the run's page"
    assert crashed.startswith("train-gpt2 a run: Crashed\nthe machine is gone\n")
    assert set(of_checkpoints) == {
        "tiny: step 10 is champion\nreason 10\nbefore: none",
        "tiny: step 20 is champion\nreason 20\nbefore: step 10",
        "tiny: step 10 is rotten in the run folder\nmodel.safetensors: its bytes differ\ndvc checkout",
    }


@pytest.mark.slow
def test_a_block_of_the_server_is_told(server: PrefectServer, client: SyncPrefectClient, project: Project) -> None:
    block = SlackWebhook(url="https://hooks.slack.com/services/T0/B0/x").save("on-call")  # type: ignore[arg-type]
    deploy(project, with_path(server), block="slack-webhook/on-call")
    assert [automation.actions[0].block_document_id for automation in client.read_automations_by_name(ROT)] == [block]  # type: ignore[union-attr]
    Secret(value="x").save("not-a-notification")
    for wrong, why in (("custom-webhook/nobody", "there is no"), ("nothing", "TYPE/NAME"), ("secret/not-a-notification", "cannot notify")):
        with pytest.raises(UserError, match=why):
            deploy(project, with_path(server), block=wrong)


@pytest.mark.slow
def test_a_wrong_password_is_one_line(server: PrefectServer, project: Project) -> None:
    done = gpt2(project, with_path(server) | {"PREFECT_API_AUTH_STRING": "admin:another password"})
    assert done.returncode == EXIT_USER
    assert done.stderr.count("\n") == 1
    assert "PREFECT_API_AUTH_STRING" in done.stderr
    assert "another password" not in done.stderr


@pytest.mark.slow
def test_what_a_user_may_get_wrong_is_one_line(project: Project, tmp_path: Path) -> None:
    unset = ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "PREFECT_PROFILE", "GPT2_ALERT_WEBHOOK")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment |= {"PREFECT_HOME": str(tmp_path / "prefect"), "PYTHONPATH": os.pathsep.join(sys.path)}
    none = gpt2(project, environment)
    assert (none.returncode, none.stderr.count("\n")) == (EXIT_USER, 1)
    assert "PREFECT_API_URL" in none.stderr
    silent = gpt2(project, environment | {"PREFECT_API_URL": "http://user:password@127.0.0.1:9/api"})
    assert (silent.returncode, silent.stderr.count("\n")) == (EXIT_FAULT, 1)
    assert "PREFECT_API_URL" in silent.stderr
    assert "password" not in silent.stderr
    both = gpt2(project, environment, "--alert-webhook", "https://example.org/secret", "--alert-block", "slack-webhook/us")
    assert (both.returncode, both.stderr.count("\n")) == (EXIT_USER, 1)
    assert "/secret" not in both.stderr
    (project.root / "prefect.yaml").unlink()
    assert "prefect.yaml" in gpt2(project, environment).stderr
