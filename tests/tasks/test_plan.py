"""What `gpt2 plan` says is what build-config, the trainer and the registry then do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from model.config import Experiment
from model.errors import UserError
from model.flops import peak_flops
from model.params import merge, parse_overrides, write_yaml
from model.stream.manifest import DataFile, DatasetManifest
from tasks.build_config import resolved
from tasks.gpu_offers import OFFERS
from tasks.plan import plan
from tasks.project import Project

NAME = "some"
ROOT = Path(__file__).parents[2]


def make_project(root: Path, **sections: dict[str, Any]) -> Project:
    own = {"data": {"path": "nowhere", "num_samples": 1000, "max_length": 64}, "model": {"preset": "nano"}}
    own = {key: {**own.get(key, {}), **sections.get(key, {})} for key in {*own, *sections}}
    (root / "params.yaml").write_text(yaml.safe_dump({"defaults": {}, "experiments": {NAME: own}}))
    (root / "dvc.yaml").write_text("stages: {}\n")
    return Project(root)


def manifest(samples: int, train_samples: int, tokens_per_sample: float) -> DatasetManifest:
    file = DataFile("/not/there", "part.parquet", 1, "d", samples, samples, train_samples, 1)
    return DatasetManifest("nowhere", None, [file], tokens_per_sample)


def build(project: Project, found: DatasetManifest, **changes: Any) -> Experiment:
    """What build-config would have written for these data."""
    experiment = project.with_overrides(NAME, changes)
    folder = project.run_folder(NAME)
    folder.path.mkdir(parents=True)
    write_yaml(folder.config, resolved(experiment, found).model_dump(mode="json"))
    return experiment


def test_gpt2_small_on_two_million_samples() -> None:
    """The figures of params.yaml's own experiment, by hand: 1.8 M samples of 850 tokens, twice, in steps of 8 windows of 512."""
    found = plan(Project(ROOT), "samples2m", {}, mfu=0.4, gpus=["H100"])
    assert found.parameters == 124_439_808
    assert (found.tokens.estimated, found.tokens.epoch, found.tokens.per_step) == (True, 1_530_000_000, 4096)
    assert found.steps == -(-3_060_000_000 // 4096)
    assert found.flops == pytest.approx(798.54336e6 * 3.06e9, rel=1e-5)
    rent = found.gpus[0]
    assert rent.hours == pytest.approx(found.flops / (0.4 * 989.4e12) / 3600)
    assert rent.tokens_per_s == pytest.approx(0.4 * 989.4e12 / 798.54336e6, abs=1)
    assert rent.usd == pytest.approx(rent.hours * 2.5)
    assert found.checkpoints.total == pytest.approx(1.493e9, rel=0.001)
    assert "4,096 tokens" in found.hints[0]
    assert "training.gradient_accumulation=122" in found.hints[0]


@pytest.mark.parametrize("max_steps", [None, 7, 10**6])
def test_the_steps_are_those_that_build_config_plans(tmp_path: Path, max_steps: int | None) -> None:
    project = make_project(tmp_path, training={"num_epochs": 3, "batch_size": 5, "gradient_accumulation": 2, "max_steps": max_steps})
    found = manifest(1000, 911, 33.7)
    experiment = build(project, found)
    made = plan(project, NAME, {})
    assert made.steps == resolved(experiment, found).total_steps
    assert (made.tokens.estimated, made.tokens.train_samples, made.tokens.per_sample) == (False, 911, 33.7)
    assert made.tokens.total == made.steps * 10 * 64
    assert made.tokens.epoch == round(911 * 33.7)


def test_before_build_config_the_length_is_an_estimate_and_what_was_built_for_other_data_does_not_count(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    assert plan(project, NAME, {}).tokens.estimated
    build(project, manifest(1000, 911, 33.7))
    assert not plan(project, NAME, {"data": {"max_length": 32, "lanes": 4}}).tokens.estimated, "these do not change the samples"
    other = plan(project, NAME, {"data": {"num_samples": 500}})
    assert (other.tokens.estimated, other.tokens.train_samples, other.tokens.epoch) == (True, 450, 450 * 850)
    assert plan(project, NAME, {"seed": 1}).tokens.estimated, "another seed splits otherwise"


def test_a_run_of_unknown_data_is_as_long_as_max_steps(tmp_path: Path) -> None:
    project = make_project(tmp_path, data={"num_samples": None})
    with pytest.raises(UserError, match=r"data\.num_samples.*training\.max_steps"):
        plan(project, NAME, {})
    made = plan(project, NAME, {"training": {"max_steps": 12}})
    assert (made.steps, made.tokens.epoch, made.tokens.total) == (12, None, 12 * 8 * 64)


def test_recorded_overrides_count_and_nothing_is_written(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    project.record_overrides(NAME, {"training": {"batch_size": 3}})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert plan(project, NAME, {"training": {"max_steps": 5}}).global_batch == 3
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("steps", "every", "keep_last", "made", "kept"),
    [(1000, 100, 3, 10, 5), (1050, 100, 3, 11, 6), (1000, 100, None, 10, 10), (250, 100, 3, 3, 3), (50, 100, 3, 1, 1)],
)
def test_the_checkpoints_are_those_that_retention_leaves(
    tmp_path: Path, steps: int, every: int, keep_last: int | None, made: int, kept: int
) -> None:
    project = make_project(
        tmp_path, checkpoint={"save_every_n_iterations": every, "keep_last": keep_last}, training={"batch_size": 1, "max_steps": steps}
    )
    found = plan(project, NAME, {})
    assert (found.checkpoints.made, found.checkpoints.kept) == (made, kept)
    assert found.storage.run_folder == min(kept + 1, made) * found.checkpoints.total
    assert found.storage.external == kept * found.checkpoints.total + found.checkpoints.weights


@pytest.mark.parametrize(
    ("steps", "every", "saved", "validations"), [(100, 10, 100, 10), (100, 10, 25, 12), (105, 10, 1000, 11), (7, 10, 10, 1)]
)
def test_validations_are_counted_with_those_of_the_checkpoints_and_of_the_end(
    tmp_path: Path, steps: int, every: int, saved: int, validations: int
) -> None:
    training = {"eval_freq": every, "eval_iters": 3, "batch_size": 1, "max_steps": steps}
    project = make_project(tmp_path, training=training, checkpoint={"save_every_n_iterations": saved})
    assert plan(project, NAME, {}).validation_share == round(validations * 3 / (3 * steps), 4), "a forward pass is a third of a step"


def test_more_gpus_take_less_time_and_as_much_money(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    one, four = (plan(project, NAME, {"hardware": {"devices": n}}, gpus=["A100"]).gpus[0] for n in (1, 4))
    assert one.hours == pytest.approx(4 * four.hours)
    assert one.usd == pytest.approx(four.usd)
    assert four.tokens_per_s == pytest.approx(4 * one.tokens_per_s, abs=4)


def test_fully_sharded_ranks_share_the_state(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    alone, shared = (plan(project, NAME, {"hardware": {"devices": 4, "strategy": how}}).memory["bf16"] for how in ("ddp", "fsdp"))
    assert (shared["weights"], shared["optimizer"]) == (alone["weights"] // 4, alone["optimizer"] // 4)
    assert shared["activations"] == alone["activations"]


def test_a_price_of_ones_own(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    found = plan(project, NAME, {}, gpus=["h100", "L4"], prices=["H100=9.99"])
    assert [(rent.gpu, rent.usd_per_hour) for rent in found.gpus] == [("H100", 9.99), ("L4", 0.5)]
    assert found.gpus[0].usd == pytest.approx(found.gpus[0].hours * 9.99)


def test_a_gpu_without_bf16_and_a_config_without_it_are_planned_in_fp32(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    t4, a100 = plan(project, NAME, {}, gpus=["T4", "A100"]).gpus
    assert (t4.precision, t4.peak_tflops, a100.precision, a100.peak_tflops) == ("fp32", 8.1, "bf16", 312)
    assert plan(project, NAME, {"training": {"precision": "fp32"}}, gpus=["A100"]).gpus[0].peak_tflops == 19.5


def test_a_network_that_no_card_holds_says_so(tmp_path: Path) -> None:
    project = make_project(tmp_path, model={"preset": "xl"}, data={"max_length": 1024})
    fits = {rent.gpu: rent.micro_batch for rent in plan(project, NAME, {}).gpus}
    assert fits["T4"] == 0, "16 bytes a parameter of 1.56 billion are 25 GB"
    assert 0 < fits["H100"] < fits["B200"]


def test_every_offer_has_a_peak_and_a_memory() -> None:
    for offer in OFFERS:
        assert peak_flops(offer.device, "fp32") is not None
        assert offer.memory_gb >= 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": {"warmup_steps": 50, "max_steps": 100}}, "training.warmup_steps=5"),
        ({"checkpoint": {"save_every_n_iterations": 500}, "training": {"max_steps": 100}}, "checkpoint.save_every_n_iterations=20"),
        ({"training": {"eval_freq": 10, "eval_iters": 20, "max_steps": 100}}, "validation adds 67%"),
        ({"hardware": {"devices": "auto"}}, "hardware.devices=N"),
        ({"model": {"preset": "small"}}, "a step sees 512 tokens"),
        ({"data": {"max_length": 32}}, "never trained"),
        ({"model": {"preset": "small"}, "checkpoint": {"keep_last": None, "save_every_n_iterations": 10}}, "checkpoint.keep_last=3"),
    ],
)
def test_what_looks_unsuitable_is_named_with_a_cure_that_cures_it(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    project = make_project(tmp_path)
    (hint,) = (hint for hint in plan(project, NAME, changes).hints if words in hint)
    cures = re.findall(r"--set (\S+=\d+)", hint)
    cured = plan(project, NAME, merge(changes, parse_overrides(cures))).hints
    assert not cures or not any(other[:20] == hint[:20] for other in cured)


def test_a_sound_experiment_gets_no_hint(tmp_path: Path) -> None:
    project = make_project(tmp_path, data={"max_length": 128}, training={"warmup_steps": 10}, checkpoint={"save_every_n_iterations": 100})
    assert plan(project, NAME, {}).hints == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mfu": 0}, "--mfu"),
        ({"mfu": 40}, "--mfu"),
        ({"gpus": ["H101"]}, "--gpu: no GPU 'H101' here; there are B200"),
        ({"prices": ["H100"]}, "--price H100"),
        ({"prices": ["H100=cheap"]}, "--price H100=cheap"),
        ({"prices": ["H100=-1"]}, "--price H100=-1"),
        ({"prices": ["Z=1"]}, "--price: no GPU 'Z'"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        plan(make_project(tmp_path), NAME, {}, **arguments)
