"""Evaluation beside a training, on a small real run: each checkpoint once, and what goes meanwhile is not missed."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from model.errors import Stopped
from tasks import beside
from tasks.overview import checkpoint_list
from tasks.project import Project, read_json
from tests.tasks.test_stages import NAME, make_project, run

pytestmark = pytest.mark.slow

NAMES = ["step_00000020", "step_00000040", "step_00000060"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose experiment is trained, and nothing more."""
    few = {"items": 4, "questions": 4, "max_new_tokens": 4, "prompts": ["What is 1 + 1?"]}
    project = make_project(tmp_path_factory.mktemp("project"), evaluation=few)
    for stage in ("build_config", "stream_and_train"):
        run(project, stage)
    return project


def without_reasons(project: Project) -> dict[str, Any]:
    """The scores. What took over says so once, and later that it stays."""
    scores: dict[str, Any] = read_json(project.run_folder(NAME).scores)
    return {**scores, "checkpoints": [{**row, "reason": ""} for row in scores["checkpoints"]]}


@pytest.fixture
def project(trained: Project, tmp_path: Path) -> Project:
    return Project(shutil.copytree(trained.root, tmp_path / "copy"))


def test_what_has_no_score_gets_one_and_only_once(project: Project) -> None:
    lines: list[str] = []
    assert beside.evaluate_new(project, NAME, on_line=lines.append, stop=threading.Event()) == NAMES
    assert any(line.startswith("step_00000040  version 2") for line in lines)
    assert [row["name"] for row in read_json(project.run_folder(NAME).scores)["checkpoints"]] == NAMES
    written = without_reasons(project)
    lines.clear()
    assert beside.evaluate_new(project, NAME, on_line=lines.append, stop=threading.Event()) == []
    assert lines == [], "nothing was started"
    run(project, "checkpoint_register")
    run(project, "evaluate_each_checkpoint")
    assert without_reasons(project) == written, "the stages add nothing"


def test_a_checkpoint_that_goes_meanwhile_keeps_the_others_from_nothing(project: Project) -> None:
    def drop(line: str) -> None:
        if line.startswith("step_00000060  version"):  # all are registered: retention comes in between
            shutil.rmtree(project.run_folder(NAME).checkpoints / NAMES[0], ignore_errors=True)

    assert beside.evaluate_new(project, NAME, on_line=drop, stop=threading.Event()) == NAMES
    assert [row["name"] for row in checkpoint_list(project, NAME) if row["questions"]] == NAMES[1:]


def test_a_stop_ends_it(project: Project) -> None:
    stop = threading.Event()
    with pytest.raises(Stopped):
        beside.evaluate_new(project, NAME, on_line=lambda line: stop.set(), stop=stop)
    assert not project.run_folder(NAME).scores.exists()


def test_an_experiment_that_was_begun_elsewhere_is_left_to_that_place(project: Project) -> None:
    shutil.rmtree(project.run_folder(NAME).path)
    lines: list[str] = []
    assert beside.evaluate_new(project, NAME, on_line=lines.append, stop=threading.Event()) == []
    assert "was not begun" in lines[0]
