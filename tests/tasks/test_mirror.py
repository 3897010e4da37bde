from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import yaml
from safetensors.numpy import save

from model.checkpoint.store import MANIFEST, MODEL, OPTIMIZER, STATE, Checkpoint, CheckpointStore
from model.errors import UserError
from model.training.journal import Journal
from model.training.lock import held
from tasks import lease, mirror, tracking
from tasks.lease import Lease, NotOurs, entries, open_place, tokens
from tasks.mirror import Mirror
from tasks.project import Project
from tasks.pushed import note_pushed, object_path, storage_of
from tests.tasks.conftest import NAME, write_config


@pytest.fixture(params=["folder", "memory://"])
def project(new_project: Project, request: pytest.FixtureRequest) -> Iterator[Project]:
    """A project whose storage is a folder, and one whose storage is a URL."""
    base = str(new_project.root.parent / "disk") if request.param == "folder" else f"memory://bucket-{uuid.uuid4().hex}"
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
    folder = project.run_folder(NAME)
    folder.journal.write_text(f'{{"seq": {step}, "event": "step", "step": {step}}}\n')
    return CheckpointStore(folder.checkpoints).write(step, {MODEL: [tensors(250)], OPTIMIZER: [tensors(500)], STATE: [state]})


def tensors(count: int) -> bytes:
    return save({"some": np.random.default_rng().random(count, dtype=np.float32)})


def mirror_of(project: Project) -> Mirror:
    """With the lease, as a stage has it that starts now. Earlier stages have ended."""
    end_stages(project)
    held = Lease.of(project, NAME)
    held.take()
    return Mirror.of(project, NAME, held)


def end_stages(project: Project, name: str = NAME) -> None:
    fs, root = open_place(lease.place(project, name)[0])
    for token in tokens(fs, root):
        fs.pipe_file(f"{root}/heartbeat_{token:08d}.json", b'{"released": true}')


def told(project: Project, *events: Checkpoint | int) -> None:
    """The journal tells of checkpoints that were sealed, and of starts at steps."""
    journal = Journal(project.run_folder(NAME).journal)
    for event in events:
        if isinstance(event, int):
            journal.append("started", step=event, config_digest=digest(project))
        else:
            journal.append("checkpoint", step=event.step, name=event.name, digest=event.digest)
    journal.close()


def push(project: Project, name: str = NAME) -> list[str]:
    """What `dvc commit` and `dvc push` leave in dvc.lock and in the storage, noted."""
    end_stages(project, name)
    folder = project.run_folder(name)
    fs, root = open_place(storage_of(project, name))

    def store(content: bytes, suffix: str = "") -> str:
        md5 = hashlib.md5(content).hexdigest() + suffix
        fs.makedirs(object_path(root, md5).rpartition("/")[0], exist_ok=True)
        fs.pipe_file(object_path(root, md5), content)
        return md5

    files = sorted(path for path in folder.checkpoints.rglob("*") if path.is_file())
    listed = [{"md5": store(path.read_bytes()), "relpath": path.relative_to(folder.checkpoints).as_posix()} for path in files]
    md5s = {folder.checkpoints: store(json.dumps(listed).encode(), ".dir"), folder.journal: store(folder.journal.read_bytes())}
    outs = [{"path": path.relative_to(project.root).as_posix(), "md5": md5} for path, md5 in md5s.items()]
    (project.root / "dvc.lock").write_text(yaml.safe_dump({"stages": {f"train@{name}": {"outs": outs}}}))
    return note_pushed(project, name)


def names(project: Project) -> list[str]:
    return [path.name for path in CheckpointStore(project.run_folder(NAME).checkpoints).folders()]


def own_place(kept: Mirror) -> tuple[Any, str]:
    assert kept.lease is not None
    fs, root = open_place(kept.url)
    return fs, f"{root}/token_{kept.lease.token:08d}"


def another_machine(project: Project) -> None:
    """All that a fresh machine has is what build-config makes anew."""
    shutil.rmtree(project.run_folder(NAME).checkpoints)
    project.run_folder(NAME).journal.unlink()


