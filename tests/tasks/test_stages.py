"""The four stages one after the other on a small real run, as DVC would start them, and what each leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from model.checkpoint.store import CheckpointStore
from model.digest import file_sha256
from model.stream.quickstart import write_corpus
from model.training.journal import read_all, read_current
from tasks import tracking
from tasks.project import Project, read_json

NAME = "small"
EXPERIMENT = {
    "seed": 3,
    "model": {"preset": "nano", "dropout": 0.0},
    "data": {"max_length": 32, "buffer_size": 64, "lanes": 2},
    "training": {"batch_size": 4, "max_steps": 60, "warmup_steps": 5, "learning_rate": 3e-3, "eval_freq": 20, "eval_iters": 4},
    "checkpoint": {"save_every_n_iterations": 20, "keep_last": None},
    "evaluation": {"questions": 24, "max_new_tokens": 12},
}

pytestmark = pytest.mark.slow


def start(project: Project, stage: str) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key not in ("MLFLOW_TRACKING_URI", "GPT2_WATCH_PID")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", f"tasks.{stage}", NAME]
    return subprocess.Popen(command, cwd=project.root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(project: Project, stage: str, exit_code: int = 0) -> tuple[str, str]:
    process = start(project, stage)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == exit_code, errors
    return output, errors


def make_project(root: Path, **changes: object) -> Project:
    write_corpus(root / "corpus", seed=1, rows=1500, files=3)
    experiment = {**EXPERIMENT, **changes, "data": {**EXPERIMENT["data"], "path": str(root / "corpus")}}
    (root / "params.yaml").write_text(yaml.safe_dump({"defaults": {}, "experiments": {NAME: experiment}}))
    (root / "overrides.yaml").write_text(f"overrides: {{{NAME}: {{}}}}\n")
    (root / "dvc.yaml").write_text("stages: {}\n")
    return Project(root)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project in which all four stages have run."""
    project = make_project(tmp_path_factory.mktemp("project"))
    for stage in ("build_config", "stream_and_train", "checkpoint_register", "evaluate_each_checkpoint"):
        run(project, stage)
    return project


def test_equal_input_gives_equal_configs(done: Project) -> None:
    folder = done.run_folder(NAME)
    files = (folder.config, folder.dataset, folder.evaluation_config)
    before = [path.read_bytes() for path in files]
    output, _ = run(done, "build_config")
    assert [path.read_bytes() for path in files] == before
    assert "60 steps of 4 windows" in output


def test_a_mistake_changes_nothing_and_is_one_line(done: Project) -> None:
    folder = done.run_folder(NAME)
    before = folder.config.read_bytes()
    overrides = (done.root / "overrides.yaml").read_text()
    try:
        (done.root / "overrides.yaml").write_text(f"overrides: {{{NAME}: {{data: {{path: /nowhere/at/all}}}}}}\n")
        _, errors = run(done, "build_config", exit_code=2)
    finally:
        (done.root / "overrides.yaml").write_text(overrides)
    assert errors.startswith("error: data.path: /nowhere/at/all")
    assert len(errors.strip().splitlines()) == 1
    assert folder.config.read_bytes() == before


def test_every_checkpoint_is_scored_on_the_same_items(done: Project) -> None:
    folder = done.run_folder(NAME)
    scores = read_json(folder.scores)
    assert [row["step"] for row in scores["checkpoints"]] == [20, 40, 60]
    tables = [pq.read_table(path).to_pylist() for path in sorted(folder.evaluation.glob("*/items.parquet"))]
    assert len(tables) == 3
    ids = [[(row["half"], row["id"]) for row in table] for table in tables]
    assert ids[0] == ids[1] == ids[2]
    assert len(ids[0]) == 48
    articles = {half: {row["article"] for row in tables[0] if row["half"] == half} for half in ("choose", "report")}
    assert not articles["choose"] & articles["report"]
    assert len({row["gold_bits"] for row in tables[0]}) > 24


def test_the_last_of_a_falling_loss_is_champion_and_says_why(done: Project) -> None:
    scores = read_json(done.run_folder(NAME).scores)
    assert scores["champion"]["name"] == "step_00000060"
    assert [row["champion"] for row in scores["checkpoints"]] == [False, False, True]
    assert "95 % interval" in scores["checkpoints"][2]["reason"]
    client = tracking.connect(done, done.experiment(NAME))
    version = client.get_model_version_by_alias(NAME, "champion")
    assert version.tags["champion.reason"] == scores["checkpoints"][2]["reason"]
    assert str(version.version) == scores["champion"]["version"]


def test_mlflow_has_curves_scores_and_readable_answers(done: Project) -> None:
    client = tracking.connect(done, done.experiment(NAME))
    entry = read_json(done.run_folder(NAME).registered)[-1]
    run_info = client.get_run(entry["run_id"])
    steps = [e for e in read_current(done.run_folder(NAME).journal) if e["event"] == "step"]
    history = client.get_metric_history(entry["run_id"], "train/loss")
    assert [(m.step, pytest.approx(m.value)) for m in sorted(history, key=lambda m: m.step)] == [(e["step"], e["loss"]) for e in steps]
    assert run_info.info.status == "FINISHED"
    names = {path.path for path in client.list_artifacts(entry["run_id"], "answers")}
    assert "answers/step_00000060.json" in names
    model = client.get_logged_model(entry["model_id"])
    assert any(metric.key == "evaluation/exact_match" for metric in model.metrics)


