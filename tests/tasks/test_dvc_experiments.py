"""DVC's own commands on a real, tiny training: what a commit pins, metrics, plots, experiments from the queue."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from model.stream.quickstart import write_corpus
from tests.end_to_end.conftest import DVC, PYTHON, Clone, contents, copy_working_tree

pytestmark = pytest.mark.slow

NAME = "quickstart"
CURVES = ("loss", "validation_loss", "tokens_per_s")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    """A fresh clone with an experiment of twenty steps that was trained under DVC and committed, and trained on for ten and committed:
    by the stages themselves, without DVC, which would first have unlinked what they write."""
    home = tmp_path_factory.mktemp("home")
    root = home / "a clone"
    copy_working_tree(root)
    write_corpus(home / "corpus", seed=1, rows=600, files=2)
    unset = ("MLFLOW_TRACKING_URI", "GPT2_WATCH_PID", "PYTHONPATH")
    environment = {key: value for key, value in os.environ.items() if key not in unset} | {
        "PATH": os.pathsep.join([str(Path(PYTHON).parent), os.environ["PATH"]]),
        "DVC_SITE_CACHE_DIR": str(home / "dvc"),
        "DVC_NO_ANALYTICS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    clone = Clone(root, environment)
    clone.run("git", "init", "-q")
    write_params(clone, max_steps=20)
    commit(clone, "code")
    clone.run(*DVC, "repro", "-q", f"train@{NAME}")
    commit(clone, "20 steps")
    yield clone
    assert clone.end() == [], "these were left behind"


def write_params(clone: Clone, max_steps: int) -> None:
    training = {"batch_size": 2, "num_epochs": 1000, "max_steps": max_steps, "warmup_steps": 2, "eval_freq": 10, "eval_iters": 1}
    tiny = {
        "model": {"preset": "nano", "dropout": 0.0},
        "data": {"path": str(clone.root.parent / "corpus"), "max_length": 32, "buffer_size": 100, "lanes": 2},
        "training": training,
        "checkpoint": {"save_every_n_iterations": 10, "keep_last": None},
        "hardware": {"device": "cpu"},
    }
    experiments = {NAME: {"training": {"learning_rate": 0.001}}}
    (clone.root / "params.yaml").write_text(yaml.safe_dump({"defaults": tiny, "experiments": experiments}))


def commit(clone: Clone, message: str) -> None:
    clone.run("git", "add", "-A")
    clone.run("git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", message)


def spoiled(clone: Clone) -> list[Path]:
    """Objects of DVC's cache that are not what their name says."""
    objects = [path for path in (clone.root / ".dvc" / "cache" / "files" / "md5").rglob("*") if path.is_file()]
    assert len(objects) > 10
    return [path for path in objects if hashlib.md5(path.read_bytes()).hexdigest() != f"{path.parent.name}{path.name}"[:32]]


def test_a_commit_pins_the_checkpoints_and_going_on_spoils_none(clone: Clone) -> None:
    folder = clone.folder(NAME)
    that_day = contents(folder.path)
    write_params(clone, max_steps=30)
    for step in ("build_config", "stream_and_train"):
        clone.run(PYTHON, "-m", f"tasks.{step}", NAME)
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["step_00000010", "step_00000020", "step_00000030"]
    assert folder.journal.read_bytes().startswith(that_day["journal.jsonl"]), "the journal grew"
    assert spoiled(clone) == [], "something was written through a link into DVC's cache"
    clone.run(*DVC, "commit", "-q", "-f", f"build-config@{NAME}", f"train@{NAME}")
    commit(clone, "30 steps")
    this_day = contents(folder.path)

    clone.run("git", "checkout", "-q", "HEAD~1")
    clone.run(*DVC, "checkout", "-q", f"build-config@{NAME}", f"train@{NAME}")
    assert contents(folder.path) == that_day
    assert "up to date" in clone.run(*DVC, "status", f"train@{NAME}").stdout
    clone.run("git", "checkout", "-q", "-")
    clone.run(*DVC, "checkout", "-q", f"build-config@{NAME}", f"train@{NAME}")
    assert contents(folder.path) == this_day


def test_metrics_and_curves_of_two_commits_are_set_side_by_side(clone: Clone) -> None:
    path = f"runs/{NAME}/metrics.json"
    shown = json.loads(clone.run(*DVC, "metrics", "show", "--json").stdout)[""]["data"][path]["data"]
    assert shown["step"] == 30
    differences = json.loads(clone.run(*DVC, "metrics", "diff", "HEAD~1", "--json").stdout)[path]
    assert differences["step"] == {"old": 20, "new": 30, "diff": 10}
    assert differences["validation_loss"]["new"] == shown["validation_loss"]

    plots = json.loads(clone.run(*DVC, "plots", "diff", "HEAD~1", "--json").stdout)["data"]
    assert sorted(plots) == sorted(f"runs/{NAME}/curves/{name}.csv" for name in CURVES)
    for name in CURVES:
        (drawn,) = plots[f"runs/{NAME}/curves/{name}.csv"]
        content = drawn["content"]
        assert content["title"]["text"].startswith(f"{NAME}: ")
        assert content["encoding"]["x"] == {"field": "step", "type": "quantitative", "title": "step"}
        y = content["layer"][0]["encoding"]["y"]
        assert (y["field"], y["title"] != name) == (name, True), "the axis says the unit"
        last = {value["rev"]: int(value["step"]) for value in content["data"]["values"]}
        assert last == {"workspace": 30, "HEAD~1": 20}
    clone.run(*DVC, "plots", "show", "-o", str(clone.root.parent / "plots"))
    assert "nats a token" in (clone.root.parent / "plots" / "index.html").read_text()


def test_a_candidate_from_the_queue_shows_its_rate_and_its_loss(clone: Clone) -> None:
    before = contents(clone.folder(NAME).path)
    rate = f"experiments.{NAME}.training.learning_rate"
    clone.run(*DVC, "exp", "run", "--queue", "--name", "faster", "-S", f"{rate}=0.004", f"train@{NAME}")
    clone.run(*DVC, "exp", "run", "--run-all", "--jobs", "1")
    shown = csv.DictReader(io.StringIO(clone.run(*DVC, "exp", "show", "--csv").stdout))
    rows = {row["Experiment"] or row["rev"]: row for row in shown}
    assert float(rows["faster"][rate]) == 0.004
    assert float(rows["workspace"][rate]) == 0.001
    assert float(rows["faster"]["validation_loss"]) < float(rows["workspace"]["validation_loss"])
    assert contents(clone.folder(NAME).path) == before, "the project's own run is not touched"
    compared = json.loads(clone.run(*DVC, "metrics", "diff", "HEAD", "faster", "--json").stdout)[f"runs/{NAME}/metrics.json"]
    assert compared["validation_loss"]["new"] == pytest.approx(float(rows["faster"]["validation_loss"]))
    drawn = json.loads(clone.run(*DVC, "plots", "diff", "HEAD", "faster", "--json").stdout)["data"]
    assert {value["rev"] for value in drawn[f"runs/{NAME}/curves/loss.csv"][0]["content"]["data"]["values"]} == {"HEAD", "faster"}
