"""A team's setup, small: a Prefect server, a worker of each pool, each in a clone of its own, one storage for all. What people do in the UI
is obeyed, and what dies comes back by itself."""

from __future__ import annotations

import dataclasses
import shutil
import signal
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.settings import temporary_settings

from flows.automations import crash_the_dead, ensure
from flows.clone import PROJECT
from flows.deploy import deploy
from tasks.project import Project
from tests.end_to_end.conftest import DVC, GPT2, Clone, until, until_it_trains
from tests.flows.prefect_server import PrefectServer

pytestmark = pytest.mark.slow

DEADLINE = timedelta(seconds=60)
"""Instead of five minutes; heartbeats come every 30 s, and a server takes a while to start."""


class Team:
    """The server, the machines (clones with workers), and what Prefect says."""

    def __init__(self, here: Clone, home: Path) -> None:
        self.here = here
        self.server = PrefectServer(home / "server")
        self.server.start()
        self._worked_by: dict[int, list[psutil.Process]] = {}
        here.environment["PREFECT_API_URL"] = self.server.api
        deploy(Project(here.root), here.environment)
        with temporary_settings({"api.url": self.server.api}), get_client(sync_client=True) as client:
            ensure(client, crash_the_dead(DEADLINE))

    def another(self, name: str) -> Clone:
        """Another machine's clone, with nothing in it but what is committed and where the storage is."""
        root = self.here.root.parent / name
        subprocess.run(["git", "clone", "-q", self.here.root, root], check=True)
        for file in ("params.yaml", ".dvc/config.local"):
            if (self.here.root / file).exists():
                shutil.copy(self.here.root / file, root / file)
        return Clone(root, dict(self.here.environment))

    def worker(self, clone: Clone, pool: str) -> subprocess.Popen[str]:
        """A worker of a pool on a machine."""
        plain = dataclasses.replace(clone, environment=clone.environment | {PROJECT: str(clone.root)})
        plain.started = clone.started
        return plain.start(*GPT2, "worker", pool)

    def run(self, experiment: str) -> str:
        """Start `train-gpt2/<experiment>`; the id of the run."""
        deployment = self.server.ask(f"deployments/name/train-gpt2/{experiment}")["id"]
        return str(self.server.ask(f"deployments/{deployment}/create_flow_run", {})["id"])

    def runs(self, experiment: str, flow: str = "stream-and-train") -> list[dict[str, Any]]:
        """The runs of a flow for an experiment, the newest last."""
        found = self.server.ask("flow_runs/filter", {"flows": {"name": {"any_": [flow]}}, "sort": "EXPECTED_START_TIME_ASC"})
        return [run for run in found if run["parameters"].get("experiment") == experiment]

    def set_state(self, flow_run_id: str, kind: str, name: str, **details: Any) -> None:
        """As Prefect's UI does it."""
        body = {"state": {"type": kind, "name": name, "state_details": details}, "force": kind == "PAUSED"}
        assert self.server.ask(f"flow_runs/{flow_run_id}/set_state", body)["status"] == "ACCEPT"

    def pause(self, flow_run_id: str) -> None:
        timeout = (datetime.now(UTC) + timedelta(minutes=5)).isoformat()
        self.set_state(flow_run_id, "PAUSED", "Suspended", pause_timeout=timeout, pause_reschedule=True)


def until_stopped(clone: Clone, experiment: str, what: str) -> None:
    until(lambda: clone.journal(experiment)[-1]["event"] == "stopped" and not clone.trainers(), 45, what)


def kill_all(process: subprocess.Popen[str]) -> None:
    """The end of a machine: the worker and all that it started, at once."""
    for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        each.send_signal(signal.SIGSTOP)  # or one would have time to see the other's end
    for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        each.kill()
    process.wait()


