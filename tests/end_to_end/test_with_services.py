"""With `gpt2 services`: a deployed run completes, is skipped the second time, is cancelled, and a training outlives nobody."""

from __future__ import annotations

import json
import signal
import urllib.request

import psutil
import pytest

from model.errors import EXIT_FAULT, EXIT_USER
from tasks.versioning import STAGES
from tests.end_to_end.conftest import DVC, GPT2, PREFECT, Clone, Services, until, until_it_trains, until_left

pytestmark = pytest.mark.slow

TASKS = ("build-config", "stream-and-train", "checkpoint-register", "evaluate-each-checkpoint")
AT_THE_END = ("sync-tracking", "push-to-storage", "make-report")


def test_everything_is_deployed(services: Services) -> None:
    deployments = services.ask("deployments/filter", {})
    assert {deployment["name"] for deployment in deployments} == {"quickstart", "samples2m", "samples2m-muon", "nightly"}
    nightly = next(deployment for deployment in deployments if deployment["name"] == "nightly")
    assert [(schedule["schedule"]["cron"], schedule["active"]) for schedule in nightly["schedules"]] == [("0 3 * * *", True)]


def test_a_deployed_run_completes_and_dvc_has_nothing_left_to_do(clone: Clone, services: Services) -> None:
    watched = clone.run(*PREFECT, "deployment", "run", "train-gpt2/quickstart", "--watch")
    flow_run_id = watched.stdout.split("UUID:")[1].split()[0]
    assert services.state(flow_run_id) == "Completed"
    assert services.task_states(flow_run_id) == dict.fromkeys(TASKS + AT_THE_END, "Completed")
    artifacts = {artifact["key"]: artifact for artifact in services.ask("artifacts/filter", {})}
    assert "240/240" in artifacts["training-quickstart"]["description"]
    assert float(artifacts["training-quickstart"]["data"]) == 100
    assert "step_00000240" in artifacts["checkpoints-quickstart"]["data"]
    report = (clone.folder("quickstart").report / "report.html").read_text()
    assert "finished" in report
    link = artifacts["report-quickstart"]["data"].partition("](")[2].partition(")")[0]
    assert link.startswith(f"{services.mlflow}/#/experiments/")
    run_id = link.partition("/runs/")[2].partition("/")[0]
    with urllib.request.urlopen(f"{services.mlflow}/get-artifact?path=report/report.html&run_uuid={run_id}", timeout=30) as answer:
        assert answer.read().decode() == report

    assert "up to date" in clone.run(*DVC, "status").stdout
    repro = clone.run(*DVC, "repro")
    assert repro.stdout.count("didn't change, skipping") == len(STAGES)
    rows = clone.checkpoints("quickstart")
    assert [row["step"] for row in rows] == [120, 240]
    assert all(row["whole"] and row["version"] for row in rows)
    assert sum(row["champion"] for row in rows) == 1
    assert clone.status("quickstart")["state"] == "finished"
    with urllib.request.urlopen(
        f"{services.mlflow}/api/2.0/mlflow/registered-models/alias?name=quickstart&alias=champion", timeout=30
    ) as answer:
        champion = json.loads(answer.read())["model_version"]
    assert champion["version"] == next(row["version"] for row in rows if row["champion"])


def test_the_second_run_skips_every_stage(clone: Clone, services: Services) -> None:
    clone.run(*PREFECT, "deployment", "run", "train-gpt2/quickstart", "--watch")
    newest = services.ask(
        "flow_runs/filter", {"sort": "START_TIME_DESC", "limit": 1, "flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}
    )[0]
    assert services.task_states(newest["id"]) == dict.fromkeys(TASKS, "Cached") | dict.fromkeys(AT_THE_END, "Completed")


def test_the_nightly_run_evaluates_what_has_checkpoints(clone: Clone, services: Services) -> None:
    before = clone.folder("quickstart").scores.read_bytes()
    watched = clone.run(*PREFECT, "deployment", "run", "re-evaluate/nightly", "--watch")
    run = services.ask(f"flow_runs/{watched.stdout.split('UUID:')[1].split()[0]}")
    assert (run["state"]["name"], run["state"]["message"]) == ("Completed", "evaluated: quickstart")
    assert clone.folder("quickstart").scores.read_bytes() == before


def test_a_cancelled_run_is_cancelled_and_its_training_resumable(clone: Clone, services: Services) -> None:
    flow_run_id = services.flow_run("samples2m")
    until_it_trains(clone, "samples2m")
    clone.run(*PREFECT, "flow-run", "cancel", flow_run_id)
    until(lambda: services.state(flow_run_id) not in ("Running", "Cancelling"), 60, "the run ends")
    assert services.state(flow_run_id) == "Cancelled"
    assert clone.trainers() == []
    last = clone.journal("samples2m")[-1]
    assert last["event"] == "stopped"
    assert clone.checkpoints("samples2m")[-1]["name"] == last["checkpoint"]


def test_when_the_flow_is_killed_the_training_stops_and_the_next_run_goes_on(clone: Clone, services: Services) -> None:
    stopped_at = clone.journal("samples2m")[-1]["step"]
    services.flow_run("samples2m")
    until_it_trains(clone, "samples2m")
    started = [event for event in clone.journal("samples2m") if event["event"] == "started"][-1]
    assert started["step"] == stopped_at, "it went on from where it was cancelled"
    busy = clone.run(*GPT2, "evaluate", "samples2m", check=False)
    assert busy.returncode == EXIT_USER
    assert "another flow works on it" in busy.stderr
    flow = clone.dvc_of("samples2m").parent()
    assert flow is not None
    assert "prefect.engine" in flow.cmdline()
    flow.send_signal(signal.SIGKILL)
    until_left(clone)
    assert clone.journal("samples2m")[-1]["event"] == "stopped"


def test_when_the_worker_is_killed_the_training_stops_and_the_services_say_so(clone: Clone, services: Services) -> None:
    services.flow_run("samples2m")
    until_it_trains(clone, "samples2m")
    flow = clone.dvc_of("samples2m").parent()
    assert flow is not None
    services.worker().send_signal(signal.SIGKILL)
    until_left(clone)
    assert clone.journal("samples2m")[-1]["event"] == "stopped"
    psutil.wait_procs([flow], 60)
    assert not flow.is_running(), "the flow that nobody waits for ends"
    assert services.desk.wait(60) == EXIT_FAULT
    assert "worker ended" in clone.said_by(services.desk)
