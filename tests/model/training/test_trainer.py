"""The trainer as its users meet it: a process that is started, interrupted, killed, and started again."""

import json
import math
import signal
import subprocess
import time

import pytest
import torch

from model.checkpoint.store import CheckpointStore, open_checkpoint
from model.config import ModelConfig
from model.gpt2 import GPT2
from model.params import read_yaml, write_yaml
from model.training.journal import read_all, read_current
from tests.model.training.conftest import final, make_run, start_trainer, train

pytestmark = pytest.mark.slow


def wait_for_step(folder, step, process):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if any(e["event"] == "step" and e["step"] >= step for e in read_all(folder.journal)):
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached")


def consumed(folder):
    """What each step was trained on and what came of it, interruptions forgotten."""
    return [(e["step"], e["epoch"], e["tokens"], e["loss"]) for e in read_current(folder.journal) if e["event"] == "step"]


def test_learns_and_leaves_a_whole_record(finished_run):
    events = read_current(finished_run.journal)
    losses = [e["loss"] for e in events if e["event"] == "step"]
    assert len(losses) == 40
    assert losses[-1] < losses[0] - 0.5
    assert [e["seq"] for e in read_all(finished_run.journal)] == list(range(len(read_all(finished_run.journal))))
    assert [e["step"] for e in events if e["event"] == "validation"] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert [e["step"] for e in events if e["event"] == "checkpoint"] == [10, 20, 30, 40]
    rates = [e["learning_rate"] for e in events if e["event"] == "step"]
    assert rates[0] == pytest.approx(3e-3 / 5)
    assert max(rates) == rates[4] == rates[5] == pytest.approx(3e-3)
    assert rates[-1] == pytest.approx(3e-4, rel=0.1)
    metrics = json.loads(finished_run.metrics.read_text())
    assert metrics["step"] == 40
    assert 0 < metrics["validation_bits_per_byte"] < 8


def test_keeps_the_last_two_and_the_best(finished_run):
    names = [c.name for c in CheckpointStore(finished_run.checkpoints).checkpoints()]
    assert names == ["step_00000030", "step_00000040"]
    for checkpoint in CheckpointStore(finished_run.checkpoints).checkpoints():
        checkpoint.verify()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_next_start_goes_on_to_equal_weights(new_run, finished_run, number):
    folder = new_run("signalled")
    for step in (3, 17):
        process = start_trainer(folder)
        wait_for_step(folder, step, process)
        process.send_signal(number)
        process.communicate(timeout=30)
        assert process.returncode == 75
        stopped = read_all(folder.journal)[-1]
        assert stopped["event"] == "stopped"
        assert open_checkpoint(folder.checkpoints / stopped["checkpoint"]).step == stopped["step"]
    train(folder)
    assert final(folder) == final(finished_run)
    assert consumed(folder) == consumed(finished_run)
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == sorted(p.name for p in finished_run.checkpoints.iterdir())


def test_a_second_start_of_a_finished_run_changes_nothing(finished):
    before = final(finished)
    files = {p: p.stat().st_mtime_ns for p in finished.checkpoints.rglob("*.safetensors")}
    train(finished)
    assert final(finished) == before
    assert {p: p.stat().st_mtime_ns for p in finished.checkpoints.rglob("*.safetensors")} == files


def test_epochs_end_training_and_their_samples_are_all_used(new_run):
    folder = new_run(
        "epochs", training={"max_steps": None, "num_epochs": 2, "eval_freq": 1000}, checkpoint={"save_every_n_iterations": 1000}
    )
    train(folder)
    events = [e for e in read_current(folder.journal) if e["event"] == "step"]
    assert {e["epoch"] for e in events} == {0, 1}
    expected = read_yaml(folder.dataset.with_name("config.yaml"))["dataset"]
    assert events[-1]["tokens"] == pytest.approx(2 * expected["train_samples"] * expected["tokens_per_sample"], rel=0.05)


def test_another_configuration_starts_anew_and_keeps_the_old_checkpoints(corpus, finished):
    old = final(finished)
    folder = make_run(finished.path, corpus, training={"learning_rate": 1e-3})
    train(folder)
    assert final(folder) != old
    assert [e["step"] for e in read_all(folder.journal) if e["event"] == "started"] == [0]
    kept = sorted(folder.aside.glob("*/checkpoints/step_*"))
    assert [p.name for p in kept] == ["step_00000030", "step_00000040"]
    assert open_checkpoint(kept[-1]).model_sha256 == old[1]


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(finished):
    folder = finished
    expected = final(folder)
    weights = folder.checkpoints / "step_00000040" / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    weights.write_bytes(damaged)
    train(folder)
    assert final(folder) == expected
    events = read_current(folder.journal)
    assert any(e["event"] == "warning" and "step_00000040/model.safetensors" in e["message"] for e in events)
    assert [e["step"] for e in read_all(folder.journal) if e["event"] == "started"] == [0, 30]
    CheckpointStore(folder.checkpoints).checkpoints()[-1].verify()


