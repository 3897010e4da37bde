"""A small project with a run in it, and MLflow as it really is: a SQLite store in a temporary folder, or a server of its own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save

from model.checkpoint.store import MODEL, OPTIMIZER, STATE, Checkpoint, CheckpointStore
from model.gpt2 import GPT2
from model.huggingface import METADATA, to_hugging_face
from model.params import write_yaml
from model.run_config import RunConfig
from tasks import tracking
from tasks.project import Project

NAME = "tiny"


@pytest.fixture(autouse=True)
def no_server_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with its tables made, to be copied: making them takes MLflow seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        project = make_project(tmp_path_factory.mktemp("store"))
        tracking.connect(project, project.experiment(NAME))
    return project.root / "storage" / "mlflow" / "mlflow.db"


@pytest.fixture
def new_project(tmp_path: Path) -> Project:
    """A project with one experiment, `tiny`, of which build-config has run; it has no MLflow store yet."""
    return make_project(tmp_path / "a project")


@pytest.fixture
def project(new_project: Project, empty_store: Path) -> Project:
    """`new_project` with an empty MLflow store."""
    (new_project.root / "storage" / "mlflow").mkdir(parents=True)
    shutil.copy(empty_store, new_project.root / "storage" / "mlflow")
    return new_project


def make_project(root: Path) -> Project:
    data = {"path": "somewhere", "max_length": 16}
    params = {"defaults": {}, "experiments": {NAME: {"model": {"preset": "nano"}, "data": data}}}
    root.mkdir(exist_ok=True)
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    (root / "dvc.yaml").write_text("stages: {}\n")
    project = Project(root)
    write_config(project)
    return project


def write_config(project: Project, learning_rate: float = 3e-4) -> RunConfig:
    experiment = project.experiment(NAME)
    dataset = {"digest": "d" * 64, "revision": None, "files": 1, "samples": 100, "train_samples": 90, "tokens_per_sample": 20.0}
    fields = experiment.model_dump(include={"seed", "model", "data", "training", "checkpoint"})
    fields["training"]["learning_rate"] = learning_rate
    config = RunConfig.model_validate({**fields, "dataset": dataset, "total_steps": 100})
    folder = project.run_folder(NAME)
    folder.path.mkdir(parents=True, exist_ok=True)
    write_yaml(folder.config, config.model_dump(mode="json"))
    return config


def write_checkpoint(project: Project, step: int, **told: int) -> Checkpoint:
    """A sealed checkpoint of a nano GPT-2 with its own random weights; `told` is in its state, too."""
    config = tracking.read_config(project.run_folder(NAME))
    torch.manual_seed(step)
    network = GPT2(config.model)
    state = {"step": step, "config_digest": config.digest, "config": config.model_dump(mode="json"), **told}
    return CheckpointStore(project.run_folder(NAME).checkpoints).write(
        step,
        {
            MODEL: [save(to_hugging_face(dict(network.named_parameters())), metadata=METADATA)],
            OPTIMIZER: [save({"m": torch.zeros(1)})],
            STATE: [json.dumps(state).encode()],
        },
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_it_answers(url: str, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server left with {process.returncode}"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise AssertionError(f"{url} did not answer within {seconds} s")


class Server:
    """`mlflow server` on a free loopback port, which a test can end and start again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir()

    def start(self) -> None:
        options = [
            "--backend-store-uri",
            f"sqlite:///{self.folder / 'server.db'}",
            "--artifacts-destination",
            str(self.folder / "artifacts"),
        ]
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1", *options]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        wait_until_it_answers(f"{self.uri}/health", self.process)

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, 15)
            self.process.wait(30)
            self.process = None


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server(tmp_path / "server")
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    yield server
    server.stop()
