"""What stays: the last k, the best, the newest, and whatever the registry names."""

import json

import numpy as np
import pytest
from safetensors.numpy import save

from model.checkpoint.retention import retain
from model.checkpoint.store import MODEL, OPTIMIZER, STATE, CheckpointStore
from model.config import CheckpointConfig
from model.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


@pytest.fixture
def store(folder):
    return CheckpointStore(folder.checkpoints)


def seal(store, *steps):
    for step in steps:
        tensors = save({"x": np.full(3, step, np.float32)})
        store.write(step, {MODEL: [tensors], OPTIMIZER: [tensors], STATE: [json.dumps({"step": step}).encode()]})
    return {checkpoint.step: checkpoint for checkpoint in store.checkpoints()}


def steps(store):
    return [checkpoint.step for checkpoint in store.checkpoints()]


KEEP_TWO = CheckpointConfig(save_every_n_iterations=10, keep_last=2)


def test_the_last_two_and_the_best(store, folder):
    seal(store, 10, 20, 30, 40, 50)
    retain(store, KEEP_TWO, {10: 3.0, 20: 1.0, 30: 2.0, 40: 1.5, 50: 1.2}, folder)
    assert steps(store) == [20, 40, 50]


def test_an_emergency_save_stays_until_a_regular_one_overtakes_it(store, folder):
    seal(store, 10, 20, 23)
    retain(store, KEEP_TWO, {10: 1.0, 20: 2.0}, folder)
    assert steps(store) == [10, 20, 23]
    seal(store, 30)
    retain(store, KEEP_TWO, {10: 1.0, 20: 2.0, 30: 0.5}, folder)
    assert steps(store) == [20, 30]


def test_whatever_an_alias_names_stays(store, folder):
    sealed = seal(store, 10, 20, 30, 40, 50)
    folder.aliases.write_text(json.dumps({"production": sealed[10].digest, "gone": "0" * 64}))
    folder.scores.write_text(json.dumps({"champion": {"digest": sealed[20].digest}}))
    retain(store, KEEP_TWO, {step: 1 / step for step in sealed}, folder)
    assert steps(store) == [10, 20, 40, 50]
    folder.aliases.write_text("{}")
    folder.scores.write_text(json.dumps({"champion": None}))
    retain(store, KEEP_TWO, {step: 1 / step for step in sealed}, folder)
    assert steps(store) == [40, 50]


def test_what_cannot_be_read_deletes_nothing(store, folder):
    seal(store, 10, 20, 30, 40)
    folder.aliases.write_text('{"production": ')
    with pytest.raises(ValueError, match="Expecting value"):
        retain(store, KEEP_TWO, {}, folder)
    assert steps(store) == [10, 20, 30, 40]


def test_all_stay_if_asked_and_none_is_none(store, folder):
    retain(store, KEEP_TWO, {}, folder)
    seal(store, 10, 20, 30)
    retain(store, CheckpointConfig(save_every_n_iterations=10, keep_last=None), {}, folder)
    assert steps(store) == [10, 20, 30]