@pytest.fixture(scope="module")
def team(clone: Clone, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    home = tmp_path_factory.mktemp("team")
    (home / "storage").mkdir()
    params = yaml.safe_load((clone.root / "params.yaml").read_text())
    params["defaults"]["storage"] = {"base_folder": str(home / "storage")}
    params["experiments"]["samples2m"]["checkpoint"] = {"save_every_n_iterations": 300}
    params["experiments"]["quickstart"] = {"training": {"max_steps": 60, "eval_freq": 60}, "checkpoint": {"save_every_n_iterations": 30}}
    (clone.root / "params.yaml").write_text(yaml.safe_dump(params))
    team = Team(clone, home)
    yield team
    team.server.stop()


@pytest.fixture(scope="module")
def machines(team: Team) -> Iterator[dict[str, Any]]:
    """`desk` with a worker of the pool cpu, `first` with one of the pool gpu."""
    first = team.another("first")
    found = {"first": first, "gpu": team.worker(first, "gpu"), "cpu": team.worker(team.here, "cpu"), "others": []}
    yield found
    for name in ("cpu", "gpu"):
        if found[name].poll() is None:
            found[name].send_signal(signal.SIGINT)
    for name in ("cpu", "gpu"):
        found[name].wait(60)
    assert [left for each in [first, *found["others"]] for left in each.end()] == []


def test_one_machine_trains_another_registers_and_evaluates(team: Team, machines: dict[str, Any]) -> None:
    run = team.run("quickstart")
    until(lambda: team.server.state(run) in ("Completed", "Failed", "Crashed", "Cancelled"), 180, "the run ends")
    assert team.server.state(run) == "Completed"
    (training,) = team.runs("quickstart")
    assert training["state"]["name"] == "Completed"
    assert training["work_pool_name"] == "gpu"
    assert training["name"] == "quickstart 0 to 60"
    rows = team.here.checkpoints("quickstart")
    assert [row["step"] for row in rows] == [30, 60]
    assert all(row["whole"] and row["version"] and row["questions"] for row in rows)
    assert [row["digest"] for row in rows] == [row["digest"] for row in machines["first"].checkpoints("quickstart")]
    assert "up to date" in team.here.run(*DVC, "status").stdout


def test_scores_grow_while_training_goes_on_and_a_pause_in_the_ui_stops_it_resumably(team: Team, machines: dict[str, Any]) -> None:
    first: Clone = machines["first"]
    run = team.run("samples2m")
    until_it_trains(first, "samples2m")
    until(lambda: any(row["questions"] for row in team.here.checkpoints("samples2m")), 120, "a checkpoint is scored meanwhile")
    assert first.trainers(), "and training went on"
    team.pause(run)
    until_stopped(first, "samples2m", "the pause reaches the trainer")
    until(lambda: team.runs("samples2m")[-1]["state"]["name"] == "Cancelled", 30, "its own flow run ends")
    assert team.server.state(run) == "Suspended"
    stopped_at = first.journal("samples2m")[-1]["step"]
    assert team.server.ask(f"flow_runs/{run}/resume", {})["status"] == "ACCEPT"
    until_it_trains(first, "samples2m")
    started = [event for event in first.journal("samples2m") if event["event"] == "started"][-1]
    assert started["step"] == stopped_at
    team.pause(team.runs("samples2m")[-1]["id"])
    until_stopped(first, "samples2m", "a pause of the training itself reaches the trainer")
    until(lambda: team.runs("samples2m")[-1]["state"]["name"] == "Cancelled", 40, "that cannot be resumed")
    until(lambda: team.server.state(run) == "Cancelled", 40, "and the flow that waits for it ends")


def test_the_flow_dies_or_the_server_goes_for_a_while_and_training_does_not_notice(team: Team, machines: dict[str, Any]) -> None:
    first: Clone = machines["first"]
    run = team.run("samples2m")
    until_it_trains(first, "samples2m")
    (trainer, *_) = first.trainers()
    for process in psutil.Process(machines["cpu"].pid).children(recursive=True):
        if "prefect.engine" in process.cmdline():
            process.kill()
    until(lambda: team.server.state(run) == "Crashed", 30, "its worker tells of it")
    until(lambda: len(team.runs("samples2m", "train-gpt2")) == 3, 120, "it is begun again")
    again = team.runs("samples2m", "train-gpt2")[-1]
    assert again["tags"] == [f"resumes:{run}"]
    until(lambda: team.server.state(again["id"]) == "Running", 90, "it runs")

    team.server.stop()
    before = len(first.journal("samples2m"))
    until(lambda: len(first.journal("samples2m")) > before + 20, 60, "steps without a server")
    team.server.start()
    until_it_trains(first, "samples2m")
    assert trainer.is_running(), "the same trainer as ever: the new flow waits for it"
    assert [each["state"]["name"] for each in team.runs("samples2m")][-1] == "Running"
    assert team.server.state(again["id"]) == "Running"


def test_a_machine_that_dies_is_replaced_by_another_that_goes_on_from_the_storage(team: Team, machines: dict[str, Any]) -> None:
    first: Clone = machines["first"]
    lost = team.runs("samples2m")[-1]
    reached = max(event["step"] for event in first.journal("samples2m") if event["event"] == "checkpoint")
    kill_all(machines["gpu"])
    for trainer in first.trainers():  # in groups of their own
        trainer.kill()
    first.end()
    second = team.another("second")
    machines["others"].append(second)
    machines["gpu"] = team.worker(second, "gpu")
    until(lambda: team.server.state(lost["id"]) == "Crashed", 120, "the training is found dead")
    until_it_trains(second, "samples2m")
    started = [event for event in second.journal("samples2m") if event["event"] == "started"][-1]
    assert started["step"] >= reached > 0, "no further back than the last checkpoint"
    again = team.runs("samples2m", "train-gpt2")[-1]
    assert team.server.state(again["id"]) == "Running", "the flow that waits for it is the same"
    team.set_state(again["id"], "CANCELLING", "Cancelling")
    until_stopped(second, "samples2m", "it stops")
    until(lambda: team.server.state(again["id"]) == "Cancelled", 40, "the flow is cancelled")
