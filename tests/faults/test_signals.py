"""SIGINT and SIGTERM, whatever is going on: noticed within 2 s, everything saved, exit code 75; nobody is left to train on."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import psutil
import pytest
import yaml

from model.checkpoint.store import CheckpointStore, open_checkpoint
from model.config import EvaluationConfig
from model.params import merge, write_yaml
from model.run_folder import RunFolder
from model.stream.quickstart import write_corpus
from model.training.journal import read_all
from tests.faults.conftest import TINY, VARIANTS, said, said_at, wait_for_event
from tests.faults.warm import ROOT, wait_until
from tests.model.stream.servers import FileServer
from tests.model.training.conftest import FIELDS, final, make_run

pytestmark = pytest.mark.slow

SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
NOTICED_S = 2.0
SAVED_S = 1.0
"""On top of that, for the step and the checkpoint of a run as small as these."""


def stop(process, number, seconds, group=False):
    """Send the signal; it must lead to exit code 75 within so many seconds."""
    began = time.monotonic()
    process.send_signal(number, group) if group else process.send_signal(number)
    try:
        code = process.wait(30)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGUSR1)  # a warm process says where it is
        time.sleep(1)
        process.kill()
        process.wait(30)
        raise AssertionError("not noticed within 30 s") from None
    took = time.monotonic() - began
    assert (code, took < seconds) == (75, True), f"exit code {code} after {took:.1f} s"


def check_saved(folder, number):
    """The journal's last word is the stop, and the checkpoint is of the step where training stood; returns that step."""
    events = read_all(folder.journal)
    stopped = events[-1]
    assert (stopped["event"], stopped["reason"]) == ("stopped", number.name)
    taken = max((e["step"] for e in events if e["event"] == "step"), default=0)
    assert stopped["step"] == taken
    if taken:
        checkpoint = open_checkpoint(folder.checkpoints / stopped["checkpoint"])
        checkpoint.verify()
        assert checkpoint.step == taken
    else:
        assert stopped["checkpoint"] is None
    return taken


def mapped(process, library):
    """Whether a process has loaded such a library."""
    with contextlib.suppress(OSError):
        return library in Path(f"/proc/{process.pid}/maps").read_text()
    return False


@pytest.fixture(scope="module")
def much_held_out(tmp_path_factory, corpus):
    """A run with a validation of some seconds after each step."""
    data = tmp_path_factory.mktemp("much")
    write_corpus(data, seed=2, rows=5000, files=1)
    fields = {"data": {"train_ratio": 0.3}, "training": {"eval_freq": 1, "eval_iters": 5000, "batch_size": 1}}
    return make_run(tmp_path_factory.mktemp("validating") / "run", data, **merge(TINY, fields))


@SIGNALS
@pytest.mark.parametrize("group", [False, True], ids=["trainer", "group"])
@pytest.mark.parametrize("variant", ["long", "post-trained, long"])
def test_while_training(trainer, new_run, number, group, variant):
    folder = new_run(variant, train=False)
    process = trainer.start(folder)
    wait_for_event(folder, process, "step", 5)
    stop(process, number, NOTICED_S + SAVED_S, group)
    assert check_saved(folder, number) >= 5


@SIGNALS
def test_while_validating(trainer, much_held_out, tmp_path, number):
    folder = copy_of(much_held_out, tmp_path)
    process = trainer.start(folder)
    wait_for_event(folder, process, "step", 1)
    time.sleep(0.3)
    stop(process, number, NOTICED_S + SAVED_S)
    assert check_saved(folder, number) == 1
    assert not [event for event in read_all(folder.journal) if event["event"] == "validation"]
    process = trainer.start(folder)  # goes on with the validation that was cut short
    wait_for_event(folder, process, "started")
    time.sleep(1)
    stop(process, number, NOTICED_S)
    assert check_saved(folder, number) == 1


def copy_of(run, place):
    (place / "run").mkdir()
    for path in (run.config, run.dataset):
        (place / "run" / path.name).write_bytes(path.read_bytes())
    return RunFolder(place / "run")


@SIGNALS
@pytest.mark.parametrize("library", ["_pydantic_core", "libtorch_cpu"])
def test_while_python_imports_the_trainer(new_run, number, library):
    folder = new_run("long", train=False)
    command = [sys.executable, "-m", "model.training", str(folder.path), "--set", "hardware.device=cpu"]
    with said_at(folder).open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment())
    wait_until(lambda: mapped(process, library), 30, f"{library} is loaded")
    stop(process, number, NOTICED_S)
    assert not folder.checkpoints.exists()
    assert not CheckpointStore(folder.checkpoints).folders()