@pytest.fixture
def of_another_host(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setenv("GPT2_HOST", "another")


def test_what_is_sealed_comes_back_bit_for_bit_where_there_is_none(project: Project) -> None:
    first, second = seal(project, 10), seal(project, 20)
    contents = {name: (second.path / name).read_bytes() for name in (MODEL, OPTIMIZER, STATE, MANIFEST)}
    journal = project.run_folder(NAME).journal.read_text()
    assert mirror_of(project).copy_new() == [second.name, first.name]  # the newest first: it is the one that is needed
    another_machine(project)
    back = mirror.bring_back(project, NAME)
    assert back is not None
    assert (back.name, back.digest) == (second.name, second.digest)
    assert {name: (back.path / name).read_bytes() for name in contents} == contents
    assert project.run_folder(NAME).journal.read_text() == journal
    assert {path.name for path in project.run_folder(NAME).checkpoints.iterdir()} == {first.name, second.name}


def test_who_begins_anew_gets_nothing_back_and_nothing_is_lost(project: Project) -> None:
    seal(project, 10)
    kept = mirror_of(project)
    kept.copy_new()
    another_machine(project)
    mirror.set_aside(project, NAME)
    assert mirror.bring_back(project, NAME) is None
    fs, root = open_place(kept.url)
    (aside,) = (name for name in entries(fs, root) if name.startswith("aside_"))
    assert fs.exists(f"{root}/{aside}/step_00000010/{MANIFEST}")
    seal(project, 10)
    mirror_of(project).copy_new()
    push(project)
    mirror.prune(project, NAME)
    assert entries(fs, root) == [aside]
    assert fs.exists(f"{root}/{aside}/step_00000010/{MANIFEST}")


def test_only_what_is_new_is_copied_and_what_is_dropped_here_is_dropped_there(project: Project) -> None:
    first = seal(project, 10)
    kept = mirror_of(project)
    assert kept.copy_new() == [first.name]
    seal(project, 20)
    CheckpointStore(project.run_folder(NAME).checkpoints).retain(["step_00000020"])
    assert kept.copy_new() == ["step_00000020"]
    assert kept.copy_new() == []
    fs, folder = own_place(kept)
    assert not fs.exists(f"{folder}/{first.name}")
    assert fs.exists(f"{folder}/step_00000020/{MANIFEST}")


def test_a_copy_is_not_dropped_before_there_is_a_newer_one(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    first = seal(project, 10)
    kept = mirror_of(project)
    kept.copy_new()
    seal(project, 20)
    CheckpointStore(project.run_folder(NAME).checkpoints).retain(["step_00000020"])

    def no_answer() -> None:
        raise ConnectionError("no answer")

    assert kept.lease is not None
    monkeypatch.setattr(kept.lease, "check", no_answer)
    with pytest.raises(ConnectionError):
        kept.copy_new()
    fs, folder = own_place(kept)
    assert fs.exists(f"{folder}/{first.name}/{MANIFEST}")


def test_what_is_dropped_while_it_is_copied_is_no_fault(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    seal(project, 10)
    doomed = seal(project, 20)
    kept = mirror_of(project)
    assert kept.lease is not None
    check = kept.lease.check

    def drop_then_check() -> None:
        shutil.rmtree(doomed.path, ignore_errors=True)
        check()

    monkeypatch.setattr(kept.lease, "check", drop_then_check)
    assert kept.copy_new() == ["step_00000010"]
    fs, folder = own_place(kept)
    assert entries(fs, folder) == ["journal.jsonl", "step_00000010"]


def test_the_manifest_comes_last(project: Project) -> None:
    seal(project, 10)
    newer = seal(project, 20)
    kept = mirror_of(project)
    kept.copy_new()
    fs, folder = own_place(kept)
    fs.rm_file(f"{folder}/{newer.name}/{MANIFEST}")  # as if cut short
    another_machine(project)
    back = mirror.bring_back(project, NAME)
    assert back is not None
    assert back.name == "step_00000010"
    assert names(project) == [back.name]


def test_a_rotten_copy_is_passed_over(project: Project) -> None:
    seal(project, 10)
    newer = seal(project, 20)
    kept = mirror_of(project)
    kept.copy_new()
    fs, folder = own_place(kept)
    content = bytearray(fs.cat_file(f"{folder}/{newer.name}/{MODEL}"))
    content[500] ^= 1
    fs.pipe_file(f"{folder}/{newer.name}/{MODEL}", bytes(content))
    another_machine(project)
    back = mirror.bring_back(project, NAME)
    assert back is not None
    assert back.name == "step_00000010"


def test_a_later_holders_copies_come_first_and_replace_the_older_ones(project: Project) -> None:
    seal(project, 10)
    older = mirror_of(project)
    older.copy_new()
    another_machine(project)
    newer = mirror_of(project)
    back = mirror.bring_back(project, NAME)  # the newer has none of its own yet
    assert back is not None
    assert back.name == "step_00000010"
    seal(project, 20)
    assert newer.copy_new() == ["step_00000020", "step_00000010"]
    fs, root = open_place(newer.url)
    assert entries(fs, root) == ["heartbeat_00000002.json", "lease_00000002.json", "token_00000002"]
    with pytest.raises(NotOurs, match="was taken over by process"):
        older.copy_new()


def test_one_that_was_taken_over_in_the_middle_of_a_copy_seals_nothing(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    seal(project, 10)
    older = mirror_of(project)
    assert older.lease is not None
    check, calls = older.lease.check, 0

    def taken_over_before_the_second_check() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            mirror_of(project)
        check()

    monkeypatch.setattr(older.lease, "check", taken_over_before_the_second_check)
    with pytest.raises(NotOurs):
        older.copy_new()
    fs, folder = own_place(older)
    assert MODEL in entries(fs, f"{folder}/step_00000010")
    assert MANIFEST not in entries(fs, f"{folder}/step_00000010")


def test_a_machine_that_has_come_further_keeps_its_own(project: Project, of_another_host: Callable[[], None]) -> None:
    seal(project, 10)
    mirror_of(project).copy_new()
    another_machine(project)
    own = seal(project, 20)
    of_another_host()
    assert mirror.bring_back(project, NAME) is None
    assert CheckpointStore(project.run_folder(NAME).checkpoints).checkpoints() == [own]


def test_a_machine_that_has_not_come_as_far_takes_the_newer(project: Project, of_another_host: Callable[[], None]) -> None:
    """It trained first, then another one went on. Its own journal is kept aside."""
    seal(project, 20)
    mirror_of(project).copy_new()
    there = project.run_folder(NAME).journal.read_text()
    another_machine(project)
    seal(project, 10)
    here = project.run_folder(NAME).journal.read_text()
    of_another_host()
    back = mirror.bring_back(project, NAME)
    assert back is not None
    assert back.name == "step_00000020"
    folder = project.run_folder(NAME)
    assert [checkpoint.step for checkpoint in CheckpointStore(folder.checkpoints).checkpoints()] == [10, 20]
    assert folder.journal.read_text() == there
    assert [path.read_text() for path in folder.aside.rglob("journal*.jsonl")] == [here]


def test_who_went_back_on_purpose_is_not_brought_forward_again(project: Project) -> None:
    """The copies are of this very folder: what lies in it counts."""
    own = seal(project, 10)
    seal(project, 20)
    mirror_of(project).copy_new()
    CheckpointStore(project.run_folder(NAME).checkpoints).retain([own.name])
    assert mirror.bring_back(project, NAME) is None
    later = mirror_of(project)
    assert later.copy_new() == [own.name]
    fs, root = open_place(later.url)
    assert "token_00000001" not in entries(fs, root)


def test_what_another_machine_had_further_is_not_removed(
    project: Project, monkeypatch: pytest.MonkeyPatch, of_another_host: Callable[[], None]
) -> None:
    """The storage answered when the lease was taken, and not when the copies were asked for: training began anew."""
    seal(project, 20)
    mirror_of(project).copy_new()
    another_machine(project)
    of_another_host()
    kept = mirror_of(project)
    seal(project, 10)
    kept.copy_new()
    fs, root = open_place(kept.url)
    assert {"token_00000001", "token_00000002"} <= set(entries(fs, root))
    seal(project, 20)
    kept.copy_new()
    assert "token_00000001" not in entries(fs, root)


def test_a_checkpoint_whose_state_is_damaged_keeps_no_other_from_being_copied(project: Project) -> None:
    damaged, whole = seal(project, 10), seal(project, 20)
    state = damaged.path / STATE
    state.write_bytes(state.read_bytes().replace(b"10", b"1x"))
    assert mirror_of(project).copy_new() == [whole.name]


def test_half_a_copy_of_another_machine_keeps_nothing(project: Project, of_another_host: Callable[[], None]) -> None:
    """It was paused while it copied an older one after its newest."""
    older, newest = seal(project, 10), seal(project, 20)
    paused = mirror_of(project)
    assert paused._copy(newest)
    fs, folder = own_place(paused)
    fs.makedirs(f"{folder}/{older.name}", exist_ok=True)
    fs.put_file(str(older.path / MODEL), f"{folder}/{older.name}/{MODEL}")
    another_machine(project)
    of_another_host()
    kept = mirror_of(project)
    assert mirror.bring_back(project, NAME) is not None
    assert kept.copy_new() == [newest.name]
    fs, root = open_place(kept.url)
    assert "token_00000001" not in entries(fs, root)


def test_a_damaged_checkpoint_here_makes_room_for_its_copy(project: Project) -> None:
    good = seal(project, 20)
    mirror_of(project).copy_new()
    (good.path / MANIFEST).unlink()
    back = mirror.bring_back(project, NAME)
    assert back is not None
    assert back.digest == good.digest
    assert [path.name for path in (project.run_folder(NAME).aside / "damaged").iterdir()] == [good.name]


def test_while_a_trainer_runs_here_nothing_is_brought_back(project: Project) -> None:
    seal(project, 20)
    mirror_of(project).copy_new()
    another_machine(project)
    with held(project.run_folder(NAME).lock, "the run"), pytest.raises(UserError, match="in use by another trainer"):
        mirror.bring_back(project, NAME)


def test_another_configurations_checkpoints_are_neither_copied_nor_brought_back(project: Project) -> None:
    seal(project, 10)
    kept = mirror_of(project)
    kept.copy_new()
    write_config(project, learning_rate=0.5)
    other = mirror_of(project)
    assert other.url != kept.url
    assert other.copy_new() == []
    another_machine(project)
    assert mirror.bring_back(project, NAME) is None


def test_once_pushed_the_copies_and_the_lease_go(project: Project) -> None:
    seal(project, 10)
    kept = mirror_of(project)
    kept.copy_new()
    push(project)
    mirror.prune(project, NAME)
    mirror.prune(project, NAME)
    fs, root = open_place(kept.url)
    assert not fs.exists(root)


def test_what_is_not_pushed_is_not_removed(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    seal(project, 10)
    push(project)
    second = seal(project, 20)
    kept = mirror_of(project)
    kept.copy_new()
    end_stages(project)
    mirror.prune(project, NAME)
    fs, root = open_place(kept.url)
    assert entries(fs, root) == ["heartbeat_00000001.json", "lease_00000001.json", "token_00000001"]
    assert [name for name in entries(fs, f"{root}/token_00000001") if "step" in name] == [second.name]
    assert f"{second.name} in" in capsys.readouterr().err
    assert not (project.run_folder(NAME).path / ".lease.json").exists()


def test_a_training_that_goes_on_elsewhere_keeps_its_lease_and_its_copies(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "TTL_S", 1.0)
    seal(project, 10)
    push(project)
    with lease.holding(project, NAME) as held:
        Mirror.of(project, NAME, held).copy_new()
        fs, root = open_place(held.url)
        before = entries(fs, root)
        mirror.prune(project, NAME)
        assert entries(fs, root) == before
        assert fs.exists(f"{root}/token_00000001/step_00000010/{MANIFEST}")
        held.check()


def test_a_clone_gets_what_was_pushed_when_the_copies_are_gone(project: Project) -> None:
    sealed = [seal(project, 10), seal(project, 20)]
    contents = {path.name: path.read_bytes() for path in sealed[1].path.iterdir()}
    folder = project.run_folder(NAME)
    folder.journal.unlink()
    told(project, 0, *sealed)
    journal = folder.journal.read_bytes()
    assert push(project) == [each.name for each in sealed]
    another_machine(project)
    (project.root / "dvc.lock").unlink()
    back = mirror.bring_back(project, NAME)
    assert back is not None
    assert back.digest == sealed[1].digest
    assert {path.name: path.read_bytes() for path in back.path.iterdir()} == contents
    assert [each.digest for each in CheckpointStore(folder.checkpoints).checkpoints()] == [each.digest for each in sealed]
    assert folder.journal.read_bytes() == journal
    assert mirror.bring_back(project, NAME) is None
    shutil.rmtree(sealed[0].path)  # a kill came in between
    assert mirror.bring_back(project, NAME) is not None
    assert names(project) == [each.name for each in sealed]


def test_nobody_goes_on_with_what_was_pushed_before_one_began_anew(project: Project) -> None:
    seal(project, 10)
    push(project)
    another_machine(project)
    mirror.set_aside(project, NAME)
    assert mirror.bring_back(project, NAME) is None
    later = seal(project, 10)
    push(project)
    another_machine(project)
    back = mirror.bring_back(project, NAME)
    assert back is not None
    assert back.digest == later.digest


def test_behind_what_was_pushed_one_may_go_back(project: Project) -> None:
    folder = project.run_folder(NAME)
    first, second = seal(project, 10), seal(project, 20)
    folder.journal.unlink()
    told(project, 0, first, second)
    push(project)
    shutil.rmtree(second.path)
    told(project, 10)
    assert mirror.bring_back(project, NAME) is None
    push(project)  # from now on it is what others go on with
    another_machine(project)
    assert mirror.bring_back(project, NAME) is not None
    assert names(project) == [first.name]


def test_a_clone_that_is_behind_takes_nothing_from_the_others(project: Project) -> None:
    seal(project, 10)
    newer = seal(project, 20)
    push(project)
    shutil.rmtree(newer.path)
    push(project)
    another_machine(project)
    back = mirror.bring_back(project, NAME)
    assert back is not None
    assert back.step == 20


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoints": {"../../evil": "0" * 64}},
        {"checkpoints": {"step_00000020": "../../evil"}},
        {"checkpoints": {}},
        {"checkpoints": []},
        {"journal": "../../evil"},
        {"step": 30},
        {"config_digest": "0" * 64},
    ],
)
def test_a_note_of_a_run_that_leads_elsewhere_is_not_believed(project: Project, change: dict[str, Any]) -> None:
    seal(project, 20)
    push(project)
    another_machine(project)
    fs, root = open_place(storage_of(project, NAME))
    path = f"{root}/checkpoints/{NAME}/pushed/run_{digest(project)}.json"
    fs.pipe_file(path, json.dumps({**json.loads(fs.cat_file(path)), **change}).encode())
    assert mirror.bring_back(project, NAME) is None
    assert names(project) == []


def test_a_damaged_journal_or_checkpoint_of_what_was_pushed_is_passed_over(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = seal(project, 10), seal(project, 20)
    push(project)
    fs, root = open_place(storage_of(project, NAME))
    for path in (second.path / MODEL, project.run_folder(NAME).journal):
        fs.pipe_file(object_path(root, hashlib.md5(path.read_bytes()).hexdigest()), b"something else")
    another_machine(project)
    back = mirror.bring_back(project, NAME)
    assert back is not None
    assert back.digest == first.digest
    assert not project.run_folder(NAME).journal.exists()
    said = capsys.readouterr().err
    assert "passed over step_00000020" in said
    assert "passed over the journal" in said


def test_what_a_kill_left_out_comes_later_and_is_not_lost_meanwhile(project: Project, of_another_host: Callable[[], None]) -> None:
    sealed = [seal(project, step) for step in (10, 20, 30)]
    mirror_of(project).copy_new()
    another_machine(project)
    of_another_host()
    assert mirror.bring_back(project, NAME) is not None
    for each in sealed[:2]:
        shutil.rmtree(each.path)
    later = mirror_of(project)
    later.copy_new()
    fs, root = open_place(later.url)
    assert "token_00000001" in entries(fs, root), "it has what never was here"
    fs.rm(f"{root}/token_00000002", recursive=True)
    assert mirror.bring_back(project, NAME) is not None
    assert names(project) == [each.name for each in sealed]


def test_of_an_older_token_comes_what_belongs_to_the_newest(project: Project, of_another_host: Callable[[], None]) -> None:
    """The second holder died when only its newest was copied; the third gets all."""
    folder = project.run_folder(NAME)
    first, second = seal(project, 10), seal(project, 20)
    stray = seal(project, 25)
    first_holder = mirror_of(project)
    first_holder.copy_new()
    third = seal(project, 30)
    folder.journal.unlink()
    told(project, 0, first, second, third)
    second_holder = mirror_of(project)
    second_holder._copy(third)
    another_machine(project)
    of_another_host()
    back = mirror.bring_back(project, NAME)
    assert back is not None
    assert back.digest == third.digest
    assert names(project) == [first.name, second.name, third.name]
    assert stray.name not in names(project), "of a training that was gone back behind"


def test_who_comes_while_another_fetches_waits_and_finds_all_there(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    seal(project, 10)
    seal(project, 20)
    mirror_of(project).copy_new()
    another_machine(project)
    fetch, begun = Mirror._fetch, threading.Event()

    def slowly(*arguments: Any, **options: Any) -> Checkpoint | None:
        begun.set()
        time.sleep(0.3)
        return fetch(*arguments, **options)

    monkeypatch.setattr(Mirror, "_fetch", slowly)
    other = threading.Thread(target=mirror.bring_back, args=(project, NAME))
    other.start()
    begun.wait(10)
    assert mirror.bring_back(project, NAME) is None
    assert names(project) == ["step_00000010", "step_00000020"]
    other.join()


def test_a_lock_that_a_killed_trainer_left_keeps_nobody_out(project: Project) -> None:
    seal(project, 20)
    mirror_of(project).copy_new()
    another_machine(project)
    lock = project.run_folder(NAME).lock
    with held(lock, "the run"):
        told_by = lock.with_suffix(".json").read_text()
    lock.with_suffix(".json").write_text(told_by)  # with our process's number: it was given to another one since
    assert mirror.bring_back(project, NAME) is not None


def test_a_journal_that_is_the_beginning_of_the_one_that_comes_is_not_kept(project: Project, of_another_host: Callable[[], None]) -> None:
    first = seal(project, 10)
    folder = project.run_folder(NAME)
    folder.journal.unlink()
    told(project, 0, first)
    before = folder.journal.read_bytes()
    second = seal(project, 20)
    folder.journal.write_bytes(before)
    told(project, second)
    mirror_of(project).copy_new()
    shutil.rmtree(second.path)
    folder.journal.write_bytes(before)
    of_another_host()
    assert mirror.bring_back(project, NAME) is not None
    assert folder.journal.read_bytes().startswith(before)
    assert len(folder.journal.read_bytes()) > len(before)
    assert not folder.aside.exists()


@pytest.mark.parametrize("finished", [True, False])
def test_a_finished_training_tries_its_last_copy_again(project: Project, monkeypatch: pytest.MonkeyPatch, finished: bool) -> None:
    monkeypatch.setattr(mirror, "SECONDS_BETWEEN_LOOKS", 0.05)
    copy, ended, attempts = Mirror._copy, threading.Event(), []

    def fails_until_the_third_after_the_end(self: Mirror, checkpoint: Checkpoint) -> bool:
        attempts.append(ended.is_set())
        if sum(attempts) <= 2:
            raise ConnectionError("no answer")
        return copy(self, checkpoint)

    monkeypatch.setattr(Mirror, "_copy", fails_until_the_third_after_the_end)
    with lease.holding(project, NAME) as ours, mirror.mirroring(project, NAME, ours, finished=lambda: finished):
        sealed = seal(project, 10)
        ended.set()
    fs, root = open_place(ours.url)
    assert fs.exists(f"{root}/token_00000001/{sealed.name}/{MANIFEST}") == finished


def test_while_a_training_runs_its_checkpoints_are_copied(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "SECONDS_BETWEEN_LOOKS", 0.05)
    with lease.holding(project, NAME) as ours, mirror.mirroring(project, NAME, ours, finished=lambda: False):
        sealed = seal(project, 10)
    another_machine(project)
    back = mirror.bring_back(project, NAME)
    assert back is not None
    assert back.digest == sealed.digest


def test_a_storage_that_is_gone_is_told_of_once_and_caught_up_with_when_it_is_back(
    new_project: Project, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "SECONDS_BETWEEN_LOOKS", 0.05)
    monkeypatch.setattr(mirror, "LONGEST_PAUSE_S", 0.1)
    monkeypatch.setattr(lease, "TTL_S", 0.4)
    storage = new_project.root / "storage"
    storage.write_text("a file where the folder should be")
    assert mirror.bring_back(new_project, NAME) is None
    with lease.holding(new_project, NAME) as ours, mirror.mirroring(new_project, NAME, ours, finished=lambda: False):
        sealed = seal(new_project, 10)
        time.sleep(0.4)
        assert ours.token is None
        storage.unlink()
        copy = Path(ours.url) / "token_00000001" / sealed.name / MANIFEST
        deadline = time.monotonic() + 10
        while not copy.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
    said = capsys.readouterr().err
    assert said.count("no lease") == 2  # by the stage, and by the mirror
    assert said.count("training goes on") == 2
