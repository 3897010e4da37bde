"""Files that rotted, were cut, emptied or lost: never trained on. An older checkpoint takes over and it is said, or training is refused."""

import random
import shutil
import signal

import pytest

from model.checkpoint.store import CheckpointStore
from model.run_folder import RunFolder
from model.training.journal import read_all
from tests.faults.conftest import consumed, said, wait_for_event, warnings
from tests.model.training.conftest import final

pytestmark = pytest.mark.slow

DAMAGES = ["empty", "short by a byte", "cut in half", "missing", "one bit flipped"]
OF_A_CHECKPOINT = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
every_damage = pytest.mark.parametrize("damage", DAMAGES)


def do(damage, path, upto=None):
    """Damage a file; a flipped bit is at a random place among the first `upto` bytes."""
    data = bytearray(path.read_bytes())
    assert len(data) > 8
    if damage == "missing":
        return path.unlink()
    if damage == "one bit flipped":
        place = random.Random(f"{path.name} {len(data)}").randrange((upto or len(data)) * 8)
        data[place // 8] ^= 1 << place % 8
    path.write_bytes({"empty": b"", "short by a byte": data[:-1], "cut in half": data[: len(data) // 2]}.get(damage, data))
    return None


def check_warned(folder, name):
    told = [event["message"] for event in warnings(folder)]
    assert any(name in message for message in told), f"no warning names {name}: {told}"
    assert any(line.startswith("warning: ") and name in line for line in said(folder).splitlines()), said(folder)


@pytest.fixture(scope="session")
def interrupted(trainer, undisturbed, tmp_path_factory):
    """A run with a token cache that was stopped between two checkpoints, after step 13: it has two regular ones and that of the stop."""
    folder = undisturbed("cache").copy_beginning(tmp_path_factory.mktemp("interrupted") / "run")
    process = trainer.start(folder)
    wait_for_event(folder, process, "step", 13)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75, said(folder)
    return folder


@pytest.fixture
def halfway(interrupted, tmp_path):
    """A copy of it, to do things to."""
    shutil.copytree(interrupted.path, tmp_path / "run")
    shutil.copytree(interrupted.token_caches, tmp_path / ".tokens")
    return RunFolder(tmp_path / "run")


@every_damage
@pytest.mark.parametrize("file", OF_A_CHECKPOINT)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(trainer, undisturbed, halfway, file, damage):
    *_, older, newest = CheckpointStore(halfway.checkpoints).checkpoints()
    do(damage, newest.path / file)
    trainer.train(halfway)
    assert [event["step"] for event in read_all(halfway.journal) if event["event"] == "started"] == [0, older.step]
    check_warned(halfway, f"{newest.name}/{file}")
    assert final(halfway) == final(undisturbed("cache").folder)
    assert consumed(halfway) == consumed(undisturbed("cache").folder)
    for checkpoint in CheckpointStore(halfway.checkpoints).checkpoints():
        checkpoint.verify()


@every_damage
def test_without_a_whole_checkpoint_it_refuses_and_lists_what_it_found(trainer, halfway, damage):
    folders = CheckpointStore(halfway.checkpoints).folders()
    assert len(folders) >= 2
    for number, folder in enumerate(folders):
        do(damage, folder / OF_A_CHECKPOINT[number % len(OF_A_CHECKPOINT)])
    before = {path: path.stat().st_mtime_ns for path in halfway.checkpoints.rglob("*")}
    text = trainer.train(halfway, code=1)
    assert "Traceback" not in text
    (error,) = [line for line in text.splitlines() if line.startswith("error: ")]
    for number, folder in enumerate(folders):
        assert f"{folder.name}/{OF_A_CHECKPOINT[number % len(OF_A_CHECKPOINT)]}" in error
    assert {path: path.stat().st_mtime_ns for path in halfway.checkpoints.rglob("*")} == before
    assert not [event for event in read_all(halfway.journal)[1:] if event["event"] == "started"]


@every_damage
@pytest.mark.parametrize("what", ["the newest", "all"])
def test_every_file_of_a_checkpoint_may_be_damaged_at_once(trainer, undisturbed, halfway, what, damage):
    folders = CheckpointStore(halfway.checkpoints).folders()
    for folder in folders[-1:] if what == "the newest" else folders:
        for file in OF_A_CHECKPOINT:
            do(damage, folder / file)
    text = trainer.train(halfway, code=0 if what == "the newest" else 1)
    if what == "all":
        assert all(folder.name in text for folder in folders)
        assert "Traceback" not in text
    else:
        check_warned(halfway, folders[-1].name)
        assert final(halfway) == final(undisturbed("cache").folder)


@every_damage
def test_a_damaged_journal_costs_no_training(trainer, undisturbed, halfway, damage):
    *_, newest = CheckpointStore(halfway.checkpoints).checkpoints()
    original = halfway.journal.read_bytes()
    do(damage, halfway.journal)
    damaged = halfway.journal.read_bytes() if halfway.journal.exists() else None
    trainer.train(halfway)
    assert final(halfway) == final(undisturbed("cache").folder)
    assert [event["step"] for event in read_all(halfway.journal) if event["event"] == "started"][-1] == newest.step
    sequence = [event["seq"] for event in read_all(halfway.journal)]
    assert sequence == sorted(set(sequence))
    if damage != "short by a byte":  # the end of a line is what a kill tears off, too
        check_warned(halfway, "journal.jsonl")
    if damage == "one bit flipped":
        kept = [path.read_bytes() for path in (halfway.aside / "damaged").glob("journal*")]
        assert kept == [damaged]
        assert damaged != original
        expected = consumed(undisturbed("cache").folder)
        assert len(set(expected) - set(consumed(halfway))) <= 1, "one line's event is lost at most, and nothing is wrong"
        assert set(consumed(halfway)) <= set(expected)


@every_damage
@pytest.mark.parametrize("kind", ["tokens", "index"])
def test_a_damaged_token_cache_changes_nothing(trainer, undisturbed, tmp_path, kind, damage):
    """A second training reads what the first one has tokenized."""
    expected = undisturbed("cache")
    folder = expected.copy_beginning(tmp_path / "run")
    shutil.copytree(expected.folder.token_caches, folder.token_caches)
    (path,) = folder.token_caches.rglob(f"lane_000.{kind}")
    first_record = len(path.with_suffix(".index").read_bytes().splitlines()[0])  # shorter than the tokens of a block
    do(damage, path, upto=first_record)
    trainer.train(folder)
    assert final(folder) == final(expected.folder)
    assert consumed(folder) == consumed(expected.folder)
    check_warned(folder, path.name)
    trainer.train(undisturbed("cache").copy_beginning(tmp_path / "again"))
    again = RunFolder(tmp_path / "again")
    assert final(again) == final(expected.folder)
    assert [event["message"] for event in warnings(again)] == [], "what was damaged was made anew"


@every_damage
def test_damaged_validation_windows_are_made_again(trainer, undisturbed, tmp_path, damage):
    expected = undisturbed("plain")
    folder = expected.copy_beginning(tmp_path / "run")
    shutil.copy(expected.folder.validation_windows, folder.path)
    do(damage, folder.validation_windows)
    trainer.train(folder)
    expected.check_equal(folder)
    losses = [
        [(event["step"], event["loss"]) for event in read_all(run.journal) if event["event"] == "validation"]
        for run in (folder, expected.folder)
    ]
    assert losses[0] == losses[1]
    if damage != "missing":  # a cache that was never made is no fault
        check_warned(folder, folder.validation_windows.name)


@every_damage
def test_a_damaged_dataset_manifest_is_refused_and_named(trainer, halfway, damage):
    before = {path: path.stat().st_mtime_ns for path in halfway.checkpoints.rglob("*")}
    do(damage, halfway.dataset)
    text = trainer.train(halfway, code=2)
    assert text.startswith("error: ")
    assert "dataset.json" in text
    assert len(text.splitlines()) == 1
    assert {path: path.stat().st_mtime_ns for path in halfway.checkpoints.rglob("*")} == before


def test_no_flipped_bit_of_a_dataset_manifest_goes_unseen(trainer, halfway):
    """Not only in what identifies the data: a file's place, a count, the very white space."""
    data = halfway.dataset.read_bytes()
    rng = random.Random(3)
    for _ in range(12):
        place = rng.randrange(len(data) * 8)
        rotten = bytearray(data)
        rotten[place // 8] ^= 1 << place % 8
        halfway.dataset.write_bytes(rotten)
        assert "dataset.json" in trainer.train(halfway, code=2)
