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
from typing import Any, NoReturn

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import save

from model.checkpoint.store import MODEL, OPTIMIZER, STATE, Checkpoint, CheckpointStore
from model.digest import file_sha256
from model.stream.quickstart import write_corpus
from model.training.journal import read_all, read_current
from tasks import lease, mirror, tracking
from tasks.build_config import build_config
from tasks.checkpoint_register import checkpoint_register
from tasks.evaluate_each_checkpoint import evaluate_each_checkpoint
from tasks.overview import champion_line
from tasks.project import Project, read_json
from tasks.stream_and_train import TRAINED_ELSEWHERE
from tests.tasks.test_mirror import push

NAME = "small"
EXPERIMENT = {
    "seed": 3,
    "model": {"preset": "nano", "dropout": 0.0},
    "data": {"max_length": 32, "buffer_size": 64, "lanes": 2},
    "training": {"batch_size": 4, "max_steps": 60, "warmup_steps": 5, "learning_rate": 3e-3, "eval_freq": 20, "eval_iters": 4},
    "checkpoint": {"save_every_n_iterations": 20, "keep_last": None},
    "evaluation": {"items": 24, "questions": 24, "max_new_tokens": 12},
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
    assert len({row["answer_bits"] for row in tables[0]}) > 24


def test_the_last_of_a_falling_loss_is_champion_and_says_why(done: Project) -> None:
    scores = read_json(done.run_folder(NAME).scores)
    assert scores["champion"]["name"] == "step_00000060"
    assert [row["champion"] for row in scores["checkpoints"]] == [False, False, True]
    assert "95 % interval" in scores["checkpoints"][2]["reason"]
    client = tracking.connect(done, done.experiment(NAME))
    version = client.get_model_version_by_alias(NAME, "champion")
    assert version.tags["champion.reason"] == version.description == scores["checkpoints"][2]["reason"]
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
    assert {"evaluation/text_bits_per_byte", "evaluation/answer_bits_per_byte"} <= {metric.key for metric in model.metrics}


def test_mlflow_has_every_item_with_its_bits(done: Project, tmp_path: Path) -> None:
    client = tracking.connect(done, done.experiment(NAME))
    entry = read_json(done.run_folder(NAME).registered)[-1]
    table = json.loads(Path(client.download_artifacts(entry["run_id"], "items/step_00000060.json", str(tmp_path))).read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row["half"] for row in rows] == ["choose"] * 24 + ["report"] * 24
    report = rows[24:]
    shown = read_json(done.run_folder(NAME).scores)["checkpoints"][-1]["answer_bits_per_byte"]
    assert sum(row["answer_bits"] for row in report) / sum(row["answer_bytes"] for row in report) == pytest.approx(shown, abs=1e-3)
    assert len(json.dumps(table)) < 250 * len(rows), "figures, no texts"


def test_evaluating_again_scores_nothing_again(done: Project) -> None:
    folder = done.run_folder(NAME)
    before = {path: path.stat().st_mtime_ns for path in folder.evaluation.rglob("*") if path.is_file()}
    scores = read_json(folder.scores)
    evaluate_each_checkpoint(done, NAME)
    assert {path: path.stat().st_mtime_ns for path in folder.evaluation.rglob("*") if path.is_file()} == before
    again = read_json(folder.scores)
    assert again["champion"] == scores["champion"]
    figures = ("digest", "text_bits_per_byte", "answer_bits_per_byte", "format_adherence")
    assert [[row[f] for f in figures] for row in again["checkpoints"]] == [[row[f] for f in figures] for row in scores["checkpoints"]]


def test_a_half_written_or_damaged_score_is_no_score(done: Project) -> None:
    folder = done.run_folder(NAME)
    scores = read_json(folder.scores)["checkpoints"]
    places = sorted(folder.evaluation.iterdir())
    (places[0] / "items.parquet").unlink()
    (places[1] / "summary.json").write_text("{")
    shutil.copytree(places[2], folder.evaluation / ".x.1.partial")
    evaluate_each_checkpoint(done, NAME)
    figures = ("digest", "text_bits_per_byte", "answer_bits_per_byte", "format_adherence")
    again = read_json(folder.scores)["checkpoints"]
    assert [[row[f] for f in figures] for row in again] == [[row[f] for f in figures] for row in scores]
    shutil.rmtree(folder.evaluation / ".x.1.partial")


def test_other_questions_are_another_evaluation(done: Project) -> None:
    folder = done.run_folder(NAME)
    settings = folder.evaluation_config.read_text()
    known = set(folder.evaluation.iterdir())
    try:
        folder.evaluation_config.write_text(settings.replace("questions: 24", "questions: 20"))
        evaluate_each_checkpoint(done, NAME)
        assert len(set(folder.evaluation.iterdir()) - known) == 3
        assert read_json(folder.scores)["checkpoints"][0]["questions"] == 20
    finally:
        folder.evaluation_config.write_text(settings)
        evaluate_each_checkpoint(done, NAME)
    assert read_json(folder.scores)["champion"]["name"] == "step_00000060"


def test_a_late_worse_checkpoint_cannot_demote_the_champion(done: Project) -> None:
    """Evaluated after the champion, older and worse: the order of arrival does not count."""
    folder = done.run_folder(NAME)
    registered = read_json(folder.registered)
    try:
        folder.registered.write_text(json.dumps([registered[2], registered[0], registered[1]]))
        evaluate_each_checkpoint(done, NAME)
        assert read_json(folder.scores)["champion"]["name"] == "step_00000060"
    finally:
        folder.registered.write_text(json.dumps(registered))
        evaluate_each_checkpoint(done, NAME)


def test_a_damaged_checkpoint_is_not_scored_and_keeps_none_of_the_others_back(done: Project) -> None:
    folder = done.run_folder(NAME)
    weights = CheckpointStore(folder.checkpoints).checkpoints()[0].path / "model.safetensors"
    good, evaluation = weights.read_bytes(), folder.evaluation
    kept = folder.path / "evaluation-before"
    evaluation.rename(kept)
    try:
        weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        output, errors = run(done, "evaluate_each_checkpoint", exit_code=1)
        assert "step_00000020/model.safetensors" in errors.splitlines()[-1]
        assert "step_00000020  not scored" in output
        assert len(list(evaluation.glob("*"))) == 2
        scores = read_json(folder.scores)
        assert [row["step"] for row in scores["checkpoints"]] == [40, 60]
        assert scores["champion"]["name"] == "step_00000060"
    finally:
        weights.write_bytes(good)
    evaluate_each_checkpoint(done, NAME)
    assert [row["step"] for row in read_json(folder.scores)["checkpoints"]] == [20, 40, 60], "tried again, and scored"
    shutil.rmtree(evaluation)
    kept.rename(evaluation)


def clone(root: Path, done: Project, storage: Path, name: str = NAME, **changes: object) -> Project:
    """Another folder of the same project, with a storage of its own choice and no checkpoints."""
    root.mkdir()
    params = yaml.safe_load((done.root / "params.yaml").read_text())
    experiment = {**params["experiments"][NAME], "storage": {"base_folder": str(storage)}, **changes}
    (root / "params.yaml").write_text(yaml.safe_dump({"defaults": {}, "experiments": {name: experiment}}))
    for file in ("overrides.yaml", "dvc.yaml"):
        shutil.copy(done.root / file, root)
    project = Project(root)
    build_config(project, name)
    shutil.copy(done.run_folder(NAME).journal, project.run_folder(name).journal)
    return project


def plant(project: Project, step: int, like: Checkpoint) -> None:
    """A checkpoint of this step with the weights of `like`."""
    state = json.dumps({**like.state(), "step": step}).encode()
    contents = {MODEL: [(like.path / MODEL).read_bytes()], OPTIMIZER: [save({"m": torch.zeros(1)})], STATE: [state]}
    CheckpointStore(project.run_folder(NAME).checkpoints).write(step, contents)


def judged(project: Project) -> dict[str, Any]:
    """What the stages register and evaluate say of the checkpoints that are there."""
    checkpoint_register(project, NAME)
    evaluate_each_checkpoint(project, NAME)
    scores: dict[str, Any] = read_json(project.run_folder(NAME).scores)
    return scores


@pytest.fixture
def storage(tmp_path: Path, empty_store: Path) -> Path:
    (tmp_path / "storage" / "mlflow").mkdir(parents=True)
    shutil.copy(empty_store, tmp_path / "storage" / "mlflow")
    return tmp_path / "storage"


def test_of_planted_checkpoints_only_the_better_one_takes_over(tmp_path: Path, done: Project, storage: Path) -> None:
    """(Weights that are off by some noise would not do for equal ones: that is another network, a little better or worse in truth.)"""
    project = clone(tmp_path / "planted", done, storage)
    worse, middle, better = CheckpointStore(done.run_folder(NAME).checkpoints).checkpoints()
    for step, like in ((20, middle), (30, middle), (40, worse)):
        plant(project, step, like)
    scores = judged(project)
    assert scores["champion"]["name"] == "step_00000020"
    assert [row["champion"] for row in scores["checkpoints"]] == [True, False, False]
    assert scores["checkpoints"][1]["reason"].startswith("stays: not significantly better, +0.0000"), "the same weights"
    assert scores["checkpoints"][2]["reason"].startswith("stays: not significantly better, +1."), "worse ones"
    assert scores["best"]["name"] == "step_00000040", "the lowest loss in the journal: a figure of its own"
    plant(project, 60, better)
    scores = judged(project)
    assert scores["champion"]["name"] == "step_00000060"
    assert scores["checkpoints"][0]["reason"].startswith("beaten by step_00000060; before: takes over: the first")
    client = tracking.connect(project, project.experiment(NAME))
    registry = {alias: client.get_model_version_by_alias(NAME, alias) for alias in ("champion", "best")}
    assert {alias: version.tags["checkpoint"] for alias, version in registry.items()} == dict.fromkeys(registry, "step_00000060")
    assert read_json(project.run_folder(NAME).aliases) == {alias: scores[alias]["digest"] for alias in ("best", "champion")}
    assert client.get_model_version(NAME, "2").tags["champion.reason"] == scores["checkpoints"][1]["reason"]


def test_the_champion_of_another_clone_is_fetched_and_measured_against(tmp_path: Path, done: Project, storage: Path) -> None:
    """Two clones share a storage; what one of them scores late is judged against the champion that the other one made."""
    early, _, late = CheckpointStore(done.run_folder(NAME).checkpoints).checkpoints()
    first = clone(tmp_path / "first", done, storage)
    plant(first, 60, late)
    champion = judged(first)["champion"]
    second = clone(tmp_path / "second", done, storage)
    plant(second, 20, early)
    scores = judged(second)
    assert scores["champion"] == champion
    assert scores["checkpoints"][0]["reason"].startswith("stays: not significantly better, +")
    assert not scores["checkpoints"][0]["champion"]
    assert "not a checkpoint of this folder" in str(champion_line(second, NAME))

    for path in (storage / "mlflow").rglob("checkpoint/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    shutil.rmtree(second.run_folder(NAME).evaluation)
    scores = judged(second)
    assert scores["champion"] == champion, "weights that are not the registered ones say nothing about the champion"
    assert "model.safetensors is not what was written" in scores["checkpoints"][0]["reason"]

    third = clone(tmp_path / "third", done, storage, seed=4)
    plant(third, 30, early)
    scores = judged(third)
    assert scores["champion"]["name"] == "step_00000030"
    assert "was chosen on other held-out samples" in scores["checkpoints"][0]["reason"]


def test_a_renamed_run_is_not_scored_again(tmp_path: Path, done: Project, storage: Path) -> None:
    project = clone(tmp_path / "renamed", done, storage, name="other")
    ours, theirs = project.run_folder("other"), done.run_folder(NAME)
    shutil.copytree(theirs.checkpoints, ours.checkpoints)
    shutil.copytree(theirs.evaluation, ours.evaluation)
    checkpoint_register(project, "other")

    def nothing_to_score(*_: object) -> NoReturn:
        raise AssertionError("scored again")

    evaluate_each_checkpoint(project, "other", score=nothing_to_score)
    assert [row["key"] for row in read_json(ours.scores)["checkpoints"]] == [row["key"] for row in read_json(theirs.scores)["checkpoints"]]


def test_what_was_trained_elsewhere_is_fetched_trained_no_further_and_copied_no_more(
    tmp_path: Path, done: Project, storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine that waited for another's training: first while the copies are there, then when only what DVC pushed is left."""
    trained = clone(tmp_path / "trained", done, storage)
    shutil.copytree(done.run_folder(NAME).checkpoints, trained.run_folder(NAME).checkpoints)
    with lease.holding(trained, NAME) as held:
        mirror.Mirror.of(trained, NAME, held).copy_new()
    monkeypatch.setenv(TRAINED_ELSEWHERE, "1")
    monkeypatch.setenv("GPT2_HOST", "another")
    for attempt in ("copied", "pushed"):
        waiting = clone(tmp_path / attempt, done, storage)
        waiting.run_folder(NAME).journal.unlink()
        output, _ = run(waiting, "stream_and_train")
        assert "brought step_00000060 back" in output
        ours, theirs = (CheckpointStore(each.run_folder(NAME).checkpoints).checkpoints() for each in (waiting, done))
        assert [each.digest for each in ours] == [each.digest for each in theirs]
        journal = read_all(waiting.run_folder(NAME).journal)
        assert [event["step"] for event in journal if event["event"] == "step"] == list(range(1, 61)), "trained again"
        assert journal[-1]["event"] == "finished"
        assert not list(storage.glob(f"checkpoints/{NAME}/*/token_00000002")), "uploaded again"
        if attempt == "copied":
            push(trained, NAME)
            mirror.prune(trained, NAME)
            assert [path.name for path in (storage / "checkpoints" / NAME).iterdir()] == ["pushed"]


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
