"""`gpt2 restore`: a registered version comes back from the storage byte for byte, and nothing that lies there is believed.

What DVC's remote looks like is written here by hand; that it looks so is shown in test_dvc_remotes.py.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save

from model.checkpoint.store import FILES, MANIFEST, MODEL, OPTIMIZER, STATE, Checkpoint, CheckpointStore
from model.errors import UserError
from model.run_config import Base
from model.training.lock import held
from tasks import lease, mirror, tracking, versioning
from tasks.post_training import place_of
from tasks.project import Project
from tasks.pushed import NotThere, note_pushed
from tasks.restore import restore
from tasks.use import find, pick_checkpoint
from tests.tasks.conftest import NAME, make_project, write_checkpoint, write_config

OURS = sorted([*FILES, MANIFEST])


def register(project: Project, *checkpoints: Checkpoint, champion: int = 1) -> None:
    """Versions 1, 2, … of the registered model, as checkpoint-register names them."""
    client = tracking.connect(project, project.experiment(NAME))
    client.create_registered_model(NAME)
    for checkpoint in checkpoints:
        client.create_model_version(NAME, str(checkpoint.path), tags={tracking.DIGEST_TAG: checkpoint.digest})
    client.set_registered_model_alias(NAME, tracking.CHAMPION, str(champion))


def push_by_hand(project: Project, *checkpoints: Checkpoint) -> None:
    """The remote and the dvc.lock that `dvc commit` and `dvc push` leave."""
    listed = []
    for path in (checkpoint.path / file for checkpoint in checkpoints for file in OURS):
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        listed.append({"md5": md5, "relpath": path.relative_to(project.run_folder(NAME).checkpoints).as_posix()})
        object_of(project, md5).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, object_of(project, md5))
    write_list(project, listed)


def write_list(project: Project, listed: Any) -> None:
    content = json.dumps(listed).encode()
    md5 = hashlib.md5(content).hexdigest() + ".dir"
    object_of(project, md5).parent.mkdir(parents=True, exist_ok=True)
    object_of(project, md5).write_bytes(content)
    out = {"path": f"runs/{NAME}/checkpoints", "hash": "md5", "md5": md5}
    (project.root / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": {f"train@{NAME}": {"outs": [out]}}}))


def other_than(project: Project, checkpoint: Checkpoint) -> Checkpoint:
    """A whole checkpoint of the same step and configuration."""
    state = {**checkpoint_state(project, checkpoint.step), "seed": "another"}
    weights = {MODEL: [save({"w": torch.ones(1)})], OPTIMIZER: [save({"m": torch.ones(1)})], STATE: [json.dumps(state).encode()]}
    return CheckpointStore(project.run_folder(NAME).checkpoints).write(checkpoint.step, weights)


def checkpoint_state(project: Project, step: int) -> dict[str, Any]:
    return {"step": step, "config_digest": tracking.read_config(project.run_folder(NAME)).digest}


def object_of(project: Project, md5: str) -> Path:
    return project.root / "storage" / "dvc" / "files" / "md5" / md5[:2] / md5[2:]


def note_of(project: Project, checkpoint: Checkpoint) -> Path:
    return project.root / "storage" / "checkpoints" / NAME / "pushed" / f"{checkpoint.digest}.json"


def stored(project: Project, checkpoint: Checkpoint, file: str) -> Path:
    """Where the storage has a file of it."""
    return object_of(project, json.loads(note_of(project, checkpoint).read_text())["md5"][file])


def registered(project: Project, *checkpoints: Checkpoint) -> None:
    """What checkpoint-register notes in the run."""
    entries = [{"name": each.name, "digest": each.digest} for each in checkpoints]
    project.run_folder(NAME).registered.write_text(json.dumps(entries))


def restored_in(project: Project) -> Path:
    return project.run_folder(NAME).aside / "restored"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def clone_of(project: Project) -> Project:
    """A fresh clone that knows the storage and nothing else."""
    clone = make_project(project.root.parent / "a clone")
    shutil.rmtree(clone.root / "runs")
    (clone.root / "storage").symlink_to(project.root / "storage")
    return clone


def refusal(project: Project, what: str, to: Path | None = None) -> str:
    before = sorted(project.root.rglob("*"))
    with pytest.raises(UserError) as refused:
        restore(project, what, to)
    left = [path for path in sorted(project.root.rglob("*")) if path not in before and path != project.run_folder(NAME).path]
    assert [path for path in left if path != project.root / "runs"] == [], "it left something behind"
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.fixture
def pushed(project: Project) -> tuple[Project, Checkpoint, Checkpoint]:
    """Two checkpoints, registered (the first is champion), pushed and noted."""
    first, second = write_checkpoint(project, 10), write_checkpoint(project, 20)
    register(project, first, second)
    push_by_hand(project, first, second)
    assert note_pushed(project, NAME) == [first.name, second.name]
    return project, first, second


Pushed = tuple[Project, Checkpoint, Checkpoint]


def test_any_version_comes_back_on_a_fresh_clone_whatever_is_checked_out(pushed: Pushed) -> None:
    project, first, second = pushed
    clone = clone_of(project)
    back = restore(clone, f"{NAME}@champion")
    assert back.checkpoint.path == restored_in(clone) / first.name
    assert bytes_of(back.checkpoint.path) == bytes_of(first.path)
    assert back.source == str(note_of(project, first))
    again = restore(clone, f"models:/{NAME}@champion")
    assert (again.checkpoint, again.source) == (back.checkpoint, None)
    to = clone.root / "some" / "where"
    elsewhere = restore(clone, f"{NAME}/2", to)
    assert bytes_of(to) == bytes_of(second.path)
    about = elsewhere.as_json()
    assert (about["step"], about["digest"], about["folder"]) == (20, second.digest, str(to))
    assert "there already" in refusal(clone, f"{NAME}/2", to)
    assert restore(clone, f"{NAME}/2").checkpoint.path == restored_in(clone) / second.name
    assert not clone.run_folder(NAME).checkpoints.exists(), "training would go on from there"
    assert not list(clone.root.rglob("*.partial"))


def test_noting_again_adds_nothing_and_what_is_not_pushed_is_not_noted(pushed: Pushed) -> None:
    project, first, _ = pushed
    third = write_checkpoint(project, 30)
    assert note_pushed(project, NAME) == []
    assert not note_of(project, third).exists()
    note_of(project, first).unlink()
    assert note_pushed(project, NAME) == [first.name]
    shutil.rmtree(first.path)
    other_than(project, first)
    assert note_pushed(project, NAME) == []
    (project.root / "dvc.lock").unlink()
    assert note_pushed(project, NAME) == []


def test_a_file_that_the_storage_lost_is_asked_for_again(pushed: Pushed) -> None:
    project, first, _ = pushed
    stored(project, first, MODEL).unlink()
    with pytest.raises(NotThere, match=f"{first.name}/{MODEL}"):
        note_pushed(project, NAME)
    assert not list((project.root / "storage" / "dvc").rglob("*.dir")), "by which DVC would know that it has to look"


def test_a_list_that_was_taken_away_comes_back_if_the_push_fails(pushed: Pushed, monkeypatch: pytest.MonkeyPatch) -> None:
    project, first, _ = pushed
    (listing,) = (project.root / "storage" / "dvc").rglob("*.dir")
    before = listing.read_bytes()
    stored(project, first, MODEL).unlink()
    pushes: list[bool] = []

    def push_fails_the_second_time(*_: Any) -> None:
        pushes.append(listing.exists())
        if len(pushes) == 2:
            raise versioning.StageFailed("no answer")

    monkeypatch.setattr(versioning, "_push", push_fails_the_second_time)
    with pytest.raises(versioning.StageFailed, match="no answer"):
        versioning.push(project, NAME, on_line=lambda _: None, stop=threading.Event())
    assert pushes == [True, False]
    assert listing.read_bytes() == before


@pytest.mark.parametrize("file", OURS)
def test_a_flipped_bit_is_refused_by_the_damaged_files_name(pushed: Pushed, file: str) -> None:
    project, first, _ = pushed
    clone = clone_of(project)
    flip(stored(project, first, file))
    said = refusal(clone, f"{NAME}@champion")
    assert "no whole copy" in said
    assert f"{stored(project, first, file)} is damaged" in said or file == MANIFEST


def test_a_damaged_copy_gives_way_to_a_trainings_own(pushed: Pushed) -> None:
    project, first, _ = pushed
    with lease.holding(project, NAME) as held_lease:
        assert mirror.Mirror.of(project, NAME, held_lease).copy_new()
    flip(stored(project, first, OPTIMIZER))
    back = restore(clone_of(project), f"{NAME}@champion")
    assert bytes_of(back.checkpoint.path) == bytes_of(first.path)
    assert back.source is not None
    assert "/token_" in back.source


def test_what_is_gone_from_the_storage_is_one_line(pushed: Pushed) -> None:
    project, first, _ = pushed
    clone = clone_of(project)
    stored(project, first, MODEL).unlink()
    assert "no whole copy" in refusal(clone, f"{NAME}@champion")
    note_of(project, first).unlink()
    said = refusal(clone, f"{NAME}@champion")
    assert f"gpt2 sync {NAME}" in said
    assert "storage.base_folder" in said


HOSTILE: list[Any] = [
    {"md5": dict.fromkeys(OURS, "../../../../params.yaml")},
    {"md5": dict.fromkeys(OURS, "/etc/passwd")},
    {"md5": dict.fromkeys(OURS, 1)},
    {"md5": {"../evil": "0" * 32}},
    {"md5": []},
    ["not", "a", "note"],
    "[" * 9_000,
    "",
]


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_a_note_that_leads_elsewhere_is_not_believed(pushed: Pushed, hostile: Any) -> None:
    project, first, _ = pushed
    clone = clone_of(project)
    note_of(project, first).write_text(hostile if isinstance(hostile, str) else json.dumps(hostile))
    everything = sorted(project.root.parent.rglob("*"))
    assert "does not hold it" in refusal(clone, f"{NAME}@champion")
    made = {path.relative_to(clone.root).parts[0] for path in sorted(project.root.parent.rglob("*")) if path not in everything}
    assert made <= {"runs"}


@pytest.mark.parametrize("name", ["../../../evil", "/tmp/evil", "step_00000010/../../evil", "step_00000099", 7, None])
def test_where_it_goes_is_not_the_notes_to_say(pushed: Pushed, name: Any) -> None:
    project, first, _ = pushed
    note = note_of(project, first)
    note.write_text(
        json.dumps({**json.loads(note.read_text()), "checkpoint": name, "md5": {**json.loads(note.read_text())["md5"], "../x": ""}})
    )
    clone = clone_of(project)
    back = restore(clone, f"{NAME}@champion")
    assert back.checkpoint.path == restored_in(clone) / "step_00000010"
    assert sorted(path.name for path in back.checkpoint.path.iterdir()) == OURS


def test_a_note_of_any_length_takes_no_memory(pushed: Pushed) -> None:
    project, first, _ = pushed
    note = note_of(project, first)
    note.write_text(" " * 100_000 + note.read_text())
    assert "does not hold it" in refusal(clone_of(project), f"{NAME}@champion")


def test_a_note_that_leads_to_another_checkpoint_is_refused(pushed: Pushed) -> None:
    project, first, second = pushed
    note_of(project, first).write_bytes(note_of(project, second).read_bytes())
    assert "another checkpoint" in refusal(clone_of(project), f"{NAME}@champion")


def test_a_list_of_files_that_leads_out_of_the_run_is_not_noted(project: Project) -> None:
    checkpoint = write_checkpoint(project, 10)
    push_by_hand(project, checkpoint)
    (listing,) = (project.root / "storage" / "dvc").rglob("*.dir")
    honest = json.loads(listing.read_text())
    for hostile in ("../../../{}", "../{}", "/{}", "{}/../x"):
        write_list(project, [{**entry, "relpath": hostile.format(entry["relpath"])} for entry in honest])
        assert note_pushed(project, NAME) == []
    assert sorted(path.name for path in project.root.iterdir()) == ["dvc.lock", "dvc.yaml", "params.yaml", "runs", "storage"]


def test_a_run_of_another_configuration_gets_nothing_among_its_checkpoints(pushed: Pushed) -> None:
    project, first, second = pushed
    shutil.rmtree(project.run_folder(NAME).checkpoints)
    write_config(project, learning_rate=0.5)
    own = write_checkpoint(project, 10)
    for what, checkpoint in ((f"{NAME}@champion", first), (f"{NAME}/2", second)):
        back = restore(project, what)
        assert back.checkpoint.path == project.run_folder(NAME).aside / "restored" / checkpoint.name
        assert back.checkpoint.digest == checkpoint.digest
    assert CheckpointStore(project.run_folder(NAME).checkpoints).checkpoints() == [own]


def test_a_whole_checkpoint_of_the_run_gives_way_to_none(pushed: Pushed) -> None:
    project, first, second = pushed
    shutil.rmtree(first.path)
    own = other_than(project, first)
    back = restore(project, f"{NAME}@champion")
    assert back.checkpoint.path == project.run_folder(NAME).aside / "restored" / first.name
    assert CheckpointStore(project.run_folder(NAME).checkpoints).checkpoints() == [own, second]


def test_a_run_that_is_being_trained_is_left_alone(pushed: Pushed) -> None:
    project, first, second = pushed
    registered(project, first, second)
    shutil.rmtree(first.path)
    with held(project.run_folder(NAME).lock, "it"):
        assert restore(project, f"{NAME}@champion").checkpoint.path.parent.name == "restored"
    shutil.rmtree(project.run_folder(NAME).aside)
    assert restore(project, f"{NAME}@champion").checkpoint.path == first.path


def test_what_training_would_go_on_from_goes_beside_the_run(pushed: Pushed) -> None:
    """A run that went back to its first one, and one that knows nothing of it."""
    project, first, second = pushed
    registered(project, first, second)
    shutil.rmtree(second.path)
    assert restore(project, f"{NAME}/2").checkpoint.path == restored_in(project) / second.name
    registered(project, second)
    write_checkpoint(project, 30)
    shutil.rmtree(first.path)
    assert restore(project, f"{NAME}/1").checkpoint.path == restored_in(project) / first.name
    assert CheckpointStore(project.run_folder(NAME).checkpoints).checkpoints()[-1].step == 30


def test_a_champion_that_was_restored_beside_the_run_is_used(pushed: Pushed, monkeypatch: pytest.MonkeyPatch) -> None:
    project, first, second = pushed
    project.run_folder(NAME).scores.write_text(json.dumps({"champion": {"digest": first.digest}}))
    shutil.rmtree(first.path)
    with pytest.raises(UserError, match=f"gpt2 restore {NAME}@champion"):
        pick_checkpoint(project, NAME)
    back = restore(project, f"{NAME}@champion").checkpoint
    assert back.path.parent == restored_in(project)
    assert pick_checkpoint(project, NAME) == back
    damaged = project.run_folder(NAME).aside / "damaged" / second.name
    shutil.copytree(second.path, damaged)
    flip(damaged / MODEL)
    monkeypatch.chdir(project.root)
    assert find(f"models:/{NAME}/2") == second, "not the one that gave way to it"
    assert find(f"models:/{NAME}@champion") == back


def test_a_damaged_one_in_its_place_is_set_aside_and_replaced(pushed: Pushed) -> None:
    project, first, _ = pushed
    before = bytes_of(first.path)
    flip(first.path / MODEL)
    back = restore(project, f"{NAME}@champion")
    assert back.checkpoint.path == first.path
    assert bytes_of(first.path) == before
    assert (project.run_folder(NAME).aside / "damaged" / first.name).is_dir()


def test_what_a_killed_one_left_behind_goes(pushed: Pushed) -> None:
    project, _, _ = pushed
    clone = clone_of(project)
    left = clone.run_folder(NAME).path / ".restore.999999999.partial"
    left.mkdir(parents=True)
    restore(clone, f"{NAME}@champion")
    assert not left.exists()


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (NAME, f"{NAME}@champion"),
        (f"{NAME}@", f"{NAME}@champion"),
        (f"{NAME}/9", f"{NAME}/9: "),
        (f"{NAME}/x", f"{NAME}/x: "),
        (f"{NAME}@nobody", "nobody not found"),
        (f"{NAME}@../../x", "alias"),
        ("nothing@champion", "no experiment 'nothing'"),
        ("../x@champion", "is not a name"),
        ("", "is not a name"),
    ],
)
def test_what_is_no_registered_version_is_one_line(pushed: Pushed, what: str, said: str) -> None:
    assert said in refusal(pushed[0], what)


def test_a_registry_that_is_not_there_is_not_made(new_project: Project) -> None:
    said = refusal(new_project, f"{NAME}@champion")
    assert "MLFLOW_TRACKING_URI" in said
    assert "storage.base_folder" in said
    assert not (new_project.root / "storage").exists()


def test_a_version_without_a_digest_is_nobodys_checkpoint(project: Project) -> None:
    client = tracking.connect(project, project.experiment(NAME))
    client.create_registered_model(NAME)
    client.create_model_version(NAME, "somewhere")
    assert "is not a checkpoint of this project" in refusal(project, f"{NAME}/1")
    client.create_model_version(NAME, "somewhere", tags={tracking.DIGEST_TAG: "../../evil"})
    assert "is not a checkpoint of this project" in refusal(project, f"{NAME}/2")


def test_a_base_of_a_post_training_that_is_not_here_is_brought(project: Project) -> None:
    checkpoint, never_pushed = write_checkpoint(project, 10), write_checkpoint(project, 20)
    register(project, checkpoint, never_pushed)
    push_by_hand(project, checkpoint)
    note_pushed(project, NAME)
    clone = clone_of(project)
    base = Base(source=f"models:/{NAME}/1", experiment=NAME, checkpoint=checkpoint.name, digest=checkpoint.digest)
    assert bytes_of(place_of(clone, base)) == bytes_of(checkpoint.path)
    gone = Base(source=f"models:/{NAME}/2", experiment=NAME, checkpoint=never_pushed.name, digest=never_pushed.digest)
    with pytest.raises(UserError, match=r"^post_training\.base: tiny/2: the storage .* does not hold it"):
        place_of(clone, gone)
