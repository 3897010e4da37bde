from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from model.errors import UserError
from tasks.project import Project, find_project
from tests.tasks.conftest import NAME


def test_a_project_is_found_from_a_folder_within(new_project: Project) -> None:
    assert find_project(new_project.run_folder(NAME).path) == new_project


def test_outside_a_project_one_line_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"params\.yaml"):
        find_project(tmp_path)


def test_recorded_overrides_take_effect_and_replace_the_last_ones(new_project: Project) -> None:
    new_project.record_overrides(NAME, {"training": {"max_steps": 7}})
    assert new_project.experiment(NAME).training.max_steps == 7
    new_project.record_overrides(NAME, {"training": {"learning_rate": 0.5}})
    assert new_project.experiment(NAME).training.max_steps is None
    assert new_project.experiment(NAME).training.learning_rate == 0.5


def test_every_experiment_that_was_started_has_a_key_from_which_dvc_knows_its_stages(new_project: Project) -> None:
    new_project.record_overrides(NAME, {})
    new_project.record_overrides("other", {"seed": 1})
    kinds = {"pre_training": [NAME, "other"], "post_training": []}
    assert yaml.safe_load((new_project.root / "overrides.yaml").read_text()) == {"overrides": {NAME: {}, "other": {"seed": 1}}, **kinds}


def test_equal_overrides_leave_the_file_as_it_is(new_project: Project) -> None:
    overrides = new_project.root / "overrides.yaml"
    mine = f"# mine\noverrides:\n  {NAME}: {{}}\npre_training: [{NAME}]\npost_training: []\n"
    overrides.write_text(mine)
    new_project.record_overrides(NAME, {})
    assert overrides.read_text() == mine


def test_processes_that_record_at_once_lose_nothing(new_project: Project) -> None:
    program = "import sys; from pathlib import Path; from tasks.project import Project\n"
    program += "for n in range(20): Project(Path(sys.argv[1])).record_overrides(sys.argv[2], {'seed': n})"
    names = [f"experiment{n}" for n in range(4)]
    writers = [subprocess.Popen([sys.executable, "-c", program, str(new_project.root), name]) for name in names]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0, 0]
    assert yaml.safe_load((new_project.root / "overrides.yaml").read_text())["overrides"] == {name: {"seed": 19} for name in names}


@pytest.mark.parametrize("text", ["- 1\n", "quickstart: {}\n", "overrides:\n"])
def test_an_overrides_file_of_another_shape_is_the_users_mistake(new_project: Project, text: str) -> None:
    (new_project.root / "overrides.yaml").write_text(text)
    with pytest.raises(UserError, match=r"overrides\.yaml"):
        new_project.experiment(NAME)


@pytest.mark.parametrize(("base", "relative"), [("storage", True), ("deep/storage", True), ("/mnt/disk", False)])
def test_the_storage_is_an_absolute_folder(new_project: Project, base: str, relative: bool) -> None:
    experiment = new_project.with_overrides(NAME, {"storage": {"base_folder": base}})
    expected = new_project.root / base if relative else Path(base)
    assert new_project.storage_folder(experiment) == expected
    assert new_project.storage(experiment) == str(expected)


def test_a_url_is_no_folder(new_project: Project) -> None:
    experiment = new_project.with_overrides(NAME, {"storage": {"base_folder": "s3://bucket/path"}})
    assert new_project.storage_folder(experiment) is None
    assert new_project.storage(experiment) == "s3://bucket/path"
