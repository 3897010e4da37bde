"""The trainer whose data lie behind a server that stays away: it stops in time, says why, and goes on later as if nothing had been."""

import signal
import time

import pytest

from model.checkpoint.store import open_checkpoint
from model.stream.lanes import plan_lanes
from model.stream.quickstart import write_corpus
from model.stream.shuffle import epoch_blocks
from model.training.journal import read_all
from model.training.run import read_run
from tests.model.stream.servers import FileServer
from tests.model.training.conftest import final, make_run, start_trainer, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, seed=1, rows=400, files=4)
    return {f"corpus/{path.name}": path.read_bytes() for path in folder.iterdir()}


def run_behind(server, folder):
    return make_run(folder, f"{server.url}/corpus", data={"lanes": 2, "train_ratio": 0.7})


def needed_last(folder):
    """The file that a training needs later than any other; the first one, with the validation windows, not counted."""
    config, manifest = read_run(folder)
    first_needed = {}
    for lane, slices in enumerate(plan_lanes(manifest, config.data.lanes)):
        for number, block in epoch_blocks(slices, config.data.buffer_size // config.data.lanes, config.seed, 0, lane, 0):
            first_needed[block.file] = min(number, first_needed.get(block.file, number))
    return manifest.files[max(set(first_needed) - {0}, key=first_needed.get)].name


def end(process):
    """Ask for a stop; the seconds it took and the exit code."""
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    return time.monotonic() - began, process.returncode


def test_a_shard_that_stays_away_costs_nothing_but_time(shards, tmp_path, monkeypatch):
    with FileServer(shards) as server:
        undisturbed, folder = (run_behind(server, tmp_path / name) for name in ("undisturbed", "run"))
        train(undisturbed)
        name = needed_last(folder)
        last = f"corpus/{name}"

        server.broken = {last: 503}
        monkeypatch.setenv("GPT2_SILENCE_S", "2")
        errors = train(folder, exit_code=75)
        events = read_all(folder.journal)
        (warning,), stopped = [event for event in events if event["event"] == "warning"], events[-1]
        assert stopped["event"] == "stopped"
        assert warning["message"].startswith(f"data.path: {name} could not be read for ")
        assert warning["message"] in errors
        assert stopped["reason"] == warning["message"]
        step = open_checkpoint(folder.checkpoints / stopped["checkpoint"]).step
        assert 0 < step == stopped["step"] < 40

        server.broken = {last: "stall"}
        monkeypatch.delenv("GPT2_SILENCE_S")
        process = start_trainer(folder)
        assert server.stalled.wait(60)
        time.sleep(0.5)  # it has nothing else to do by now
        seconds, code = end(process)
        assert code == 75
        assert seconds < 10
        assert read_all(folder.journal)[-1]["reason"] == "SIGTERM"

        server.broken = {}
        train(folder)
        assert [e["step"] for e in read_all(folder.journal) if e["event"] == "started"] == [0, step, step]
        assert final(folder) == final(undisturbed)


def test_a_stop_is_heard_while_the_validation_windows_are_waited_for(shards, tmp_path):
    with FileServer(shards) as server:
        folder = run_behind(server, tmp_path / "run")
        server.broken = dict.fromkeys(shards, "stall")
        process = start_trainer(folder)
        assert server.stalled.wait(60)
        seconds, code = end(process)
        assert code == 75
        assert seconds < 5
        stopped = read_all(folder.journal)[-1]
        assert (stopped["event"], stopped["step"], stopped["reason"], stopped["checkpoint"]) == ("stopped", 0, "SIGTERM", None)
