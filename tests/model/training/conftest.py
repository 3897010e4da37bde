"""A small run to train: a nano GPT-2 with dropout, on a small generated corpus, checkpoints every 10 of 40 steps."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from model.checkpoint.store import open_checkpoint
from model.config import Experiment
from model.params import merge, read_yaml, write_yaml
from model.run_config import Base
from model.run_folder import RunFolder
from model.stream.quickstart import write_corpus
from model.stream.resolve import resolve
from tasks.build_config import resolved

FIELDS = {
    "seed": 7,
    "model": {"preset": "nano", "dropout": 0.1},
    "data": {"path": "", "max_length": 32, "buffer_size": 64, "lanes": 3},
    "training": {"batch_size": 2, "gradient_accumulation": 2, "max_steps": 40, "warmup_steps": 5, "learning_rate": 3e-3},
    "checkpoint": {"save_every_n_iterations": 10, "keep_last": 2},
}
FIELDS["training"] |= {"eval_freq": 5, "eval_iters": 2}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, seed=1, rows=600, files=2)
    return folder


def make_run(folder, corpus, **changes):
    experiment = Experiment.model_validate(merge(merge(FIELDS, {"data": {"path": str(corpus)}}), changes))
    manifest = resolve(experiment.data, experiment.seed, folder)
    folder.mkdir(exist_ok=True)
    run, base = RunFolder(folder), None
    if experiment.post_training is not None:
        place = experiment.post_training.base
        base = Base(source=place, digest=open_checkpoint(Path(place)).digest)
    manifest.write(run.dataset)
    write_yaml(run.config, resolved(experiment, manifest, base).model_dump(mode="json"))
    return run


def begins_with(folder):
    """The trainer's options that say where the base of a post-training lies."""
    post_training = read_yaml(folder.config).get("post_training") if folder.config.exists() else None  # on a disk that the run alone sees
    return ["--checkpoint", post_training["base"]["source"]] if post_training else []


@pytest.fixture
def new_run(corpus, tmp_path):
    def make(name="run", **changes):
        return make_run(tmp_path / name, corpus, **changes)

    return make


@pytest.fixture(scope="session")
def finished_run(corpus, tmp_path_factory):
    """Trained once, never touched: compare with it."""
    run = make_run(tmp_path_factory.mktemp("finished") / "run", corpus)
    train(run)
    return run


@pytest.fixture
def finished(finished_run, tmp_path):
    """A copy of it, to do things to."""
    shutil.copytree(finished_run.path, tmp_path / "finished")
    return RunFolder(tmp_path / "finished")


def start_trainer(folder, *options, **popen):
    command = [sys.executable, "-m", "model.training", str(folder.path), "--set", "hardware.device=cpu", *begins_with(folder), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # several trainers at once share few cores
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3], env=environment, **popen)


def train(folder, exit_code=0):
    process = start_trainer(folder)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == exit_code, errors
    return errors


def final(folder):
    """(step, SHA-256 of the final weights) from the journal's last event."""
    event = json.loads(folder.journal.read_text().splitlines()[-1])
    assert event["event"] == "finished"
    return event["step"], event["model_sha256"]
