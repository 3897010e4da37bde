"""A new experiment that begins with another one's checkpoint, and one that begins anew."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from model.errors import UserError
from model.params import read_yaml, write_yaml
from model.training.journal import Journal
from model.training.lock import held
from tasks import tracking
from tasks.checkpoint_register import checkpoint_register
from tasks.fork import anew, fork
from tasks.project import Project
from tasks.starting_point import locate, named_checkpoint
from tests.tasks.conftest import NAME, write_checkpoint


def params(project: Project) -> dict[str, dict[str, object]]:
    return yaml.safe_load((project.root / "params.yaml").read_text())  # type: ignore[no-any-return]


def commented(project: Project) -> str:
    """params.yaml as people write it."""
    path = project.root / "params.yaml"
    text = "# what we train\n" + path.read_text() + "      # the last word\n"
    path.write_text(text)
    return text


def test_a_fork_is_an_entry_of_params_yaml_that_names_its_parent(new_project: Project) -> None:
    first, second = write_checkpoint(new_project, 10), write_checkpoint(new_project, 20)
    before, text = params(new_project), commented(new_project)
    parent = fork(new_project, NAME, "warmer", {"training": {"learning_rate": 0.01}})
    assert parent == second
    lineage = {"experiment": NAME, "checkpoint": "step_00000020", "digest": second.digest}
    assert (new_project.root / "params.yaml").read_text().startswith(text)
    assert params(new_project)["experiments"][NAME] == before["experiments"][NAME]
    forked = new_project.experiment("warmer")
    assert forked.training.learning_rate == 0.01
    assert forked.model == new_project.experiment(NAME).model
    assert forked.checkpoint.fork_of is not None
    assert forked.checkpoint.fork_of.model_dump() == lineage
    fork(new_project, NAME, "colder", {"checkpoint": {"checkpoint_to_resume": first.name}})
    older = new_project.experiment("colder").checkpoint
    assert older.fork_of is not None
    assert (older.fork_of.checkpoint, older.checkpoint_to_resume) == (first.name, None)


def test_a_fork_of_what_was_changed_for_a_run_keeps_that_change(new_project: Project) -> None:
    write_checkpoint(new_project, 10)
    new_project.record_overrides(NAME, {"training": {"learning_rate": 0.5}})
    fork(new_project, NAME, "same", {"training": {"batch_size": 2}})
    training = new_project.experiment("same").training
    assert (training.learning_rate, training.batch_size) == (0.5, 2)


@pytest.mark.parametrize(
    ("new", "overrides", "what"),
    [
        (NAME, {}, "--fork: params.yaml has an experiment tiny already"),
        ("../up", {}, "experiment: '../up' is not a name"),
        ("fine", {"training": {"max_stepz": 1}}, "training.max_stepz: no such field"),
        (
            "fine",
            {"checkpoint": {"checkpoint_to_resume": "step_00000011"}},
            "step_00000011/manifest.json is missing; there is",
        ),
        ("fine", {"checkpoint": {"checkpoint_to_resume": "/nowhere"}}, "'/nowhere' is not a folder here"),
        ("fine", {"checkpoint": {"checkpoint_to_resume": "runs:/abc/model"}}, "give a folder, or a registered version"),
    ],
)
def test_what_cannot_be_forked_is_one_line_and_changes_nothing(
    new_project: Project, new: str, overrides: dict[str, dict[str, object]], what: str
) -> None:
    write_checkpoint(new_project, 10)
    before = (new_project.root / "params.yaml").read_bytes()
    with pytest.raises(UserError) as refusal:
        fork(new_project, NAME, new, overrides)
    assert what in str(refusal.value)
    assert (new_project.root / "params.yaml").read_bytes() == before


def test_a_fork_of_nothing_is_refused(new_project: Project) -> None:
    with pytest.raises(UserError, match="no checkpoint to begin with"):
        fork(new_project, NAME, "new", {})


def test_params_that_do_not_end_with_experiments_are_left_alone(new_project: Project) -> None:
    write_checkpoint(new_project, 10)
    path = new_project.root / "params.yaml"
    fields = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({"experiments": fields["experiments"], "defaults": {"seed": 3}}, sort_keys=False))
    before = path.read_bytes()
    with pytest.raises(UserError, match="add this one to them yourself"):
        fork(new_project, NAME, "new", {})
    assert path.read_bytes() == before


def test_anew_sets_everything_aside_and_nothing_is_lost(new_project: Project) -> None:
    folder = new_project.run_folder(NAME)
    checkpoint = write_checkpoint(new_project, 10)
    journal = Journal(folder.journal)
    journal.append("started", step=0)
    journal.close()
    content = folder.journal.read_bytes()
    where = anew(new_project, NAME)
    assert where is not None
    assert not any(folder.checkpoints.iterdir())
    assert not folder.journal.exists()
    assert (where / "journal.jsonl").read_bytes() == content
    assert (where / "checkpoints" / checkpoint.name / "manifest.json").exists()
    assert folder.begin_anew.exists()
    assert anew(new_project, NAME) is None
    write_checkpoint(new_project, 20)
    again = anew(new_project, NAME)
    assert again not in (None, where)


def test_a_run_that_is_trained_is_not_set_aside(new_project: Project) -> None:
    write_checkpoint(new_project, 10)
    with held(new_project.run_folder(NAME).lock, "it"), pytest.raises(UserError, match="in use by another trainer"):
        anew(new_project, NAME)


def test_a_registered_version_is_found_by_its_digest(project: Project) -> None:
    first, second = write_checkpoint(project, 10), write_checkpoint(project, 20)
    checkpoint_register(project, NAME)
    client = tracking.connect(project, project.experiment(NAME))
    client.set_registered_model_alias(NAME, "favourite", "1")
    assert locate(project, NAME, f"models:/{NAME}/2") == second.path
    assert locate(project, NAME, f"models:/{NAME}@favourite") == first.path
    model_id = client.get_model_version(NAME, "2").source.removeprefix("models:/")
    assert locate(project, NAME, f"models:/{model_id}") == second.path
    for wrong in (f"models:/{NAME}/9", f"models:/{NAME}@nobody", "models:/m-nothing", f"models:/{NAME}"):
        with pytest.raises(UserError, match=r"^checkpoint.checkpoint_to_resume: models:/") as refusal:
            locate(project, NAME, wrong)
        assert len(str(refusal.value).splitlines()) == 1
    aside = project.run_folder(NAME).aside / "elsewhere"
    aside.mkdir(parents=True)
    shutil.move(second.path, aside)
    assert locate(project, NAME, f"models:/{NAME}/2") == aside / second.name
    shutil.rmtree(aside)
    with pytest.raises(UserError, match=r"is not in runs/; bring it back"):
        locate(project, NAME, f"models:/{NAME}/2")


def test_where_a_checkpoint_lies_is_looked_up_only_while_it_is_needed(new_project: Project, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(new_project, 10)
    folder = new_project.run_folder(NAME)
    config = tracking.read_config(folder)
    elsewhere = shutil.copytree(checkpoint.path, tmp_path / checkpoint.name)

    def named(**fields: object) -> Path | None:
        wanted = config.checkpoint.model_copy(update=fields)
        return named_checkpoint(new_project, NAME, config.model_copy(update={"checkpoint": wanted}))

    assert named() is None
    assert named(checkpoint_to_resume="step_00000010") is None
    assert named(checkpoint_to_resume=str(elsewhere)) == elsewhere
    relative = checkpoint.path.relative_to(new_project.root)
    assert named(checkpoint_to_resume=str(relative)) == checkpoint.path
    journal = Journal(folder.journal)
    journal.append("started", step=10, checkpoint_to_resume="/gone since")
    journal.close()
    assert named(checkpoint_to_resume="/gone since") is None
    fork(new_project, NAME, "new", {})
    fork_of = new_project.experiment("new").checkpoint.fork_of
    assert named(fork_of=fork_of) == checkpoint.path, "what the run holds is of another configuration"
    forked = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"fork_of": fork_of})})
    write_yaml(folder.config, forked.model_dump(mode="json"))
    own = write_checkpoint(new_project, 20)
    assert named(fork_of=fork_of) is None, "the run has begun"
    shutil.rmtree(own.path)
    shutil.move(folder.checkpoints, folder.path / "aside")
    assert named(fork_of=fork_of) == folder.path / "aside" / checkpoint.name
    shutil.rmtree(folder.path / "aside")
    with pytest.raises(UserError, match=r"checkpoint.fork_of: step_00000010 of tiny .* dvc pull train@tiny"):
        named(fork_of=fork_of)
    assert read_yaml(new_project.root / "params.yaml")["experiments"]["new"]["checkpoint"]["fork_of"]["experiment"] == NAME
