from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from model.checkpoint.store import MODEL, STATE, CheckpointStore, NotWhole
from model.errors import UserError
from model.generation import answer
from model.huggingface import load_model
from tasks import checkpoint_register, tracking
from tasks.project import Project, read_json
from tests.tasks.conftest import NAME, Server, write_checkpoint
from tests.tasks.test_forwarder import Training, forwarder

ROOT = Path(__file__).parents[2]
PROMPTS = ["Q: What is 12 + 30?", "Q: Which is larger, 3 or 5?"]


def register(project: Project) -> list[dict[str, Any]]:
    checkpoint_register.checkpoint_register(project, NAME)
    return read_json(project.run_folder(NAME).registered)


def connected(project: Project) -> Any:
    return tracking.connect(project, project.experiment(NAME))


def load(project: Project, uri: str, **options: Any) -> Any:
    import mlflow.pyfunc

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", tracking.tracking_uri(project, project.experiment(NAME)))
        return mlflow.pyfunc.load_model(uri, **options)


def logged_models(client: Any, entries: list[dict[str, Any]]) -> list[Any]:
    return client.search_logged_models([client.get_run(entries[0]["run_id"]).info.experiment_id])


def test_each_checkpoint_becomes_one_model_and_one_version_once(project: Project) -> None:
    checkpoints = [write_checkpoint(project, step) for step in (10, 20)]
    first = register(project)
    checkpoints.append(write_checkpoint(project, 30))
    entries = register(project)
    assert register(project) == entries
    assert entries[:2] == first
    assert [(e["name"], e["step"], e["digest"], e["version"]) for e in entries] == [
        (c.name, c.step, c.digest, str(version)) for version, c in enumerate(checkpoints, 1)
    ]
    client = connected(project)
    assert len(client.search_model_versions(f"name = '{NAME}'")) == 3
    models = {model.model_id: model for model in logged_models(client, entries)}
    assert sorted(models) == sorted(e["model_id"] for e in entries)
    assert {model.status for model in models.values()} == {"READY"}
    run = client.get_run(entries[0]["run_id"])
    assert {(output.model_id, output.step) for output in run.outputs.model_outputs} == {(e["model_id"], e["step"]) for e in entries}
    for entry in entries:
        assert models[entry["model_id"]].tags["checkpoint_digest"] == entry["digest"]
        assert client.get_model_version(NAME, entry["version"]).tags["checkpoint_digest"] == entry["digest"]