def test_no_whole_checkpoint_is_refused_with_the_list(finished):
    for path in finished.checkpoints.glob("*/optimizer.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    errors = train(finished, exit_code=1)
    assert "step_00000030/optimizer.safetensors" in errors
    assert "step_00000040/optimizer.safetensors" in errors
    assert "Traceback" not in errors


def test_vanished_checkpoints_are_refused(finished):
    for path in finished.checkpoints.iterdir():
        path.rename(finished.path / path.name)
    assert "step_00000040" in train(finished, exit_code=1)


def test_goes_on_from_the_checkpoint_asked_for_once(finished):
    folder = finished
    expected = final(folder)
    config = read_yaml(folder.config)
    config["checkpoint"]["checkpoint_to_resume"] = "step_00000030"
    write_yaml(folder.config, config)
    train(folder)
    assert [e["step"] for e in read_all(folder.journal) if e["event"] == "started"] == [0, 30]
    assert (folder.aside / "after_step_00000030" / "step_00000040").is_dir()
    assert final(folder) == expected
    train(folder)
    assert [e["step"] for e in read_all(folder.journal) if e["event"] == "started"] == [0, 30, 40]


def test_an_unknown_checkpoint_to_resume_is_the_users_mistake(finished):
    config = read_yaml(finished.config)
    config["checkpoint"]["checkpoint_to_resume"] = "step_00000011"
    write_yaml(finished.config, config)
    errors = train(finished, exit_code=2)
    assert "checkpoint.checkpoint_to_resume: step_00000011" in errors
    assert len(errors.strip().splitlines()) == 1


def test_a_second_trainer_is_refused_and_told_who_holds_the_run(new_run):
    folder = new_run("busy", training={"max_steps": 100_000, "num_epochs": 1000})
    first = start_trainer(folder)
    try:
        wait_for_step(folder, 1, first)
        assert f"process {first.pid} since" in train(folder, exit_code=2)
    finally:
        first.kill()
        first.communicate(timeout=30)


def test_stops_when_the_process_that_started_it_dies(new_run):
    folder = new_run("orphan", training={"max_steps": 100_000, "num_epochs": 1000})
    process = start_trainer(folder, "--watch-stdin", stdin=subprocess.PIPE)
    wait_for_step(folder, 2, process)
    process.stdin.close()
    assert process.wait(timeout=20) == 75
    assert "has gone" in read_all(folder.journal)[-1]["reason"]
    process.stderr.close()


def test_the_data_must_be_the_configs(finished):
    manifest = json.loads(finished.dataset.read_text())
    manifest["files"][0]["samples"] -= 1
    finished.dataset.write_text(json.dumps(manifest))
    assert "dataset.json" in train(finished, exit_code=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_device_that_is_not_there_is_one_line(new_run):
    process = start_trainer(new_run("gpu"), "--set", "hardware.device=cuda")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.startswith("error: hardware.device: cuda is not there")
    assert len(errors.strip().splitlines()) == 1


def test_retention_spares_the_champion(new_run):
    """Of a training that goes on after an evaluation: the champion stays, its neighbours go."""
    folder = new_run("going-on", checkpoint={"keep_last": 1})
    process = start_trainer(folder)
    wait_for_step(folder, 12, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    champion = open_checkpoint(folder.checkpoints / "step_00000010")
    folder.scores.write_text(json.dumps({"champion": {"digest": champion.digest}, "checkpoints": []}))
    train(folder)
    assert [c.name for c in CheckpointStore(folder.checkpoints).checkpoints()] == ["step_00000010", "step_00000040"]


def test_cached_tokens_change_nothing(new_run, finished_run):
    folder = new_run("cached", data={"cache": True})
    train(folder)
    assert final(folder) == final(finished_run)
    assert list(folder.token_caches.rglob("*.tokens"))
    odd = [event["odd_rows"] for event in read_current(folder.journal) if event["event"] == "checkpoint"]
    assert odd == [event["odd_rows"] for event in read_current(finished_run.journal) if event["event"] == "checkpoint"]
    assert odd[-1].keys() == {"empty_field", "not_utf8", "end_of_text", "lost", "too_long", "unanswered"}


def test_muon_interrupted_gives_equal_weights(new_run):
    fields = {"training": {"optimizer": "muon", "embedding_learning_rate": 1e-2, "matrix_learning_rate": 1e-2, "max_steps": 20}}
    whole, cut = new_run("whole", **fields), new_run("cut", **fields)
    train(whole)
    process = start_trainer(cut)
    wait_for_step(cut, 7, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75
    train(cut)
    assert final(cut) == final(whole)
    losses = [e["loss"] for e in read_current(whole.journal) if e["event"] == "step"]
    assert losses[-1] < losses[0] - 0.5


def test_norms_are_recorded_when_asked_for_and_change_nothing(new_run, finished_run):
    folder = new_run("norms")
    process = start_trainer(
        folder, "--set", "journal.norms_every=4", "--set", "journal.per_layer=true", "--set", "hardware.deterministic=true"
    )
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert final(folder) == final(finished_run)
    with_norms = [e for e in read_current(folder.journal) if "update_norm" in e]
    assert [e["step"] for e in with_norms] == list(range(4, 41, 4))
    for event in with_norms:
        gradients, parameters, updates = zip(*event["layers"].values(), strict=True)
        assert math.hypot(*gradients) == pytest.approx(event["gradient_norm"], rel=1e-4)
        assert math.hypot(*parameters) == pytest.approx(event["parameter_norm"], rel=1e-4)
        assert math.hypot(*updates) == pytest.approx(event["update_norm"], rel=1e-4)
        assert 0 < event["update_norm"] < event["parameter_norm"]
    assert len(with_norms[0]["layers"]) == len(dict(GPT2(ModelConfig(preset="nano")).named_parameters()))


@pytest.mark.parametrize("change", ["journal.norms_everx=1", "training.max_steps=3", "hardware.devices=0"])
def test_an_option_that_is_not_the_machines_is_one_line(new_run, change):
    process = start_trainer(new_run("options"), "--set", change)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert change.partition("=")[0].split(".")[0] in errors
    assert len(errors.strip().splitlines()) == 1
