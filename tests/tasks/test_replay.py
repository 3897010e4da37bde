"""A training begun again from what MLflow has of it: in a git repository whose code is another by now, on a real SQLite store."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from model.errors import EXIT_FAULT, Stopped, UserError
from model.params import write_yaml
from model.run_config import RunConfig
from model.stream.manifest import DataFile, DatasetManifest
from model.stream.quickstart import write_corpus
from model.training.journal import Journal, read_all
from tasks import recipe, replay, tracking
from tasks.build_config import build_config
from tasks.forwarder import open_forwarder, tracking_lock
from tasks.project import Project
from tests.tasks.conftest import NAME, write_config

ROOT = Path(__file__).parents[2]
STEPS = 12
EXPERIMENT = {
    "seed": 3,
    "model": {"preset": "nano", "dropout": 0.1},
    "data": {"path": "corpus", "max_length": 32, "buffer_size": 64, "lanes": 2},
    "training": {"batch_size": 4, "max_steps": STEPS, "warmup_steps": 2, "learning_rate": 3e-3, "eval_freq": 3, "eval_iters": 2},
    "hardware": {"device": "cpu"},
}


def git(project: Project, *arguments: str) -> str:
    who = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *who, *arguments], cwd=project.root, check=True, capture_output=True, text=True).stdout.strip()


def client_of(project: Project) -> Any:
    return tracking.connect(project, project.experiment(NAME))


def run_of(project: Project) -> Any:
    config = tracking.read_config(project.run_folder(NAME))
    client = client_of(project)
    return client.get_run(tracking.training_run(client, project, NAME, config))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Project:
    """Trained and sent to MLflow with the code of a commit; then the code was changed, and that was committed."""
    root = tmp_path_factory.mktemp("replay") / "a project"
    shutil.copytree(ROOT / "model", root / "model", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "params.yaml").write_text(yaml.safe_dump({"defaults": {}, "experiments": {NAME: EXPERIMENT}}))
    (root / "dvc.yaml").write_text("stages: {}\n")
    (root / ".gitignore").write_text("runs/\nstorage/\nreplays/\ncorpus/\n__pycache__/\n")
    (root / "storage" / "mlflow").mkdir(parents=True)
    shutil.copy(empty_store, root / "storage" / "mlflow")
    write_corpus(root / "corpus", seed=1, rows=600, files=2)
    project = Project(root)
    for arguments in (("init", "-q"), ("add", "-A"), ("commit", "-q", "-m", "as trained")):
        git(project, *arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(root)
        build_config(project, NAME)
        run_of(project)  # as the process beside the trainer does: before there is a journal
        train = [sys.executable, "-m", "model.training", str(project.run_folder(NAME).path), "--set=hardware.device=cpu"]
        subprocess.run(train, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=120)
        lock = tracking_lock(project, NAME)
        open_forwarder(project, NAME, lock).send_new()
        lock.release()
    schedule = root / "model" / "training" / "schedule.py"
    text = schedule.read_text()
    schedule.write_text(f"{text}\n\n_before = learning_rate_factor\ndef learning_rate_factor(*a, **k): return 1.5 * _before(*a, **k)\n")
    git(project, "commit", "-q", "-a", "-m", "another schedule")
    return project


def gpt2_replay(project: Project, run_id: str, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("MLFLOW_TRACKING_URI", None)
    command = [sys.executable, "-m", "flows.cli", "replay", run_id, *options]
    return subprocess.run(command, cwd=project.root, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_the_code_of_the_run_gives_equal_bits_and_leaves_everything_alone(trained: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # the run had one thread
    run = run_of(trained)
    before = (git(trained, "rev-parse", "HEAD"), sorted((trained.root / "runs").rglob("*")), run.to_dictionary())
    result = replay.replay(trained, run.info.run_id, 7).as_json()
    assert result["equal"]
    assert [pair["step"] for pair in result["losses"]] == [1, 2, 3, 4, 5, 6, 7]
    assert [pair["step"] for pair in result["validation"]] == [3, 6]
    journal = {event["step"]: event["loss"] for event in read_all(trained.run_folder(NAME).journal) if event["event"] == "step"}
    assert {pair["step"]: pair["replay"] for pair in result["losses"]} == {step: journal[step] for step in range(1, 8)}
    assert (result["differences"], result["notes"]) == ([], [])
    folder = Path(result["folder"])
    assert folder.parent == trained.root / "replays"
    assert result["code"] == f"commit {git(trained, 'rev-parse', 'HEAD~')[:12]}, in {folder / 'code'}"
    assert json.loads((folder / "replay.json").read_text()) == result
    after = (git(trained, "rev-parse", "HEAD"), sorted((trained.root / "runs").rglob("*")), run_of(trained).to_dictionary())
    assert after == before
    assert git(trained, "status", "--porcelain") == ""


@pytest.mark.slow
def test_todays_code_is_taken_where_the_commit_is_not_there_and_found_out(trained: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(trained)
    began = recipe.read(client_of(trained), run, trained).started
    read, started = recipe.read, {**began, "code": {"commit": "f" * 40, "diff_sha256": None}}
    monkeypatch.setattr(recipe, "read", lambda *arguments: dataclasses.replace(read(*arguments), started=started))
    corpus = trained.root / "corpus"
    corpus.rename(moved := trained.root / "replays" / "moved")
    try:
        with pytest.raises(UserError, match=rf"^data\.path: {corpus}.*2 of 2 files.*--data FOLDER"):
            replay.replay(trained, run.info.run_id, 4)
        result = replay.replay(trained, run.info.run_id, 4, data=moved)
    finally:
        moved.rename(corpus)
    assert not result.equal
    first = result.first_difference
    assert first is not None
    assert first.step == 2  # the schedule's first effect
    assert result.code.startswith(f"today's (commit {git(trained, 'rev-parse', 'HEAD')[:12]}")
    assert len(result.differences) == 1
    assert "ffffffffffff, which this git repository does not have" in result.differences[0]


@pytest.mark.slow
def test_another_seed_is_found_at_the_first_step_and_named(trained: Project, tmp_path: Path) -> None:
    run_id = run_of(trained).info.run_id
    (config,) = (trained.root / "storage" / "mlflow" / "artifacts").rglob(f"{recipe.FOLDER}/{recipe.CONFIG}")
    text = config.read_text()
    try:
        config.write_text(text.replace("seed: 3", "seed: 4"))
        answer = gpt2_replay(trained, run_id, "--steps", str(STEPS + 5), "--folder", str(tmp_path / "again"))
    finally:
        config.write_text(text)
    assert answer.returncode == EXIT_FAULT, answer.stderr
    lines = answer.stdout.splitlines()
    assert "differs: seed: 3, now 4" in lines
    assert any(line.startswith("differs: the config's digest: ") for line in lines)
    assert f"note: the run has {STEPS} steps, not {STEPS + 5}" in lines
    assert f"0 of {STEPS} losses equal to the bit (steps 1 to {STEPS})" in lines
    first = json.loads((tmp_path / "again" / "replay.json").read_text())["losses"][0]
    assert any(" 1 " in line and repr(first["run"]) in line and repr(first["replay"]) in line for line in lines)
    with pytest.raises(UserError, match="again is not empty"):
        replay.replay(trained, run_id, folder=tmp_path / "again")


@pytest.mark.slow
def test_a_stop_ends_the_trainer(trained: Project, tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped, match="stopped at step 0"):
        replay.replay(trained, run_of(trained).info.run_id, folder=tmp_path / "stopped", stop=stop)
    assert [child for child in psutil.Process().children(recursive=True) if "model.training" in child.cmdline()] == []


@pytest.mark.slow
def test_changed_data_are_refused(trained: Project, tmp_path: Path) -> None:
    shutil.copytree(trained.root / "corpus", tmp_path / "corpus")
    first = sorted((tmp_path / "corpus").glob("*.parquet"))[0]
    first.write_bytes(first.read_bytes()[:-20] + bytes(20))
    with pytest.raises(UserError, match=rf"{first.name} changed since build-config"):
        replay.replay(trained, run_of(trained).info.run_id, folder=tmp_path / "replay", data=tmp_path / "corpus")


@pytest.mark.slow
def test_a_run_older_than_recipes_is_replayed_from_its_folder_while_that_is_its_own(trained: Project) -> None:
    client, run = client_of(trained), run_of(trained)
    logged = recipe.read(client, run, trained)
    assert logged.source == "the run's artifacts"
    assert logged.started["hardware"]["device"] == "cpu"
    run.data.tags.pop(recipe.FOLDER)
    old = recipe.read(client, run, trained)
    assert old.source == f"runs/{NAME}"
    assert (old.config, old.manifest) == (logged.config, logged.manifest)
    path = trained.run_folder(NAME).config
    text = path.read_text()
    try:
        path.write_text(text.replace("seed: 3", "seed: 4"))
        with pytest.raises(UserError, match=rf"was logged without its recipe.*runs/{NAME} does not hold its configuration"):
            recipe.read(client, run, trained)
    finally:
        path.write_text(text)


# --- without a training ---


def with_data(project: Project, url: str = "/data/a.parquet") -> RunConfig:
    """The run's config and data manifest as build-config leaves them."""
    manifest = DatasetManifest("somewhere", None, [DataFile(url, "a.parquet", 10, None, 100, 100, 90, 1000)], 20.0)
    config = tracking.read_config(project.run_folder(NAME))
    config = config.model_copy(update={"dataset": config.dataset.model_copy(update={"digest": manifest.digest})})
    manifest.write(project.run_folder(NAME).dataset)
    write_yaml(project.run_folder(NAME).config, config.model_dump(mode="json"))
    return config