def test_what_is_registered_is_small_and_holds_no_pickle(project: Project) -> None:
    write_checkpoint(project, 10)
    register(project)
    files = [path for path in (project.root / "storage" / "mlflow" / "artifacts").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20_000
    assert not [path for path in files if path.suffix in (".pkl", ".pickle", ".pt", ".bin")]
    requirements = next(path for path in files if path.name == "requirements.txt").read_text().split()
    assert all("==" in line and "+" not in line for line in requirements)
    assert {"torch", "safetensors"} <= {line.partition("==")[0] for line in requirements}


def test_a_model_says_its_step_its_tokens_and_its_validation(project: Project) -> None:
    training = Training(project)
    training.start()
    for step, loss in ((10, 3.0), (20, 2.5), (30, 2.75)):
        training.steps(step, step)
        training.journal.append("validation", step=step, loss=loss, bits_per_byte=loss / 2, windows=8)
        write_checkpoint(project, step, tokens=16 * step)
    forwarder(project).send_new()
    entries = register(project)
    client = connected(project)
    models = {model.model_id: model for model in logged_models(client, entries)}
    for entry, loss in zip(entries, (3.0, 2.5, 2.75), strict=True):
        model = models[entry["model_id"]]
        assert model.params == {"step": str(entry["step"]), "tokens": str(16 * entry["step"])}
        figures = {metric.key: metric.value for metric in model.metrics}
        assert figures == {"validation/loss": loss, "validation/bits_per_byte": loss / 2}
        assert {(metric.step, metric.dataset_name, metric.dataset_digest) for metric in model.metrics} == {
            (entry["step"], "somewhere", "d" * 32)
        }
    assert len(client.get_metric_history(entries[0]["run_id"], "validation/loss")) == 3, "the forwarder's points, not once more"
    experiment = client.get_run(entries[0]["run_id"]).info.experiment_id
    ranked = client.search_logged_models([experiment], order_by=[{"field_name": "metrics.validation/loss", "ascending": True}])
    assert [model.params["step"] for model in ranked] == ["20", "30", "10"]


@pytest.mark.parametrize("killed_in", ["log_model_artifacts", "log_outputs", "finalize_logged_model", "create_model_version"])
def test_a_kill_anywhere_is_completed_by_the_next_run(project: Project, monkeypatch: pytest.MonkeyPatch, killed_in: str) -> None:
    from mlflow import MlflowClient

    def kill(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    write_checkpoint(project, 10)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, killed_in, kill)
        with pytest.raises(KeyboardInterrupt):
            register(project)
    assert not project.run_folder(NAME).registered.exists()
    entries = register(project)
    client = connected(project)
    assert [model.status for model in logged_models(client, entries)] == ["READY"]
    assert len(client.search_model_versions(f"name = '{NAME}'")) == 1
    assert len(client.get_run(entries[0]["run_id"]).outputs.model_outputs) == 1
    assert load(project, f"models:/{NAME}/1").predict(PROMPTS, params={"max_new_tokens": 2})


def test_nothing_to_register_is_the_users_mistake(project: Project) -> None:
    with pytest.raises(UserError, match="no whole checkpoint"):
        register(project)


def test_the_champion_answers_by_its_alias(project: Project) -> None:
    for step in (10, 20):
        write_checkpoint(project, step)
    entries = register(project)
    client = connected(project)
    assert tracking.version_with(client, NAME, tracking.CHAMPION) is None
    client.set_registered_model_alias(NAME, tracking.CHAMPION, entries[1]["version"])
    found = tracking.version_with(client, NAME, tracking.CHAMPION)
    assert found is not None
    assert (found.version, found.digest) == (entries[1]["version"], entries[1]["digest"])
    tracking.tag_version(client, NAME, entries[1]["version"], {"champion.reason": "the first"})
    assert client.get_model_version_by_alias(NAME, "champion").tags["champion.reason"] == "the first"
    network = load_model(project.run_folder(NAME).checkpoints / "step_00000020")
    model = load(project, f"models:/{NAME}@champion")
    assert model.predict(PROMPTS, params={"max_new_tokens": 8}) == answer(network, PROMPTS, 8)
    sampled = model.predict(PROMPTS, params={"max_new_tokens": 8, "temperature": 1.0, "seed": 3})
    assert sampled == answer(network, PROMPTS, 8, temperature=1.0, seed=3) != answer(network, PROMPTS, 8)


def test_the_champion_serves_without_the_run_folder_once_it_is_materialised(project: Project) -> None:
    checkpoint = write_checkpoint(project, 10)
    (entry,) = register(project)
    expected = answer(load_model(checkpoint.path), PROMPTS, 8)
    client = connected(project)
    for _ in range(2):
        tracking.materialise(client, entry["model_id"], checkpoint.path)
    shutil.rmtree(project.root / "runs")
    assert load(project, f"models:/{NAME}/1").predict(PROMPTS, params={"max_new_tokens": 8}) == expected


def test_other_or_damaged_weights_are_not_materialised(project: Project) -> None:
    right, wrong = write_checkpoint(project, 10), write_checkpoint(project, 20)
    entry = register(project)[0]
    client = connected(project)
    with pytest.raises(NotWhole, match="another checkpoint"):
        tracking.materialise(client, entry["model_id"], wrong.path)
    flip_a_bit(right.path / MODEL)
    with pytest.raises(NotWhole, match="SHA-256"):
        tracking.materialise(client, entry["model_id"], right.path)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_that_was_set_aside_is_found_by_its_digest(project: Project) -> None:
    checkpoint, other = write_checkpoint(project, 10), write_checkpoint(project, 20)
    register(project)
    expected = answer(load_model(checkpoint.path), PROMPTS, 8)
    folder = project.run_folder(NAME)
    CheckpointStore.set_aside([checkpoint.path], folder.aside / "0123456789ab" / "checkpoints")
    shutil.copytree(other.path, checkpoint.path)  # now another one lies at its place
    assert load(project, f"models:/{NAME}/1").predict(PROMPTS, params={"max_new_tokens": 8}) == expected


def test_a_damaged_checkpoint_is_never_loaded(project: Project) -> None:
    from mlflow import MlflowException

    checkpoint = write_checkpoint(project, 10)
    register(project)
    flip_a_bit(checkpoint.path / MODEL)
    with pytest.raises((FileNotFoundError, MlflowException), match="SHA-256 differs"):
        load(project, f"models:/{NAME}/1")


def test_a_checkpoint_whose_state_is_damaged_is_refused_with_the_cure(project: Project) -> None:
    checkpoint = write_checkpoint(project, 10)
    flip_a_bit(checkpoint.path / STATE)
    with pytest.raises(UserError, match=r"step_00000010/state.json: its bytes are not .*; remove .*step_00000010, or bring it back"):
        register(project)


def test_another_place_can_be_named_when_loading(project: Project, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(project, 10)
    register(project)
    expected = answer(load_model(checkpoint.path), PROMPTS, 8)
    shutil.move(checkpoint.path, tmp_path / "elsewhere")
    model = load(project, f"models:/{NAME}/1", model_config={"path": str(tmp_path / "elsewhere")})
    assert model.predict(PROMPTS, params={"max_new_tokens": 8}) == expected


@pytest.mark.slow
def test_the_stage_registers_without_torch_and_says_what_it_did(project: Project) -> None:
    for step in range(1, 6):
        write_checkpoint(project, step)
    run = "import sys, runpy\ntry: runpy.run_module('tasks.checkpoint_register', run_name='__main__')\n"
    code = run + "finally: assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    stage = subprocess.run(
        [sys.executable, "-c", code, NAME], cwd=project.root, env=environment, capture_output=True, text=True, timeout=120
    )
    assert stage.returncode == 0, stage.stderr
    assert stage.stdout.splitlines()[-1] == "step_00000005  version 5  (new)"
    assert stage.stderr == ""


@pytest.mark.slow
def test_a_server_registers_materialises_and_loads_the_champion(project: Project, server: Server) -> None:
    """The whole way over HTTP: registered, crowned and uploaded, the run folder gone, and loaded from there."""
    checkpoint = write_checkpoint(project, 10)
    (entry,) = register(project)
    assert register(project) == [entry]
    client = connected(project)
    tracking.materialise(client, entry["model_id"], checkpoint.path)
    client.set_registered_model_alias(NAME, tracking.CHAMPION, entry["version"])
    champion = tracking.version_with(client, NAME, tracking.CHAMPION)
    assert champion is not None
    assert champion.tags[tracking.IDENTITY_TAG] == tracking.read_config(project.run_folder(NAME)).data_identity
    tracking.fetch_materialised(client, champion, project.root / "fetched")
    assert (project.root / "fetched" / MODEL).read_bytes() == (checkpoint.path / MODEL).read_bytes()
    expected = answer(load_model(checkpoint.path), PROMPTS, 8)
    shutil.rmtree(project.root / "runs")
    assert load(project, f"models:/{NAME}@champion").predict(PROMPTS, params={"max_new_tokens": 8}) == expected
