from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sqlalchemy

from model.errors import UserError
from model.run_config import RunConfig
from model.stream.manifest import DataFile, DatasetManifest
from tasks import tracking
from tasks.project import Project
from tests.tasks.conftest import NAME, Server, write_config

if TYPE_CHECKING:
    from mlflow import MlflowClient


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
    folder = "50%41 whät #1"
    text = (project.root / "params.yaml").read_text()
    (project.root / "params.yaml").write_text(text.replace("defaults: {}", f"defaults: {{storage: {{base_folder: '{folder}'}}}}"))
    client = connected(project)
    client.log_text(make_run(client, project), "hello", "note.txt")
    assert (project.root / folder / "mlflow" / "mlflow.db").is_file()
    assert list((project.root / folder / "mlflow" / "artifacts").rglob("note.txt"))


def test_a_folder_that_no_url_can_name_is_told_of(tmp_path: Path) -> None:
    folder = tmp_path / "what?"
    if sqlalchemy.__version__ < "2.1":
        with pytest.raises(UserError, match=r"storage\.base_folder"):
            tracking._sqlite_uri(folder)
    else:
        assert sqlalchemy.make_url(tracking._sqlite_uri(folder)).database == str(folder / "mlflow.db")


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
    assert run.info.run_name == f"tiny 0-100 (seed 42, {config.digest[:8]})"
    assert run.data.tags["data_identity"] == config.data_identity
    text = project.run_folder(NAME).config.read_bytes()
    assert run.data.tags["dvc.config_md5"] == hashlib.md5(text, usedforsecurity=False).hexdigest()


def test_the_data_are_an_input_with_their_columns(project: Project, tmp_path: Path) -> None:
    file = tmp_path / "part.parquet"
    pq.write_table(pa.table({"query": ["a"], "words": [1]}), file)
    manifest = DatasetManifest("somewhere", None, [DataFile(str(file), file.name, 2_000_000, None, 100, 100, 90, 1000)], 20.0)
    manifest.write(project.run_folder(NAME).dataset)
    client = connected(project)
    (entry,) = client.get_run(make_run(client, project)).inputs.dataset_inputs
    assert (entry.dataset.name, entry.dataset.digest) == ("somewhere", "d" * 32)
    assert (entry.dataset.source_type, json.loads(entry.dataset.source)) == ("local", {"uri": "somewhere"})
    assert json.loads(entry.dataset.profile) == {"samples": 100, "files": 1, "tokens_per_sample": 20.0, "megabytes": 2.0}
    columns = json.loads(entry.dataset.schema)["mlflow_colspec"]
    assert [(column["name"], column["type"]) for column in columns] == [("query", "string"), ("words", "long")]
    assert [(tag.key, tag.value) for tag in entry.tags] == [("mlflow.data.context", "training")]


@pytest.mark.parametrize(
    ("path", "revision", "kind", "link"),
    [
        ("PleIAs/SYNTH", "0" * 40, "hugging_face", {"path": "PleIAs/SYNTH", "revision": "0" * 40}),
        ("https://host/data", None, "http", {"url": "https://host/data"}),
        ("s3://bucket/data", None, "s3", {"uri": "s3://bucket/data"}),
    ],
)
def test_where_the_data_lie_is_told_in_mlflows_words(
    project: Project, path: str, revision: str | None, kind: str, link: dict[str, str]
) -> None:
    config = tracking.read_config(project.run_folder(NAME))
    data, dataset = config.data.model_copy(update={"path": path}), config.dataset.model_copy(update={"revision": revision})
    changed = config.model_copy(update={"data": data, "dataset": dataset})
    client = connected(project)
    (entry,) = client.get_run(tracking.training_run(client, project, NAME, changed)).inputs.dataset_inputs
    assert (entry.dataset.source_type, json.loads(entry.dataset.source)) == (kind, link)


def test_the_name_follows_the_config_until_somebody_gives_another(project: Project) -> None:
    client = connected(project)
    run_id = make_run(client, project)
    digest = tracking.read_config(project.run_folder(NAME)).digest[:8]
    client.update_run(run_id, name=f"tiny-{digest}")  # as runs were called before
    longer = tracking.read_config(project.run_folder(NAME)).model_copy(update={"total_steps": 300})
    assert tracking.training_run(client, project, NAME, longer) == run_id
    assert client.get_run(run_id).info.run_name == f"tiny 0-300 (seed 42, {digest})"
    client.update_run(run_id, name="tiny, the good one")
    make_run(client, project)
    assert client.get_run(run_id).info.run_name == "tiny, the good one"


def description(client: MlflowClient, run_id: str) -> str:
    return client.get_run(run_id).data.tags["mlflow.note.content"]