def environment(**more):
    kept = {name: value for name, value in os.environ.items() if name not in ("MLFLOW_TRACKING_URI", "GPT2_WATCH_PID")}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}


@SIGNALS
@pytest.mark.parametrize("moment", ["its lock is made", "it has begun"])
def test_before_the_first_step(trainer, new_run, number, moment):
    folder = new_run("long", train=False)
    process = trainer.start(folder)
    if moment == "its lock is made":
        wait_until(folder.lock.exists, 30, moment)
    else:
        wait_for_event(folder, process, "started")
    stop(process, number, NOTICED_S)
    if moment == "it has begun":
        assert check_saved(folder, number) <= 1


@pytest.mark.parametrize(("group", "number"), [(False, signal.SIGINT), (True, signal.SIGTERM)], ids=["trainer-SIGINT", "group-SIGTERM"])
def test_while_compiling(trainer, new_run, tmp_path, number, group):
    folder = new_run("long", train=False)
    process = trainer.start(folder, "--set", "hardware.compile=true", environment={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")})
    compiler = ("g++", "cc1plus", "clang")
    descendants = []

    def compiles():
        nonlocal descendants
        assert process.poll() is None, said(folder)
        descendants = psutil.Process(process.pid).children(recursive=True)
        with contextlib.suppress(psutil.Error):
            return any(each.name().startswith(compiler) for each in descendants)
        return False

    wait_until(compiles, 90, "torch.compile compiles")
    stop(process, number, NOTICED_S, group)
    assert check_saved(folder, number) == 0
    _, alive = psutil.wait_procs(descendants, 5)
    assert not alive, f"left behind: {alive}"


@pytest.mark.parametrize("number", [signal.SIGINT])
def test_to_the_whole_group_of_two_ranks(trainer, new_run, number):
    folder = new_run("shared", train=False)
    process = trainer.start(folder, "--set", "hardware.devices=2")
    wait_for_event(folder, process, "step", 2)
    ranks = psutil.Process(process.pid).children(recursive=True)
    stop(process, number, NOTICED_S + SAVED_S + 1, group=True)
    events = read_all(folder.journal)
    assert events[-1]["event"] == "stopped"
    assert open_checkpoint(folder.checkpoints / events[-1]["checkpoint"]).step == events[-1]["step"] >= 2
    _, alive = psutil.wait_procs(ranks, 5)
    assert not alive, f"left behind: {alive}"


@pytest.mark.parametrize("fault", ["stall", "trickle", 503], ids=["no answer", "a byte now and then", "refused"])
@pytest.mark.parametrize(("files", "number"), [("all", signal.SIGTERM), ("some", signal.SIGINT)], ids=["all", "some"])
def test_while_a_source_does_not_answer(trainer, tmp_path, number, fault, files):
    """With all files it waits for its validation windows; with some it has trained before."""
    write_corpus(tmp_path / "corpus", seed=1, rows=400, files=4)
    shards = {f"corpus/{path.name}": path.read_bytes() for path in (tmp_path / "corpus").iterdir()}
    with FileServer(shards) as server:
        folder = make_run(tmp_path / "run", f"{server.url}/corpus", **merge(TINY, {"data": {"lanes": 2, "train_ratio": 0.7}}))
        server.broken = dict.fromkeys(shards if files == "all" else sorted(shards)[1:], fault)
        process = trainer.start(folder)
        before = len(server.spoiled)
        wait_until(lambda: len(server.spoiled) > before + 1, 30, "the source is asked")
        time.sleep(1)  # nothing else is left to do
        stop(process, number, NOTICED_S + (SAVED_S if files == "some" else 0))
        check_saved(folder, number)


def test_while_another_trainer_has_the_run(trainer, new_run):
    """It may wait for its turn or say no at once; it must not be deaf meanwhile."""
    folder = new_run("long", train=False)
    with filelock.FileLock(folder.lock):
        process = trainer.start(folder)
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(NOTICED_S) in (2, 75)
    assert not folder.checkpoints.exists()


@SIGNALS
def test_during_a_save(trainer, corpus, tmp_path, number):
    folder = large(corpus, tmp_path)
    process = trainer.start(folder)
    wait_until(lambda: list(folder.checkpoints.glob(".*.partial")), 60, "a checkpoint is being written")
    stop(process, number, NOTICED_S + 4 * SAVED_S)
    check_saved(folder, number)
    for checkpoint in CheckpointStore(folder.checkpoints).checkpoints():
        checkpoint.verify()
    assert not list(folder.checkpoints.glob(".*"))


@pytest.mark.parametrize("group", [False, True], ids=["trainer", "group"])
def test_a_second_sigint_leaves_at_once_with_the_checkpoint_before_whole(trainer, corpus, tmp_path, group):
    folder, whole = large(corpus, tmp_path), large(corpus, tmp_path / "whole")
    trainer.train(whole)
    process = trainer.start(folder)
    wait_for_event(folder, process, "step", 3)
    wait_until(lambda: not list(folder.checkpoints.glob(".*.partial")), 10, "the regular checkpoint is written")
    process.send_signal(signal.SIGINT)
    wait_until(lambda: list(folder.checkpoints.glob(".*.partial")), 10, "the emergency checkpoint is being written")
    stop(process, signal.SIGINT, 0.5, group)
    newest = CheckpointStore(folder.checkpoints).newest_whole(pytest.fail)
    assert newest is not None
    trainer.train(folder)
    assert final(folder) == final(whole)


def large(corpus, place):
    """A run whose checkpoints take a while to write (155 MB)."""
    place.mkdir(exist_ok=True)
    fields = {
        "model": {"n_layer": 1, "n_embd": 256},
        "training": {"max_steps": 5, "eval_freq": 100, "batch_size": 1, "gradient_accumulation": 1},
        "checkpoint": {"save_every_n_iterations": 2},
    }
    return make_run(place / "run", corpus, **merge(TINY, fields))


@pytest.fixture
def evaluated(undisturbed, corpus, tmp_path):
    """A project with a trained run whose checkpoints are registered and have no scores."""
    folder = undisturbed("plain").copy(tmp_path / "runs" / "run")
    changes = {"data": {"path": str(corpus)}, "hardware": {"device": "cpu"}}
    experiment = merge(merge(FIELDS, changes), merge(TINY, VARIANTS["plain"]))
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"defaults": {}, "experiments": {"run": experiment}}))
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    write_yaml(folder.evaluation_config, EvaluationConfig(items=20, questions=20, max_new_tokens=90).model_dump(mode="json"))
    entries = [
        {"name": c.name, "step": c.step, "digest": c.digest, "version": str(number), "model_id": f"m-{number}", "run_id": "r"}
        for number, c in enumerate(CheckpointStore(folder.checkpoints).checkpoints(), 1)
    ]
    folder.registered.write_text(json.dumps(entries))
    return folder


