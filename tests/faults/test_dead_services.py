"""Services that are closed, slow, silent, or wrong: training ends the same, and what they missed arrives once, when they are back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tasks import forwarder as forwarding
from tasks import tracking
from tasks.forwarder import follow, open_forwarder, tracking_lock
from tasks.project import Project
from tasks.versioning import STAGES
from tests.end_to_end.conftest import DVC, GPT2, PYTHON, Clone, clone, contents, until, until_it_trains
from tests.faults.misbehaving import MODES, Misbehaving
from tests.flows.prefect_server import PrefectServer
from tests.tasks.conftest import NAME, Server, make_project, write_config
from tests.tasks.test_forwarder import Training, points, told, wait_for

__all__ = ["clone"]  # the fixture

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real MLflow server."""
    server = Server(tmp_path_factory.mktemp("mlflow") / "server")
    server.start()
    yield server
    server.stop()


@pytest.fixture
def toy(mlflow: Server) -> Iterator[Misbehaving]:
    toy = Misbehaving(mlflow.uri)
    yield toy
    toy.close()


@pytest.fixture
def project(tmp_path: Path, mlflow: Server, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project whose run is its own in the MLflow that all tests share."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow.uri)
    project = make_project(tmp_path / "a project")
    write_config(project, learning_rate=1e-4 + 1e-7 * (hash(request.node.nodeid) % 10_000))
    return project


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `python -m tasks.forwarder` sets it, only with less patience."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    monkeypatch.setattr(forwarding, "POLL_S", 0.05)
    monkeypatch.setattr(forwarding, "LONGEST_PAUSE_S", 0.2)


class Following:
    """The forwarder of a training, through the toy server."""

    def __init__(self, project: Project, toy: Misbehaving) -> None:
        self.said: list[str] = []
        self.sent_all: bool | None = None
        self.parent_gone = threading.Event()
        experiment, lock = project.experiment(NAME), tracking_lock(project, NAME)

        def connect_through_toy(*arguments: Any) -> Any:
            from mlflow import MlflowClient

            return MlflowClient(toy.uri, toy.uri)

        def opened() -> Any:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(forwarding, "connect", connect_through_toy)
                return open_forwarder(project, NAME, lock, self.said.append)

        def run() -> None:
            self.sent_all = follow(opened, self.parent_gone, self.said.append)
            lock.release(force=True)

        assert experiment
        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def end(self, seconds: float = 180) -> None:
        self.thread.join(seconds)
        assert not self.thread.is_alive(), self.said


def runs(project: Project) -> list[Any]:
    client = tracking.connect(project, project.experiment(NAME))
    config = tracking.read_config(project.run_folder(NAME))
    experiment = client.get_experiment_by_name(NAME)
    return list(client.search_runs([experiment.experiment_id], f"tags.config_digest = '{config.digest}'"))


def test_everything_arrives_once_whatever_mlflow_does(project: Project, toy: Misbehaving) -> None:
    """Every way to misbehave, one after the other: while the run is being made in MLflow, then while its points are sent."""
    training = Training(project)
    training.start()
    training.steps(1, 10)
    toy.mode = MODES[0]
    following = Following(project, toy)
    for mode in MODES:
        toy.mode = mode
        suffer(toy, following)
    toy.mode = "answers"
    wait_for(lambda: len(points(project)) == 10, 180)

    first = 11
    for mode in MODES:
        toy.mode = mode
        training.steps(first, first + 300)
        training.journal.append("warning", step=first, kind=mode, message="it\nhappened")
        training.journal.append("sample", step=first, prompt="Q: 1 + 1?", text=f" A: {mode}")
        suffer(toy, following)
        first += 301
    toy.mode = "answers"
    training.end("finished", first)
    following.end()
    assert following.sent_all, following.said

    (run,) = runs(project)
    assert points(project) == told(project)
    assert points(project, "train/tokens") == told(project, "tokens")
    assert run.info.status == "FINISHED"
    assert "last_refused" not in run.data.tags, "an outage is no reason to pass anything over"
    assert run.data.tags["warnings"] == str(len(MODES))
    client = tracking.connect(project, project.experiment(NAME))
    folder = Path(client.download_artifacts(run.info.run_id, "", str(project.root)))
    lines = (folder / "warnings.txt").read_text().splitlines()
    assert [line.rpartition("  ")[2] for line in lines] == [f"{mode}: it happened" for mode in MODES]
    samples = [path.read_text() for path in sorted((folder / "samples").iterdir())]
    assert samples == [f"Q: 1 + 1? A: {mode}" for mode in MODES]
    assert len(following.said) <= 6 * len(MODES), "not a line for every attempt"


def suffer(toy: Misbehaving, following: Following) -> None:
    """Wait until the forwarder has met the toy server's mode some times."""
    met, said = toy.hits[toy.mode], len(following.said)
    if toy.mode == "closed":
        wait_for(lambda: len(following.said) > said)
    else:
        wait_for(lambda: toy.hits[toy.mode] >= met + 2 or not following.thread.is_alive(), 180)


# --- whole trainings ---


@pytest.fixture(scope="module")
def trainings(clone: Clone) -> Clone:
    """The clone with as many equal experiments as are disturbed here: undisturbed, they end with the same weights."""
    params = yaml.safe_load((clone.root / "params.yaml").read_text())
    names = ("undisturbed", "killed", "silent", "restarted", "alone")
    params["experiments"] = {name: {} for name in names}
    (clone.root / "params.yaml").write_text(yaml.safe_dump(params))
    return clone


def stage(clone: Clone, name: str, mlflow: str) -> tuple[Any, float]:
    """Start a training without DVC and Prefect; the process, and when."""
    environment = clone.environment | {"MLFLOW_TRACKING_URI": mlflow}
    subprocess.run([PYTHON, "-m", "tasks.build_config", name], cwd=clone.root, env=environment, check=True, capture_output=True)
    clone.environment, before = environment, clone.environment
    try:
        return clone.start(PYTHON, "-m", "tasks.stream_and_train", name), time.monotonic()
    finally:
        clone.environment = before


def weights(clone: Clone, name: str) -> str:
    last = clone.journal(name)[-1]
    assert last["event"] == "finished"
    return str(last["model_sha256"])


def steps_told(clone: Clone, name: str) -> list[tuple[int, float, int]]:
    return [(e["step"], e["loss"], round(e["time"] * 1000)) for e in clone.journal(name) if e["event"] == "step"]


def steps_there(clone: Clone, name: str, uri: str) -> list[tuple[int, float, int]]:
    from mlflow import MlflowClient

    client = MlflowClient(uri, uri)
    (run,) = client.search_runs([client.get_experiment_by_name(name).experiment_id])
    return sorted((p.step, p.value, p.timestamp) for p in client.get_metric_history(run.info.run_id, "train/loss"))


def test_a_training_ends_the_same_whatever_becomes_of_mlflow(trainings: Clone, mlflow: Server, toy: Misbehaving) -> None:
    toy.mode = "black hole"
    silent, _ = stage(trainings, "silent", toy.uri)
    undisturbed, _ = stage(trainings, "undisturbed", mlflow.uri)
    assert undisturbed.wait(120) == 0, trainings.said_by(undisturbed)
    assert steps_there(trainings, "undisturbed", mlflow.uri) == steps_told(trainings, "undisturbed")

    killed, _ = stage(trainings, "killed", mlflow.uri)
    until(lambda: len(steps_told(trainings, "killed")) > 20, what="killed trains")
    assert mlflow.process is not None
    os.killpg(mlflow.process.pid, signal.SIGKILL)
    mlflow.process.wait()
    assert killed.wait(120) == 0, trainings.said_by(killed)

    assert silent.wait(120) == 0, trainings.said_by(silent)
    ended = trainings.journal("silent")[-1]["time"]
    assert "they are sent at the next run" in trainings.said_by(silent)
    assert time.time() - ended < 120
    assert weights(trainings, "silent") == weights(trainings, "killed") == weights(trainings, "undisturbed")

    mlflow.start()
    toy.mode = "answers"
    for name, uri in (("killed", mlflow.uri), ("silent", toy.uri)):
        trainings.environment["MLFLOW_TRACKING_URI"] = uri
        sent = trainings.run(PYTHON, "-m", "tasks.forwarder", name, "--json").stdout.splitlines()
        assert json.loads(sent[-1])["sent"] > 0
        assert steps_there(trainings, name, mlflow.uri) == steps_told(trainings, name)
    trainings.environment["MLFLOW_TRACKING_URI"] = mlflow.uri


@pytest.fixture
def prefect(tmp_path: Path) -> Iterator[PrefectServer]:
    prefect = PrefectServer(tmp_path / "prefect")
    prefect.start()
    yield prefect
    prefect.stop()


def test_a_flow_ends_by_itself_whatever_becomes_of_prefect(trainings: Clone, mlflow: Server, prefect: PrefectServer) -> None:
    trainings.environment |= {"PREFECT_API_URL": prefect.api, "MLFLOW_TRACKING_URI": mlflow.uri}

    restarted = trainings.start(*GPT2, "train", "restarted")
    until_it_trains(trainings, "restarted")
    prefect.stop()
    time.sleep(1)
    prefect.start()
    assert restarted.wait(120) == 0, trainings.said_by(restarted)
    assert "★" in trainings.said_by(restarted)
    assert "Traceback" not in trainings.said_by(restarted)

    alone = trainings.start(*GPT2, "train", "alone")
    until_it_trains(trainings, "alone")
    prefect.stop()
    assert alone.wait(180) == 0, trainings.said_by(alone)
    said = trainings.said_by(alone)
    assert f"warning: Prefect at {prefect.api} is gone" in said.splitlines()[-1]
    assert all(noise not in said for noise in ("Traceback", "EventsWorker", "Error logging"))

    del trainings.environment["PREFECT_API_URL"]
    assert weights(trainings, "alone") == weights(trainings, "restarted")
    assert trainings.status("alone")["stages"] == dict.fromkeys(STAGES, "done")
    assert trainings.run(*DVC, "repro", "train@alone").stdout.count("didn't change, skipping") == 2


def test_a_storage_that_goes_gets_everything_when_it_is_back(trainings: Clone, mlflow: Server) -> None:
    """After the flows above: `alone` is finished and pushed."""
    trainings.environment["MLFLOW_TRACKING_URI"] = mlflow.uri
    storage = trainings.root / "storage"
    shutil.rmtree(storage)
    storage.write_text("not a folder")
    spoiled = trainings.run(*GPT2, "sync", "alone", check=False)
    assert spoiled.returncode == 1
    assert "MLflow: up to date" in spoiled.stdout
    assert [line.partition(": ")[2][:19] for line in spoiled.stderr.splitlines()] == ["storage.base_folder"]
    storage.unlink()

    push = trainings.start(*DVC, "push")
    while push.poll() is None and not any(path.is_file() for path in (storage / "dvc").rglob("*")):
        time.sleep(0.001)
    os.killpg(push.pid, signal.SIGKILL)
    assert push.wait() == -signal.SIGKILL
    synced = json.loads(trainings.run(*GPT2, "sync", "alone", "--json").stdout)
    assert [part["problem"] for part in synced] == [None, None]
    assert synced[1]["sent"] > 0

    other = trainings.root.parent / "another machine"
    shutil.copytree(trainings.root, other, ignore=shutil.ignore_patterns("runs", "cache", "tmp", "storage"))
    remote = ("remote", "modify", "--local", "storage", "url", str(storage / "dvc"))
    for command in (remote, ("pull", "train@alone", "evaluate@alone")):
        subprocess.run([*DVC, *command], cwd=other, env=trainings.environment, check=True, capture_output=True)
    for name in ("checkpoints", "evaluation"):
        assert contents(other / "runs/alone" / name) == contents(trainings.folder("alone").path / name)
    assert (other / "runs/alone/journal.jsonl").read_bytes() == trainings.folder("alone").journal.read_bytes()
