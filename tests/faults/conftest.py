"""Runs as small as they get, started by the warm starter, and what must hold of one that was disturbed.

A run takes about a second: 24 steps of a GPT-2 of width 8, with a checkpoint every 4th, a validation every 6th, and dropout.
"""

import json
import shutil
import subprocess
import time
from dataclasses import dataclass

import pytest

from model.checkpoint.store import CheckpointStore
from model.params import merge
from model.run_folder import RunFolder
from model.stream.quickstart import write_corpus
from model.training.journal import read_all, read_current
from tests.faults.warm import Warm
from tests.model.training.conftest import begins_with, final, make_run

TINY = {
    "model": {"preset": "nano", "n_embd": 8, "dropout": 0.1},
    "training": {"max_steps": 24, "eval_freq": 6, "eval_iters": 1, "warmup_steps": 5},
    "checkpoint": {"save_every_n_iterations": 4},
}
_SPIKES = {"learning_rate": 1e-2, "max_bad_steps": 100, "gradient_accumulation": 1}
VARIANTS = {
    "plain": {},
    "cache": {"data": {"cache": True}},
    "skip": {"training": {**_SPIKES, "spike": {"action": "skip", "threshold": 1.2, "history": 8}}},  # so near the median: ordinary
    "rollback": {"training": {**_SPIKES, "spike": {"action": "rollback", "threshold": 1.3, "history": 8}}},  # batches are spikes
    "short": {
        "data": {"cache": True},
        "training": {"max_steps": 5, "eval_freq": 100},
        "checkpoint": {"save_every_n_iterations": 2, "keep_last": 1},
    },
    "unsaved": {"training": {"max_steps": 12, "eval_freq": 100}, "checkpoint": {"save_every_n_iterations": 100}},
    "shared": {"data": {"lanes": 4}, "training": {"max_steps": 100_000, "num_epochs": 10_000}},
    "long": {"training": {"max_steps": 100_000, "num_epochs": 10_000}},
    "post-trained": {"post_training": {"base": "plain"}},
    "post-trained, rollback": {"post_training": {"base": "plain"}},
    "post-trained, short": {
        "post_training": {"base": "plain"},
        "training": {"max_steps": 5, "eval_freq": 100},
        "checkpoint": {"save_every_n_iterations": 2, "keep_last": 1},
    },
    "post-trained, long": {"post_training": {"base": "plain"}, "training": {"max_steps": 100_000, "num_epochs": 10_000}},
}
"""By name what a run has that others have not. A post-training's base is the last checkpoint of the variant named there."""
VARIANTS["post-trained, rollback"] |= VARIANTS["rollback"]


def consumed(folder):
    """What each step was trained on and what came of it, interruptions forgotten."""
    return [(e["step"], e["epoch"], e["tokens"], e["loss"]) for e in read_current(folder.journal) if e["event"] == "step"]


def warnings(folder):
    return [event for event in read_all(folder.journal) if event["event"] == "warning"]


def files_of(folder):
    """Names of all files of a run and of the token cache beside it, but for `aside`."""
    tops = [folder.path, folder.token_caches]
    found = {str(path.relative_to(folder.path.parent)) for top in tops for path in top.rglob("*") if path.is_file()}
    return {name.partition("/")[2] for name in found if "/aside/" not in name}


@dataclass
class Undisturbed:
    """A run of some variant that nobody disturbed, and what it came to."""

    folder: RunFolder
    seconds: float
    """From its start to its end."""
    fields: dict
    """What is special about it, with where its base lies."""

    def copy_beginning(self, place):
        """A run of the same configuration that has not begun, at `place`."""
        place.mkdir(parents=True)
        for name in (self.folder.config, self.folder.dataset):
            shutil.copy(name, place)
        return RunFolder(place)

    def copy(self, place):
        """The finished run itself, at `place`, with a token cache of its own if it has one."""
        shutil.copytree(self.folder.path, place)
        if self.folder.token_caches.exists():
            shutil.copytree(self.folder.token_caches, place.parent / ".tokens")
        return RunFolder(place)

    def check_equal(self, folder, beside=()):
        """A finished run has the same weights, was trained on the same, and left the same files: no more (but `beside`), no fewer."""
        self.check_ends_alike(folder)
        assert files_of(folder) - set(beside) == files_of(self.folder)

    def check_ends_alike(self, folder):
        """The same but for the checkpoints between, of which a disk may have refused some."""
        assert final(folder) == final(self.folder)
        assert consumed(folder) == consumed(self.folder)
        assert json.loads(folder.metrics.read_text()) == json.loads(self.folder.metrics.read_text())
        assert not [name for name in files_of(folder) if ".partial" in name or ".doomed" in name]
        for checkpoint in CheckpointStore(folder.checkpoints).checkpoints():
            checkpoint.verify()


class Starter:
    """Starts trainers."""

    def __init__(self, warm):
        self.warm = warm

    def start(self, folder, *options, **how):
        """A trainer of `folder`; what it says goes to `said`."""
        how.setdefault("stderr", said_at(folder))
        return self.warm.start("model.training", str(folder.path), "--set", "hardware.device=cpu", *begins_with(folder), *options, **how)

    def train(self, folder, *options, code=0, **how):
        """Train to an end with this exit code; returns what was said."""
        process = self.start(folder, *options, **how)
        try:
            ended = process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        text = said(folder)
        assert ended == code, text
        return text


def said_at(folder):
    return folder.path.with_name(f"{folder.path.name}.said")


def said(folder):
    return said_at(folder).read_text()


def wait_for_event(folder, process, name, step=0, seconds=60):
    """Wait until the journal has such an event, of this step or a later one."""
    deadline = time.monotonic() + seconds
    while not any(e["event"] == name and e.get("step", 0) >= step for e in read_all(folder.journal)):
        assert process.poll() is None, said(folder)
        assert time.monotonic() < deadline, f"no {name} of step {step} in {seconds} s"
        time.sleep(0.005)


@pytest.fixture(scope="session")
def warm():
    warm = Warm()
    yield warm
    warm.close()


@pytest.fixture(scope="session")
def trainer(warm):
    return Starter(warm)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, seed=1, rows=600, files=2)
    return folder


@pytest.fixture(scope="session")
def undisturbed(trainer, corpus, tmp_path_factory):
    """By a variant's name: the run that nobody disturbed, trained once."""
    found = {}

    def get(variant, train=True):
        if variant not in found:
            fields = merge(TINY, VARIANTS[variant])
            if "post_training" in fields:
                base = CheckpointStore(get(fields["post_training"]["base"]).folder.checkpoints).checkpoints()[-1]
                fields["post_training"] = {"base": str(base.path)}
            folder = make_run(tmp_path_factory.mktemp(variant.replace(", ", "-")) / "run", corpus, **fields)
            began = time.monotonic()
            if train:
                trainer.train(folder)
            found[variant] = Undisturbed(folder, time.monotonic() - began, fields)
        return found[variant]

    return get


@pytest.fixture
def new_run(undisturbed, tmp_path):
    """A run of a variant that has not begun."""

    def make(variant="plain", name="run", train=True):
        return undisturbed(variant, train).copy_beginning(tmp_path / name)

    return make
