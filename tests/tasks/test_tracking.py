from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from model.errors import UserError
from tasks import tracking
from tasks.project import Project
from tests.tasks.conftest import NAME, Server, write_config


def connected(project: Project):
    return tracking.connect(project, project.experiment(NAME))


def make_run(client, project: Project) -> str:
    return tracking.training_run(client, project, NAME, tracking.read_config(project.run_folder(NAME)))


def test_default_store_and_artifacts_lie_in_the_storage_folder(new_project: Project) -> None:
    project = new_project
    client = connected(project)
    run_id = make_run(client, project)
    client.log_text(run_id, "hello", "note.txt")
    storage = project.root / "storage" / "mlflow"
    assert (storage / "mlflow.db").is_file()
    assert [path.read_text() for path in (storage / "artifacts").rglob("note.txt")] == ["hello"]
    assert sorted(path.name for path in project.root.iterdir()) == ["dvc.yaml", "params.yaml", "runs", "storage"]


def test_any_folder_name_works(new_project: Project) -> None:
    project = new_project
    folder = "50%41 whät? #1"
    text = (project.root / "params.yaml").read_text()
    (project.root / "params.yaml").write_text(text.replace("defaults: {}", f"defaults: {{storage: {{base_folder: '{folder}'}}}}"))
    client = connected(project)
    client.log_text(make_run(client, project), "hello", "note.txt")
    assert (project.root / folder / "mlflow" / "mlflow.db").is_file()
    assert list((project.root / folder / "mlflow" / "artifacts").rglob("note.txt"))