def test_the_recipe_is_whole_when_training_has_begun_and_stays_what_it_was(project: Project) -> None:
    config = with_data(project)
    run = run_of(project)
    assert run.data.tags[recipe.FOLDER] == "begun"
    journal = Journal(project.run_folder(NAME).journal)
    for ranks in (2, 3):  # of the second start nothing is taken
        journal.append("started", step=0, config_digest=config.digest, ranks=ranks, code={"commit": "a" * 40, "diff_sha256": None})
        run = run_of(project)
    assert run.data.tags[recipe.FOLDER] == "whole"
    found = recipe.read(client_of(project), run, project)
    assert RunConfig.model_validate(found.config) == config
    assert found.manifest == DatasetManifest.read(project.run_folder(NAME).dataset)
    assert found.started["ranks"] == 2
    assert found.started["hardware"] == project.experiment(NAME).hardware.model_dump(mode="json")


def test_files_of_mlflow_that_cannot_be_written_keep_no_run_from_being_made(
    project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_data(project)
    store = project.root / "storage" / "mlflow" / "artifacts"
    store.write_text("a file where a folder should be")
    run = run_of(project)
    assert recipe.FOLDER not in run.data.tags
    assert "warning: MLflow does not take what a replay of the run needs" in capsys.readouterr().err
    store.unlink()
    assert run_of(project).data.tags[recipe.FOLDER] == "begun"


def test_a_secret_is_not_in_the_recipe_which_says_that_it_lacks_it(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "pl4nted-token")
    with_data(project, "https://host/a.parquet?v=pl4nted-token")
    run = run_of(project)
    database = project.root / "storage" / "mlflow"
    assert not [path for path in database.rglob("*") if path.is_file() and b"pl4nted" in path.read_bytes()]
    assert list((database / "artifacts").rglob(recipe.DATASET))
    assert recipe.read(client_of(project), run, project).source == f"runs/{NAME}"  # which has it
    write_config(project, learning_rate=1.0)
    with pytest.raises(UserError, match="holds a secret in the addresses of its data"):
        recipe.read(client_of(project), run, project)


def test_of_a_step_that_was_taken_twice_the_latest_value_counts_and_is_told_of(project: Project) -> None:
    client, run_id = client_of(project), run_of(project).info.run_id
    for step, value, when in ((1, 5.0, 10), (2, 4.0, 20), (3, 3.0, 30), (2, 4.0, 40), (3, 3.5, 50)):
        client.log_metric(run_id, "train/loss", value, when, step)
    notes: list[str] = []
    assert replay._history(client, run_id, "train/loss", notes) == {1: 5.0, 2: 4.0, 3: 3.5}
    assert notes == ["the run has several values of train/loss at 1 steps (from 3 on); the latest were taken"]


@pytest.mark.parametrize("run_id", ["quickstart", "../../etc/passwd", "F" * 32, ""])
def test_what_is_no_runs_id_is_said_to_be_none(project: Project, run_id: str) -> None:
    with pytest.raises(UserError, match=r"RUN_ID.*is not the id of an MLflow run"):
        replay.replay(project, run_id)


def test_what_a_replay_lacks_is_one_line(project: Project, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"RUN_ID: no run {'0' * 32} in sqlite"):
        replay.replay(project, "0" * 32)
    client = client_of(project)
    other = client.create_run(client.create_experiment("else")).info.run_id
    with pytest.raises(UserError, match="is no training of this project"):
        replay.replay(project, other)
    run_id = run_of(project).info.run_id  # neither a recipe nor data in runs/
    with pytest.raises(UserError, match="was logged without its recipe"):
        replay.replay(project, run_id)
    with_data(project)
    run_id = run_of(project).info.run_id
    with pytest.raises(UserError, match=f"tells of no loss of the steps 1 to 20; send them: gpt2 sync {NAME}"):
        replay.replay(project, run_id)
    client.log_metric(run_id, "train/loss", 5.0, 10, 1)
    with pytest.raises(UserError, match=r"data\.path: /data/a\.parquet is not there"):
        replay.replay(project, run_id, folder=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_changes_that_were_not_committed_are_named(project: Project) -> None:
    shutil.copytree(ROOT / "model", project.root / "model", ignore=shutil.ignore_patterns("__pycache__"))
    for arguments in (("init", "-q"), ("add", "model"), ("commit", "-q", "-m", "first")):
        git(project, *arguments)
    commit = git(project, "rev-parse", "HEAD")
    code = replay.restore_code(project, {"commit": commit, "diff_sha256": "d" * 64}, project.root / "code")
    assert code.root == project.root
    assert code.differences == [
        f"the code: commit {commit[:12]} with changes that were not committed (diff dddddddddddd); now commit {commit[:12]}"
    ]
    assert not (project.root / "code").exists()
    assert replay.restore_code(project, {}, project.root / "code").differences == ["the run does not say which code trained it"]


def test_equal_means_to_the_bit() -> None:
    pairs = [replay.Pair(1, 2.5, 2.5), replay.Pair(2, None, None), replay.Pair(3, 0.1 + 0.2, 0.3), replay.Pair(4, 1.0, None)]
    assert [pair.equal for pair in pairs] == [True, True, False, False]
    assert replay.Replay("0" * 32, NAME, "", "", [], [], pairs[:2], []).equal
    result = replay.Replay("0" * 32, NAME, "", "", [], [], pairs, [])
    assert not result.equal
    assert result.as_json()["first_difference"] == 3
    assert not replay.Replay("0" * 32, NAME, "", "", [], [], pairs[:1], pairs[3:]).equal  # a validation that differs
