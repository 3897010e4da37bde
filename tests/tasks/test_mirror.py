from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
import yaml

from model.checkpoint.store import MANIFEST, MODEL, OPTIMIZER, STATE, Checkpoint, CheckpointStore
from tasks import mirror, tracking
from tasks.mirror import Mirror
from tasks.project import Project
from tests.tasks.conftest import NAME, write_config


@pytest.fixture(params=["folder", "memory://"])
def project(new_project: Project, request: pytest.FixtureRequest) -> Iterator[Project]:
    """A project whose storage is a folder, and one whose storage is a URL."""
    base = str(new_project.root.parent / "disk") if request.param == "folder" else f"memory://bucket-{os.getpid()}"
    params = yaml.safe_load((new_project.root / "params.yaml").read_text())
    params["defaults"]["storage"] = {"base_folder": base}
    (new_project.root / "params.yaml").write_text(yaml.safe_dump(params))
    (new_project.root.parent / "disk").mkdir()
    yield new_project
    fsspec.filesystem("memory").store.clear()


def digest(project: Project) -> str:
    return tracking.read_config(project.run_folder(NAME)).digest


def seal(project: Project, step: int, config_digest: str | None = None) -> Checkpoint:
    state = json.dumps({"step": step, "config_digest": config_digest or digest(project)}).encode()
    contents = {MODEL: os.urandom(1000), OPTIMIZER: os.urandom(2000), STATE: state}
    writers: dict[str, Callable[[Path], None]] = {}
    for name, content in contents.items():
        writers[name] = lambda path, content=content: path.write_bytes(content) and None  # type: ignore[misc]
    folder = project.run_folder(NAME)
    folder.journal.write_text(f'{{"seq": {step}}}\n')
    return CheckpointStore(folder.checkpoints).write(step, writers)


def another_machine(project: Project) -> None:
    """All that a fresh machine has is what build-config makes anew."""
    shutil.rmtree(project.run_folder(NAME).checkpoints)
    project.run_folder(NAME).journal.unlink()


def test_what_is_sealed_comes_back_bit_for_bit_where_there_is_none(project: Project) -> None:
    first, second = seal(project, 10), seal(project, 20)
    contents = {name: (second.path / name).read_bytes() for name in (MODEL, OPTIMIZER, STATE, MANIFEST)}
    journal = project.run_folder(NAME).journal.read_text()
    assert Mirror.of(project, NAME).copy_new() == [first.name, second.name]
    another_machine(project)
    back = mirror.bring_back(project, NAME)
    assert back is not None
    assert (back.name, back.digest) == (second.name, second.digest)
    assert {name: (back.path / name).read_bytes() for name in contents} == contents
    assert project.run_folder(NAME).journal.read_text() == journal
    assert [path.name for path in project.run_folder(NAME).checkpoints.iterdir()] == [second.name]


def test_only_what_is_new_is_copied_and_what_is_dropped_here_is_dropped_there(project: Project) -> None:
    first = seal(project, 10)
    kept = Mirror.of(project, NAME)
    kept.copy_new()
    seal(project, 20)
    CheckpointStore(project.run_folder(NAME).checkpoints).retain(["step_00000020"])
    assert kept.copy_new() == ["step_00000020"]
    assert Mirror.of(project, NAME).copy_new() == []  # a later process finds them there
    fs, root = fsspec.url_to_fs(kept.url)
    assert not fs.exists(f"{root}/{first.name}")
    assert fs.exists(f"{root}/step_00000020/{MANIFEST}")


def test_a_copy_that_was_cut_short_is_passed_over_and_made_again(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    seal(project, 10)
    newer = seal(project, 20)
    kept = Mirror.of(project, NAME)
    kept.copy_new()
    fs, root = fsspec.url_to_fs(kept.url)
    fs.rm_file(f"{root}/{newer.name}/{MANIFEST}")  # the manifest comes last
    assert Mirror.of(project, NAME).copy_new() == [newer.name]
    fs.rm_file(f"{root}/{newer.name}/{MANIFEST}")
    another_machine(project)
    back = mirror.bring_back(project, NAME)
    assert back is not None
    assert back.name == "step_00000010"
    assert newer.name in capsys.readouterr().err


def test_a_rotten_copy_is_passed_over(project: Project) -> None:
    seal(project, 10)
    newer = seal(project, 20)
    kept = Mirror.of(project, NAME)
    kept.copy_new()
    fs, root = fsspec.url_to_fs(kept.url)
    content = bytearray(fs.cat_file(f"{root}/{newer.name}/{MODEL}"))
    content[500] ^= 1
    fs.pipe_file(f"{root}/{newer.name}/{MODEL}", bytes(content))
    another_machine(project)
    back = mirror.bring_back(project, NAME)
    assert back is not None
    assert back.name == "step_00000010"


def test_a_machine_that_has_a_checkpoint_keeps_its_own(project: Project) -> None:
    seal(project, 20)
    Mirror.of(project, NAME).copy_new()
    another_machine(project)
    own = seal(project, 10)
    assert mirror.bring_back(project, NAME) is None
    assert CheckpointStore(project.run_folder(NAME).checkpoints).checkpoints() == [own]


def test_another_configurations_checkpoints_are_neither_copied_nor_brought_back(project: Project) -> None:
    seal(project, 10)
    kept = Mirror.of(project, NAME)
    kept.copy_new()
    write_config(project, learning_rate=0.5)
    other = Mirror.of(project, NAME)
    assert other.url != kept.url
    assert other.copy_new() == []
    another_machine(project)
    assert mirror.bring_back(project, NAME) is None


def test_once_pushed_the_copies_go(project: Project) -> None:
    seal(project, 10)
    kept = Mirror.of(project, NAME)
    kept.copy_new()
    mirror.prune(project, NAME)
    mirror.prune(project, NAME)
    fs, root = fsspec.url_to_fs(kept.url)
    assert not fs.exists(root)


def test_while_a_training_runs_its_checkpoints_are_copied(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "SECONDS_BETWEEN_LOOKS", 0.05)
    with mirror.mirroring(project, NAME):
        sealed = seal(project, 10)
    another_machine(project)
    back = mirror.bring_back(project, NAME)
    assert back is not None
    assert back.digest == sealed.digest


def test_a_storage_that_is_gone_is_told_of_and_stops_nothing(
    new_project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "SECONDS_BETWEEN_LOOKS", 0.05)
    (new_project.root / "storage").write_text("a file where the folder should be")
    assert mirror.bring_back(new_project, NAME) is None
    with mirror.mirroring(new_project, NAME):
        seal(new_project, 10)
    assert "training goes on" in capsys.readouterr().err