def test_evaluating_again_scores_nothing_again(done: Project) -> None:
    folder = done.run_folder(NAME)
    before = {path: path.stat().st_mtime_ns for path in folder.evaluation.rglob("*") if path.is_file()}
    scores = read_json(folder.scores)
    run(done, "evaluate_each_checkpoint")
    assert {path: path.stat().st_mtime_ns for path in folder.evaluation.rglob("*") if path.is_file()} == before
    again = read_json(folder.scores)
    assert again["champion"] == scores["champion"]
    figures = ("digest", "validation_bits_per_byte", "gold_bits_per_byte", "exact_match")
    assert [[row[f] for f in figures] for row in again["checkpoints"]] == [[row[f] for f in figures] for row in scores["checkpoints"]]


def test_a_half_written_or_damaged_score_is_no_score(done: Project) -> None:
    folder = done.run_folder(NAME)
    scores = read_json(folder.scores)["checkpoints"]
    places = sorted(folder.evaluation.iterdir())
    (places[0] / "items.parquet").unlink()
    (places[1] / "summary.json").write_text("{")
    shutil.copytree(places[2], folder.evaluation / ".x.1.partial")
    run(done, "evaluate_each_checkpoint")
    figures = ("digest", "validation_bits_per_byte", "gold_bits_per_byte", "exact_match")
    again = read_json(folder.scores)["checkpoints"]
    assert [[row[f] for f in figures] for row in again] == [[row[f] for f in figures] for row in scores]
    shutil.rmtree(folder.evaluation / ".x.1.partial")


def test_other_questions_are_another_evaluation(done: Project) -> None:
    folder = done.run_folder(NAME)
    settings = folder.evaluation_config.read_text()
    known = set(folder.evaluation.iterdir())
    try:
        folder.evaluation_config.write_text(settings.replace("questions: 24", "questions: 20"))
        run(done, "evaluate_each_checkpoint")
        assert len(set(folder.evaluation.iterdir()) - known) == 3
        assert read_json(folder.scores)["checkpoints"][0]["questions"] == 20
    finally:
        folder.evaluation_config.write_text(settings)
        run(done, "evaluate_each_checkpoint")
    assert read_json(folder.scores)["champion"]["name"] == "step_00000060"


def test_a_late_worse_checkpoint_cannot_demote_the_champion(done: Project) -> None:
    """Evaluated after the champion, older and worse: the order of arrival does not count."""
    folder = done.run_folder(NAME)
    registered = read_json(folder.registered)
    try:
        folder.registered.write_text(json.dumps([registered[2], registered[0], registered[1]]))
        run(done, "evaluate_each_checkpoint")
        assert read_json(folder.scores)["champion"]["name"] == "step_00000060"
    finally:
        folder.registered.write_text(json.dumps(registered))
        run(done, "evaluate_each_checkpoint")


def test_a_damaged_checkpoint_is_not_scored(done: Project) -> None:
    folder = done.run_folder(NAME)
    weights = CheckpointStore(folder.checkpoints).checkpoints()[0].path / "model.safetensors"
    good, evaluation = weights.read_bytes(), folder.evaluation
    kept = folder.path / "evaluation-before"
    evaluation.rename(kept)
    try:
        weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        _, errors = run(done, "evaluate_each_checkpoint", exit_code=1)
        assert "step_00000020/model.safetensors" in errors
        assert not any(evaluation.glob("*"))
    finally:
        weights.write_bytes(good)
        shutil.rmtree(evaluation, ignore_errors=True)
        kept.rename(evaluation)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stage_that_is_stopped_or_killed_takes_its_trainer_along_and_goes_on(
    tmp_path: Path, done: Project, number: signal.Signals
) -> None:
    project = make_project(tmp_path)
    run(project, "build_config")
    stage = start(project, "stream_and_train")
    journal = project.run_folder(NAME).journal
    deadline = time.monotonic() + 120
    while not any(e["event"] == "step" and e["step"] >= 10 for e in read_all(journal)):
        assert stage.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    stage.send_signal(number)
    stage.communicate(timeout=60)
    assert stage.returncode == (75 if number == signal.SIGTERM else -9)
    deadline = time.monotonic() + 20
    while read_all(journal)[-1]["event"] not in ("stopped", "finished"):
        assert time.monotonic() < deadline, "the trainer goes on without its stage"
        time.sleep(0.1)
    while project.run_folder(NAME).lock.with_suffix(".json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    run(project, "stream_and_train")
    ours, theirs = (p.run_folder(NAME).checkpoints / "step_00000060" / "model.safetensors" for p in (project, done))
    assert file_sha256(ours) == file_sha256(theirs)