def evaluate(warm, folder):
    root = folder.path.parents[1]
    return warm.start("tasks.evaluate_each_checkpoint", "run", folder=root, stderr=said_at(folder), environment={"PYTHONPATH": str(ROOT)})


@SIGNALS
@pytest.mark.parametrize("group", [True], ids=["group"])
def test_while_evaluating(warm, evaluated, number, group):
    process = evaluate(warm, evaluated)
    wait_until(lambda: "step_" in said(evaluated) or process.poll() is not None, 60, "the first checkpoint has its scores")
    stop(process, number, NOTICED_S, group)
    assert "Traceback" not in said(evaluated)
    assert number.name in said(evaluated)
    assert not evaluated.scores.exists()
    assert len([path for path in evaluated.evaluation.iterdir() if not path.name.startswith(".")]) < len(read_registered(evaluated))
    assert not list(evaluated.evaluation.glob(".*"))


def read_registered(folder):
    return json.loads(folder.registered.read_text())


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_while_the_evaluation_waits_for_a_lock(warm, evaluated, number):
    lock = evaluated.path.parents[1] / "storage" / "mlflow" / ".aliases-run.lock"
    lock.parent.mkdir(parents=True)
    with filelock.FileLock(lock):
        process = evaluate(warm, evaluated)
        last = read_registered(evaluated)[-1]["name"]
        wait_until(lambda: last in said(evaluated) or process.poll() is not None, 60, "all checkpoints have their scores")
        database = evaluated.path.parents[1] / "storage" / "mlflow" / "mlflow.db"
        wait_until(lambda: database.exists() or process.poll() is not None, 60, "MLflow's store is made")
        time.sleep(3)
        stop(process, number, NOTICED_S)
    assert "Traceback" not in said(evaluated)
    assert not evaluated.scores.exists()


@SIGNALS
@pytest.mark.parametrize("stage", ["stream_and_train", "evaluate_each_checkpoint"])
def test_while_python_imports_a_stage(evaluated, number, stage):
    command = [sys.executable, "-m", f"tasks.{stage}", "run"]
    with said_at(evaluated).open("w") as log:
        process = subprocess.Popen(
            command, cwd=evaluated.path.parents[1], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment()
        )
    wait_until(lambda: mapped(process, "_pydantic_core"), 30, "pydantic is loaded")
    stop(process, number, NOTICED_S)
    assert "Traceback" not in said(evaluated)