def test_a_database_of_the_users_keeps_its_artifacts_in_the_storage(
    project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copy(project.root / "storage" / "mlflow" / "mlflow.db", tmp_path / "mine.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mine.db'}")
    client = connected(project)
    run_id = make_run(client, project)
    client.log_text(run_id, "hello", "note.txt")
    assert list((project.root / "storage" / "mlflow" / "artifacts").rglob("note.txt"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert connected(project).get_experiment_by_name(NAME) is None


def test_a_storage_that_cannot_be_written_is_the_users_mistake(new_project: Project) -> None:
    project = new_project
    (project.root / "storage").write_text("a file")
    with pytest.raises(UserError, match=r"storage\.base_folder"):
        connected(project)


def test_one_run_a_config_found_again_by_its_digest(project: Project) -> None:
    client = connected(project)
    first = make_run(client, project)
    assert make_run(client, project) == first
    config = write_config(project, learning_rate=1e-3)
    second = make_run(client, project)
    assert second != first
    run = client.get_run(second)
    assert run.data.params["training.learning_rate"] == "0.001"
    assert run.data.params["model.n_layer"] == "2"
    assert run.data.tags["config_digest"] == config.digest
    assert run.data.tags["dataset_digest"] == "d" * 64
    assert [entry.dataset.name for entry in run.inputs.dataset_inputs] == ["somewhere"]


def test_a_secret_in_the_datas_address_is_not_tracked(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """build-config refuses such an address; a config of an older version may hold one all the same."""
    monkeypatch.setenv("HF_TOKEN", "pl4nted-token")
    config = tracking.read_config(project.run_folder(NAME))
    path = "https://me:pl4nted@host/data?sig=pl4nted&v=pl4nted-token"
    client = connected(project)
    run_id = tracking.training_run(client, project, NAME, config.model_copy(update={"data": config.data.model_copy(update={"path": path})}))
    run = client.get_run(run_id)
    assert run.data.params["data.path"] == "https://***@host/data?sig=***&v=***"
    assert "pl4nted" not in str(run.to_dictionary())
    database = project.root / "storage" / "mlflow" / "mlflow.db"
    assert b"pl4nted" not in database.read_bytes()


def test_a_run_left_half_described_by_a_kill_is_completed(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    client = connected(project)
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "_describe", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make_run(client, project)
    run_id = make_run(client, project)
    assert client.get_run(run_id).data.params["seed"] == "42"
    assert len(client.search_runs([client.get_run(run_id).info.experiment_id])) == 1


def test_an_experiment_deleted_in_mlflow_is_named(project: Project) -> None:
    client = connected(project)
    run_id = make_run(client, project)
    client.delete_experiment(client.get_run(run_id).info.experiment_id)
    with pytest.raises(UserError, match="mlflow experiments restore"):
        make_run(client, project)


@pytest.mark.slow
def test_six_processes_may_open_a_new_store_at_once(new_project: Project) -> None:
    project = new_project
    code = (
        "from tasks import tracking; from tasks.project import find_project; p = find_project(); e = p.experiment('tiny');"
        "print(tracking.training_run(tracking.connect(p, e), p, 'tiny', tracking.read_config(p.run_folder('tiny'))))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], cwd=project.root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(6)
    ]
    outputs = [process.communicate(timeout=180) for process in processes]
    assert [process.returncode for process in processes] == [0] * 6, outputs
    assert len({out for out, _ in outputs}) == 1


def test_scores_are_logged_once_and_rank_the_models(project: Project) -> None:
    client = connected(project)
    run_id = make_run(client, project)
    experiment = client.get_run(run_id).info.experiment_id
    models = [client.create_logged_model(experiment, f"step_{step:08d}", run_id).model_id for step in (10, 20, 30)]
    for step, model, match in zip((10, 20, 30), models, (0.1, 0.5, 0.3), strict=True):
        for _ in range(2):
            tracking.log_scores(client, model, run_id, {"evaluation/exact_match": match}, step, "e" * 64)
    points = client.get_metric_history(run_id, "evaluation/exact_match")
    assert [(point.step, point.value) for point in sorted(points, key=lambda p: p.step)] == [(10, 0.1), (20, 0.5), (30, 0.3)]
    order = {"field_name": "metrics.evaluation/exact_match", "ascending": False, "dataset_name": "evaluation", "dataset_digest": "e" * 32}
    assert [model.model_id for model in client.search_logged_models([experiment], order_by=[order])] == [models[1], models[2], models[0]]
    tracking.log_scores(client, models[0], run_id, {"evaluation/exact_match": 0.9}, 10, "f" * 64)  # other questions
    assert len(client.get_metric_history(run_id, "evaluation/exact_match")) == 4


def test_a_table_can_be_read_back_and_is_replaced_not_appended_to(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    client = connected(project)
    run_id = make_run(client, project)
    rows = [{"prompt": "Q: 1 + 1?", "answer": "zwei ✓", "right": True}, {"prompt": "Q: 2 + 2?", "answer": "5", "right": False}]
    for _ in range(2):
        tracking.log_table(client, run_id, rows, "answers/step_00000010.json")
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", client.tracking_uri)
        table = client.load_table(client.get_run(run_id).info.experiment_id, "answers/step_00000010.json", [run_id])
    assert table.to_dict("records") == rows
    assert client.get_run(run_id).data.tags["mlflow.loggedArtifacts"].count("step_00000010") == 1


@pytest.mark.slow
def test_everything_works_against_a_server(new_project: Project, server: Server) -> None:
    project = new_project
    client = connected(project)
    run_id = make_run(client, project)
    assert make_run(client, project) == run_id
    experiment = client.get_run(run_id).info.experiment_id
    assert client.get_experiment(experiment).artifact_location.startswith("mlflow-artifacts:")
    model = client.create_logged_model(experiment, "step_00000010", run_id).model_id
    for _ in range(2):
        tracking.log_scores(client, model, run_id, {"evaluation/exact_match": 0.5}, 10, "e" * 64)
        tracking.log_table(client, run_id, [{"answer": "12"}], "answers/a.json")
    assert len(client.get_metric_history(run_id, "evaluation/exact_match")) == 1
    assert tracking.version_with(client, NAME, tracking.CHAMPION) is None
    assert not (project.root / "storage").exists()
