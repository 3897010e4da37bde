"""Sealed checkpoints: complete, or not there at all."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save

from model.checkpoint.store import (
    FILES,
    MANIFEST,
    MODEL,
    OPTIMIZER,
    STATE,
    CheckpointStore,
    NotWhole,
    name_of,
    open_checkpoint,
    step_of,
)
from model.errors import NoWholeCheckpoint


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints")


def files(content="x"):
    tensors = save({"x": np.frombuffer(content.encode(), np.uint8)})
    return {MODEL: [tensors], OPTIMIZER: [tensors], STATE: [json.dumps({"content": content}).encode()]}


def test_what_is_written_is_there_whole(store):
    checkpoint = store.write(10, files())
    checkpoint.verify()
    assert (checkpoint.name, checkpoint.step) == ("step_00000010", 10)
    assert [c.digest for c in store.checkpoints()] == [checkpoint.digest]
    assert store.newest_whole(pytest.fail) == checkpoint


def test_a_state_is_what_was_written_or_none(store):
    checkpoint = store.write(10, files("first"))
    assert checkpoint.state() == {"content": "first"}
    state = checkpoint.path / STATE
    state.write_bytes(state.read_bytes().replace(b"first", b"fisst"))
    with pytest.raises(NotWhole, match=f"step_00000010/{STATE}: its bytes are not the ones that were written"):
        checkpoint.state()


def test_equal_bytes_have_equal_digests_wherever_they_lie(store, tmp_path):
    other = CheckpointStore(tmp_path / "other")
    assert store.write(10, files()).digest == other.write(10, files()).digest
    assert store.write(20, files("y")).model_sha256 != store.write(30, files("z")).model_sha256


def test_a_sealed_checkpoint_is_never_written_over(store):
    first = store.write(10, files("first"))
    assert store.write(10, files("second")) == first
    first.verify()


def test_a_damaged_one_in_the_way_is_put_aside(store, tmp_path):
    first = store.write(10, files("first"))
    (first.path / FILES[0]).write_text("damaged")
    second = store.write(10, files("second"))
    second.verify()
    assert (tmp_path / "aside" / "damaged" / "step_00000010" / FILES[0]).read_text() == "damaged"


def test_a_write_that_fails_leaves_nothing_that_counts(store):
    def full_disk():
        yield b"half"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        store.write(10, {**files(), OPTIMIZER: full_disk()})
    assert store.checkpoints() == []
    assert list(store.folder.iterdir()) == []
    store.write(10, files()).verify()


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove"])
def test_every_damage_is_found(store, name, damage):
    good = store.write(10, files())
    bad = store.write(20, files())
    path = bad.path / name
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[:-1])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    with pytest.raises(NotWhole, match=r"step_00000020"):
        open_checkpoint(bad.path).verify()
    complaints = []
    assert store.newest_whole(complaints.append) == good
    assert len(complaints) == 1
    assert "step_00000020" in complaints[0]


def test_every_bit_of_the_manifest_counts(store):
    checkpoint = store.write(10, files())
    path = checkpoint.path / "manifest.json"
    content = path.read_bytes()
    for position in range(len(content)):
        for bit in range(8):
            path.write_bytes(content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :])
            with pytest.raises(NotWhole):
                open_checkpoint(checkpoint.path)


def test_another_checkpoint_in_its_place_is_found(store, tmp_path):
    checkpoint = store.write(10, files("ours"))
    other = CheckpointStore(tmp_path / "other").write(10, files("theirs"))
    shutil.copytree(other.path, checkpoint.path, dirs_exist_ok=True)
    open_checkpoint(checkpoint.path).verify()
    with pytest.raises(NotWhole, match="changed since it was opened"):
        checkpoint.verify()


def test_none_whole_is_refused_and_none_at_all_is_none(store):
    assert store.newest_whole(pytest.fail) is None
    for step in (10, 20):
        (store.write(step, files()).path / FILES[0]).unlink()
    with pytest.raises(NoWholeCheckpoint, match=r"step_00000020/.*step_00000010/"):
        store.newest_whole(lambda _: None)


def test_retention_removes_the_others_and_a_sweep_what_a_kill_left(store):
    for step in (10, 20, 30):
        store.write(step, files())
    (store.folder / ".step_00000040.77.partial").mkdir()
    (store.folder / ".step_00000005.doomed").mkdir()
    (store.folder / ".step_00000020.doomed").mkdir()
    assert store.retain(["step_00000030", "step_00000010"]) == ["step_00000020"]
    store.sweep()
    assert sorted(path.name for path in store.folder.iterdir()) == ["step_00000010", "step_00000030"]


def test_names():
    assert step_of(name_of(123)) == 123
    for name in ("step_1", "step_00000001x", "../step_00000001", ".step_00000001"):
        with pytest.raises(ValueError, match="not a checkpoint's name"):
            step_of(name)


def test_what_may_not_be_sealed_is_not_there(store):
    def taken_over():
        raise ValueError("somebody else writes here")

    with pytest.raises(ValueError, match="somebody else"):
        store.write(10, files(), before_sealing=taken_over)
    assert store.folders() == []
    assert list(store.folder.iterdir()) == []


def test_a_checkpoint_from_elsewhere_is_copied_and_keeps_its_digest(store, tmp_path):
    other = CheckpointStore(tmp_path / "other").write(10, files("theirs"))
    assert store.adopt(other).digest == other.digest
    assert store.adopt(other).path.parent == store.folder
    ours = CheckpointStore(tmp_path / "ours" / "checkpoints")
    first = ours.write(10, files("ours"))
    assert ours.adopt(other).digest == other.digest
    assert open_checkpoint(tmp_path / "ours" / "aside" / "replaced" / "step_00000010").digest == first.digest


def test_one_that_rotted_is_not_copied(store, tmp_path):
    other = CheckpointStore(tmp_path / "other").write(10, files())
    content = bytearray((other.path / MODEL).read_bytes())
    content[-1] ^= 1
    (other.path / MODEL).write_bytes(content)
    with pytest.raises(NotWhole, match="not the ones that were written"):
        store.adopt(other)
    assert store.folders() == []


def test_what_is_no_safetensors_file_is_not_whole_whatever_its_manifest_says(store):
    for name in (MODEL, OPTIMIZER):
        checkpoint = store.write(10, {**files(), name: [b"anything else"]})
        with pytest.raises(NotWhole, match=f"step_00000010/{name} is not a safetensors file"):
            checkpoint.verify()
        store.retain([])
    checkpoint = store.write(10, {**files(), STATE: [b"[1, 2]"]})
    with pytest.raises(NotWhole, match="is not the state of a training"):
        checkpoint.verify()
    assert (checkpoint.path / MANIFEST).exists()
