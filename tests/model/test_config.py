"""The resolved config: what its digest names, and what it does not."""

from model.config import Experiment, RunConfig
from model.params import merge


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
        {"checkpoint": {"save_every_n_iterations": 7}},
    ):
        assert run_config(**change).digest != digest, change


def test_where_data_lie_and_where_to_go_on_are_no_part_of_the_identity():
    digest = run_config().digest
    assert run_config(data={"path": "/elsewhere/SYNTH", "revision": "main"}).digest == digest
    assert run_config(checkpoint={"checkpoint_to_resume": "step_00000010"}).digest == digest
