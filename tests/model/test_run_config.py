"""The resolved config: what its digest names, and what it does not."""

from model.config import Experiment
from model.params import merge
from model.run_config import RunConfig


def run_config(**changes):
    experiment = Experiment.model_validate({"data": {"path": "PleIAs/SYNTH"}})
    dataset = {"digest": "d", "revision": None, "files": 1, "samples": 9, "train_samples": 8, "tokens_per_sample": 3.5}
    fields = experiment.model_dump(mode="json", include={"seed", "model", "data", "training", "checkpoint"})
    return RunConfig.model_validate(merge({**fields, "dataset": dataset, "total_steps": 10}, changes))


def test_the_digest_names_what_decides_the_result():
    digest = run_config().digest
    assert run_config().digest == digest
    for change in (
        {"seed": 1},
        {"training": {"learning_rate": 1e-3}},
        {"dataset": {"digest": "e"}},
        {"model": {"dropout": 0.0}},
        {"data": {"filter": None}},
        {"training": {"num_epochs": 2}},
        {"training": {"schedule": "constant"}},
        {"checkpoint": {"fork_of": {"experiment": "parent", "checkpoint": "step_00000010", "digest": "0" * 64}}},
    ):
        assert run_config(**change).digest != digest, change


def test_where_data_lie_and_where_to_go_on_are_no_part_of_the_identity():
    digest = run_config().digest
    assert run_config(data={"path": "/elsewhere/SYNTH", "revision": "main"}).digest == digest
    assert run_config(checkpoint={"checkpoint_to_resume": "step_00000010"}).digest == digest


def test_how_far_and_how_often_may_change():
    for change in (
        {"training": {"max_steps": 7}, "total_steps": 7},
        {"training": {"eval_freq": 7, "eval_iters": 3}},
        {"checkpoint": {"save_every_n_iterations": 7, "keep_last": None}},
    ):
        assert run_config(**change).digest == run_config().digest, change
        assert run_config(**change).differences(run_config()) == []


def test_the_interval_of_saving_decides_where_rollbacks_go():
    rollback = {"training": {"spike": {"action": "rollback"}}}
    every_seven = {**rollback, "checkpoint": {"save_every_n_iterations": 7}}
    assert run_config(**rollback).digest != run_config(**every_seven).digest
    assert run_config(**every_seven).differences(run_config(**rollback)) == ["checkpoint.save_every_n_iterations: 1000, now 7"]


def test_differences_are_named():
    before = run_config(dataset={"revision": "abc"})
    now = run_config(seed=43, training={"batch_size": 3}, model={"n_layer": 2}, dataset={"digest": "e", "revision": "def"})
    assert now.differences(before) == [
        "seed: 42, now 43",
        "model.n_layer: 12, now 2",
        "training.batch_size: 8, now 3",
        "data.revision: abc, now def; the dataset: d, now e",
    ]


def test_the_data_identity_names_who_is_held_out_and_nothing_else():
    identity = run_config().data_identity
    for same in (
        {"training": {"learning_rate": 1e-3, "batch_size": 4}},
        {"model": {"dropout": 0.0, "n_layer": 2}},
        {"data": {"max_length": 128, "lanes": 2, "buffer_size": 7, "cache": True, "path": "/elsewhere", "revision": "main"}},
        {"dataset": {"samples": 7, "tokens_per_sample": 2.0}, "total_steps": 3},
        {"checkpoint": {"keep_last": None}},
    ):
        assert run_config(**same).data_identity == identity, same
    for other in (
        {"seed": 1},
        {"dataset": {"digest": "e"}},
        {"data": {"filter": None}},
        {"data": {"text_template": "{query}"}},
        {"data": {"id_column": "words"}},
        {"data": {"article_column": None}},
        {"data": {"num_samples": 7}},
        {"data": {"split_by": "sample"}},
        {"data": {"train_ratio": 0.8}},
    ):
        assert run_config(**other).data_identity != identity, other
