"""Many ranks: the same batches, the same losses, one writer, and an end for all when one dies. Real processes under torch's launcher."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from model.checkpoint.store import open_checkpoint
from model.training.journal import read_all, read_current
from tests.model.training.conftest import start_trainer, train
from tests.model.training.test_trainer import wait_for_step

pytestmark = pytest.mark.slow

FIELDS = {
    "model": {"dropout": 0.0},
    "data": {"lanes": 4},
    "training": {"batch_size": 4, "gradient_accumulation": 2, "max_steps": 12, "eval_freq": 6},
    "checkpoint": {"save_every_n_iterations": 6},
}
ENDLESS = {**FIELDS, "training": {**FIELDS["training"], "max_steps": 100_000, "num_epochs": 1000, "eval_freq": 100_000}}


def with_ranks(count, *options):
    return ["--set", f"hardware.devices={count}", *options]


def train_with(folder, *options, exit_code=0):
    process = start_trainer(folder, *options)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == exit_code, errors
    return errors


def wait_for(process, happened):
    deadline = time.monotonic() + 60
    while not happened():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def steps(folder):
    return [event for event in read_current(folder.journal) if event["event"] == "step"]


def validations(folder):
    return [event["loss"] for event in read_current(folder.journal) if event["event"] == "validation"]


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    from tests.model.training.conftest import make_run

    folder = make_run(tmp_path_factory.mktemp("alone") / "run", corpus, **FIELDS)
    train(folder)
    return folder


@pytest.mark.parametrize(("count", "strategy"), [(2, "ddp"), (4, "ddp"), (2, "fsdp")])
def test_the_same_losses_step_by_step(new_run, alone, count, strategy):
    folder = new_run("ranks", **FIELDS)
    train_with(folder, *with_ranks(count, "--set", f"hardware.strategy={strategy}", "--set", "hardware.micro_batch=1"))
    assert [event["loss"] for event in steps(folder)] == pytest.approx([event["loss"] for event in steps(alone)], rel=1e-4)
    norms = [event["gradient_norm"] for event in steps(folder)]
    assert norms == pytest.approx([event["gradient_norm"] for event in steps(alone)], rel=1e-3)
    assert [event["tokens"] for event in steps(folder)] == [event["tokens"] for event in steps(alone)]
    assert validations(folder) == pytest.approx(validations(alone), rel=1e-4)
    started = read_all(folder.journal)[0]
    assert (started["ranks"], started["micro_batch"]) == (count, 1)


def test_a_run_goes_on_with_another_number_of_ranks_and_strategy(new_run, alone):
    folder = new_run("elastic", **ENDLESS)
    process = start_trainer(folder, *with_ranks(2))
    wait_for_step(folder, 4, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert len(errors.strip().splitlines()) == 1
    stopped = read_all(folder.journal)[-1]
    assert stopped["event"] == "stopped"
    state = open_checkpoint(folder.checkpoints / stopped["checkpoint"]).state()
    assert set(state["stream"]["lanes"]) == {"0", "1", "2", "3"}
    assert state["stream"]["slot"] == 8 * stopped["step"]
    process = start_trainer(folder, *with_ranks(4, "--set", "hardware.strategy=fsdp"))
    wait_for_step(folder, max(12, stopped["step"] + 3), process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 75
    losses = {event["step"]: event["loss"] for event in steps(alone)}
    rates = {event["step"]: event["learning_rate"] for event in steps(alone)}
    found = steps(folder)
    assert [event["step"] for event in found] == list(range(1, len(found) + 1))
    assert found[0]["loss"] == pytest.approx(losses[1], rel=1e-4)
    assert found[4]["tokens"] == steps(alone)[4]["tokens"]
    assert rates[1] == pytest.approx(found[0]["learning_rate"])


def test_the_same_ranks_interrupted_give_equal_weights(new_run):
    """Dropout is on: every rank's randomness is that of the step."""
    fields = {**FIELDS, "model": {"dropout": 0.1}}
    whole, cut = new_run("whole", **fields), new_run("cut", **fields)
    train_with(whole, *with_ranks(2))
    process = start_trainer(cut, *with_ranks(2))
    wait_for_step(cut, 4, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    train_with(cut, *with_ranks(2))
    assert [event["loss"] for event in steps(cut)] == [event["loss"] for event in steps(whole)]
    assert read_all(cut.journal)[-1]["model_sha256"] == read_all(whole.journal)[-1]["model_sha256"]


def test_the_last_batches_of_the_data_are_trained_on(new_run):
    """Lanes end at different steps: at the end some ranks have less than others, or nothing."""
    fields = {**FIELDS, "training": {**FIELDS["training"], "max_steps": None, "eval_freq": 1000}}
    fields["checkpoint"] = {"save_every_n_iterations": 1000}
    one, many = new_run("one", **fields), new_run("many", **fields)
    train(one)
    train_with(many, *with_ranks(4, "--set", "hardware.micro_batch=1"))
    assert [event["tokens"] for event in steps(many)] == [event["tokens"] for event in steps(one)]
    assert len({b["tokens"] - a["tokens"] for a, b in zip(steps(one)[:-1], steps(one)[1:], strict=True)}) > 1
    assert [event["loss"] for event in steps(many)] == pytest.approx([event["loss"] for event in steps(one)], rel=1e-3)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_rank_ends_the_others_within_a_minute(new_run, victim):
    folder = new_run("dead", **ENDLESS)
    process = start_trainer(folder, *with_ranks(2))
    wait_for_step(folder, 7, process)
    ranks = psutil.Process(process.pid).children()
    assert len(ranks) == 2
    found = next(rank for rank in ranks if rank.environ()["RANK"] == str(victim))
    found.kill()
    began = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - began < 60
    assert process.returncode == 75, errors
    assert "killed by signal 9" in errors
    assert not any(rank.is_running() for rank in ranks)
    told = len(read_all(folder.journal))
    again = start_trainer(folder, *with_ranks(2, "--set", "hardware.micro_batch=1"))
    wait_for(again, lambda: len(read_all(folder.journal)) > told + 1)
    again.send_signal(signal.SIGTERM)
    again.communicate(timeout=60)
    last_saved = [event["step"] for event in read_all(folder.journal)[:told] if event["event"] == "checkpoint"][-1]
    started = [event for event in read_all(folder.journal) if event["event"] == "started"]
    assert [event["step"] for event in started] == [0, last_saved]
    assert [event["micro_batch"] for event in started] == [4, 1], "what is asked for now counts"


def test_ranks_whose_launcher_was_killed_save_and_leave(new_run):
    folder = new_run("orphans", **ENDLESS)
    launcher = start_trainer(folder, *with_ranks(2))
    wait_for_step(folder, 2, launcher)
    ranks = [child for child in psutil.Process(launcher.pid).children() if "model.training" in child.cmdline()]
    assert len(ranks) == 2
    launcher.kill()
    launcher.wait(10)
    _, left = psutil.wait_procs(ranks, 15)
    for rank in left:
        rank.kill()
    assert not left, "orphans train on"
    stopped = read_all(folder.journal)[-1]
    assert (stopped["event"], stopped["reason"]) == ("stopped", "the process that started the trainer has gone")
    open_checkpoint(folder.checkpoints / stopped["checkpoint"]).verify()
    launcher.stderr.close()


def test_ranks_that_cannot_share_the_work_are_one_line(new_run):
    errors = train_with(new_run("three", **FIELDS), *with_ranks(3), exit_code=2)
    assert errors.startswith("error: data.lanes: 4 lanes cannot be shared out among 3 ranks")
    assert len(errors.strip().splitlines()) == 1


def test_what_the_first_rank_may_not_do_no_rank_may(new_run):
    """Its refusal ends all of them, and is said once."""
    folder = new_run("refused", **ENDLESS)
    process = start_trainer(folder)
    wait_for_step(folder, 1, process)
    errors = train_with(folder, *with_ranks(2), exit_code=2)
    assert "is in use by another trainer" in errors
    assert len(errors.strip().splitlines()) == 1
    process.kill()
    process.communicate()


def test_two_machines_meet_at_a_rendezvous(new_run, alone):
    """Two launchers of one rank each, as torchrun starts them on two machines."""
    folder = new_run("nodes", **FIELDS)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "two", "--local-addr", "localhost"]
    command += ["-m", "model.training", str(folder.path), "--set", "hardware.device=cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    root = Path(__file__).parents[3]
    nodes = [subprocess.Popen(command, cwd=root, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for node in nodes:
        _, errors = node.communicate(timeout=180)
        assert node.returncode == 0, errors
    assert [event["loss"] for event in steps(folder)] == pytest.approx([event["loss"] for event in steps(alone)], rel=1e-4)
    assert read_all(folder.journal)[0]["ranks"] == 2
