"""The champion as MLflow serves it: a real process on loopback, from files that hold no pickle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from model.generation import answer
from model.huggingface import load_model
from tasks import checkpoint_register, served_model, tracking
from tasks.project import Project, read_json
from tests.tasks.conftest import NAME, free_port, wait_until_it_answers, write_checkpoint

ROOT = Path(__file__).parents[2]
PROMPTS = ["Q: What is 12 + 30?", "Q: Which is larger, 3 or 5?", "naïve 日本"]


@pytest.fixture
def champion(project: Project) -> Path:
    """Two registered checkpoints, the first of them the champion; its folder."""
    first, _ = write_checkpoint(project, 10), write_checkpoint(project, 20)
    checkpoint_register.checkpoint_register(project, NAME)
    client = tracking.connect(project, project.experiment(NAME))
    client.set_registered_model_alias(NAME, "champion", "1")
    return first.path


def test_the_models_files_say_all_and_hold_no_pickle(champion: Path, project: Project) -> None:
    client = tracking.connect(project, project.experiment(NAME))
    entry = read_json(project.run_folder(NAME).registered)[0]
    tracking.materialise(client, entry["model_id"], champion)
    (folder,) = [path.parent for path in (project.root / "storage").rglob("MLmodel") if entry["model_id"] in str(path)]
    for path in (path for path in folder.rglob("*") if path.is_file()):
        assert path.suffix in {"", ".py", ".txt", ".yaml", ".json", ".safetensors"}, path
        start = path.read_bytes()[:4]
        assert start[:1] != b"\x80", f"{path} is a pickle"
        assert start != b"PK\x03\x04", f"{path} is a zip, such as torch.save writes"
    description = yaml.safe_load((folder / "MLmodel").read_text())
    assert json.loads(description["signature"]["inputs"])[0]["type"] == "string"
    parameters = {field["name"]: field["default"] for field in json.loads(description["signature"]["params"])}
    assert parameters == served_model.PARAMETERS
    assert description["saved_input_example_info"]
    assert "python_model" not in description["flavors"]["python_function"], "models from code have no pickled one"
    assert all("==" in line for line in (folder / "requirements.txt").read_text().split())


@pytest.mark.slow
def test_mlflow_serves_the_champion_on_loopback(champion: Path, project: Project, tmp_path: Path) -> None:
    port = free_port()
    where = ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": tracking.tracking_uri(project, project.experiment(NAME)),
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # MLflow calls uvicorn by its name
    }
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/{NAME}@champion", *where],
            env=environment,
            cwd=tmp_path,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    network = load_model(champion)
    try:
        wait_until_it_answers(f"http://127.0.0.1:{port}/ping", process)
        assert ask(port, {"inputs": PROMPTS}) == (200, answer(network, PROMPTS, 128))
        table = {"dataframe_split": {"columns": ["prompt"], "data": [[prompt] for prompt in PROMPTS]}}
        sampling = {"max_new_tokens": 4, "temperature": 1.0, "top_k": 50, "top_p": 0.9, "seed": 7}
        assert ask(port, {**table, "params": sampling}) == (200, answer(network, PROMPTS, **sampling))
        assert ask(port, {"inputs": PROMPTS * 30, "params": {"max_new_tokens": 2}}) == (200, answer(network, PROMPTS, 2) * 30)
        for wrong in ({"temperature": -1.0}, {"max_new_tokens": 0}, {"top_p": 2.0}, {"seed": "x"}):
            assert ask(port, {"inputs": PROMPTS, "params": wrong})[0] == 400, wrong
        assert ask(port, {"inputs": PROMPTS, "params": {"max_new_tokens": 2}})[0] == 200, "it goes on"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def ask(port: int, body: dict[str, Any]) -> tuple[int, Any]:
    """The status, and the answers if there are any."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.load(reply)["predictions"]
    except urllib.error.HTTPError as error:
        return error.code, None