def test_the_description_links_what_a_person_wants(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    client, config = connected(project), tracking.read_config(project.run_folder(NAME))
    run_id = make_run(client, project)
    experiment = client.get_run(run_id).info.experiment_id
    text = description(client, run_id)
    assert f"(#/experiments/{experiment}/runs/{run_id}/artifacts/report/report.html" in text
    assert f"(#/experiments/{experiment}/models" in text
    assert "(#/models/tiny?" in text
    assert f"Storage: `{project.root / 'storage'}`" in text
    assert "100 steps of 8 windows of 16 tokens" in text
    assert all(command in text for command in ("gpt2 train tiny ", "gpt2 generate tiny ", f"gpt2 replay {run_id} "))
    assert "Prefect" not in text

    monkeypatch.setenv("GPT2_FLOW_RUN_URL", "http://me:pl4nted@host/runs/flow-run/1")
    tracking.training_run(client, project, NAME, config, begins=True)
    assert "[flow run in Prefect](http://***@host/runs/flow-run/1)" in description(client, run_id)
    monkeypatch.setenv("GPT2_FLOW_RUN_URL", "http://host/runs/flow-run/2")
    make_run(client, project)  # an evaluation, say: it is not what trained
    assert client.get_run(run_id).data.tags["prefect.flow_run"] == "http://***@host/runs/flow-run/1"
    tracking.training_run(client, project, NAME, config, begins=True)
    assert client.get_run(run_id).data.tags["prefect.flow_run"] == "http://host/runs/flow-run/2"
    assert "flow-run/2" in description(client, run_id)
    assert "flow-run/1" not in description(client, run_id)


def test_a_flow_run_is_linked_by_whoever_comes_first_after_an_outage(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    client = connected(project)
    run_id = make_run(client, project)
    monkeypatch.setenv("GPT2_FLOW_RUN_URL", "http://host/runs/flow-run/1")
    make_run(client, project)
    assert client.get_run(run_id).data.tags["prefect.flow_run"] == "http://host/runs/flow-run/1"
    assert "(http://host/runs/flow-run/1)" in description(client, run_id)


def test_what_people_write_into_the_description_stays(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    client, config = connected(project), tracking.read_config(project.run_folder(NAME))
    run_id = make_run(client, project)
    client.set_tag(run_id, "mlflow.note.content", f"Before.\n{description(client, run_id)}\nAfter.")
    monkeypatch.setenv("GPT2_FLOW_RUN_URL", "http://host/runs/flow-run/1")
    tracking.training_run(client, project, NAME, config, begins=True)
    text = description(client, run_id)
    assert text.startswith("Before.\n")
    assert text.endswith("\nAfter.")
    assert text.count("gpt2 train tiny") == text.count("flow-run/1") == 1
    full = text + "x" * (8000 - len(text))
    client.set_tag(run_id, "mlflow.note.content", full)
    monkeypatch.setenv("GPT2_FLOW_RUN_URL", f"http://host/runs/flow-run/{'1' * 100}")
    tracking.training_run(client, project, NAME, config, begins=True)  # ours would have to grow, and there is no room
    assert description(client, run_id) == full
    client.set_tag(run_id, "mlflow.note.content", "Mine alone.")
    tracking.training_run(client, project, NAME, config, begins=True)
    assert description(client, run_id) == "Mine alone."


def test_a_fork_has_the_checkpoint_that_it_begins_with_as_an_input(project: Project) -> None:
    client, config = connected(project), tracking.read_config(project.run_folder(NAME))
    parents = tracking.experiment_id(client, project, project.experiment(NAME), "parent")
    lineage = {"experiment": "parent", "checkpoint": "step_00000020", "digest": "c" * 64}
    fork = RunConfig.model_validate({**config.model_dump(), "checkpoint": {**config.checkpoint.model_dump(), "fork_of": lineage}})
    run_id = tracking.training_run(client, project, NAME, fork)
    assert client.get_run(run_id).info.run_name.startswith("tiny 20-100 (seed 42, ")
    assert not client.get_run(run_id).inputs.model_inputs  # it is registered nowhere yet
    model = client.create_logged_model(parents, "step_00000020", tags={"checkpoint_digest": "c" * 64})
    client.finalize_logged_model(model.model_id, "READY")
    for _ in range(2):
        tracking.training_run(client, project, NAME, fork, begins=True)
    assert [entry.model_id for entry in client.get_run(run_id).inputs.model_inputs] == [model.model_id]
    assert f"[step_00000020 of parent](#/experiments/{parents}/models/{model.model_id}?" in description(client, run_id)


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
    inputs = [entry for entry in client.get_run(run_id).inputs.dataset_inputs if entry.dataset.name == "evaluation"]
    assert sorted(entry.dataset.digest for entry in inputs) == ["e" * 32, "f" * 32]
    assert {tag.value for entry in inputs for tag in entry.tags} == {"evaluation"}


def test_bits_per_byte_rank_the_models_and_have_a_curve_over_tokens(project: Project) -> None:
    client = connected(project)
    run_id = make_run(client, project)
    experiment = client.get_run(run_id).info.experiment_id
    models = []
    for step, bits in ((10, 1.5), (20, 0.9), (30, 1.2)):
        params = {"step": str(step), "tokens": str(1000 * step)}
        models.append(client.create_logged_model(experiment, f"step_{step:08d}", run_id, params=params).model_id)
        for _ in range(2):
            tracking.log_scores(client, models[-1], run_id, {"evaluation/answer_bits_per_byte": bits}, step, "e" * 64)
    order = {"field_name": "metrics.evaluation/answer_bits_per_byte", "ascending": True}
    order |= {"dataset_name": "evaluation", "dataset_digest": "e" * 32}
    ranked = client.search_logged_models([experiment], order_by=[order])
    assert [model.model_id for model in ranked] == [models[1], models[2], models[0]]
    assert [(model.params["step"], model.metrics[0].dataset_name) for model in ranked] == [(s, "evaluation") for s in ("20", "30", "10")]
    (best,) = client.search_logged_models([experiment], "metrics.evaluation/answer_bits_per_byte < 1.0 AND params.step = '20'")
    assert best.model_id == models[1]
    curve = client.get_metric_history(run_id, "by_tokens/answer_bits_per_byte")
    assert sorted((point.step, point.value) for point in curve) == [(10_000, 1.5), (20_000, 0.9), (30_000, 1.2)]


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
