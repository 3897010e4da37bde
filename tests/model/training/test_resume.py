"""Going on with something changed: what may change, what is refused by name, where a fork begins."""

import shutil

import pytest

from model.checkpoint.store import CheckpointStore, open_checkpoint
from model.errors import NoWholeCheckpoint, UserError
from model.params import merge, read_yaml, write_yaml
from model.run_config import RunConfig
from model.run_folder import RunFolder
from model.training.journal import Journal, read_all, read_current
from model.training.resume import find_start
from model.training.run import read_run
from tests.model.training.conftest import final, make_run, start_trainer, train

pytestmark = pytest.mark.slow


def changed(folder, **changes):
    """The run's config with fields changed; the data are what they were."""
    return RunConfig.model_validate(merge(read_yaml(folder.config), changes))


def unfinished(folder):
    """As if the last start had been killed after step 40 was saved."""
    journal = Journal(folder.journal)
    journal.append("started", step=40, config_digest=read_run(folder)[0].digest, checkpoint_to_resume=None)
    journal.append("step", step=41)
    journal.close()
    return folder


OTHERS = {
    "seed: 7, now 8": {"seed": 8},
    "training.batch_size: 2, now 4": {"training": {"batch_size": 4}},
    "training.learning_rate: 0.003, now 0.01": {"training": {"learning_rate": 0.01}},
    "training.schedule: cosine, now linear": {"training": {"schedule": "linear"}},
    "training.num_epochs: 1, now 2": {"training": {"num_epochs": 2}},
    "model.n_layer: 2, now 3": {"model": {"n_layer": 3}},
    "data.buffer_size: 64, now 63": {"data": {"buffer_size": 63}},
    "the dataset:": {"dataset": {"digest": "e" * 64}},
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_must_not_change_is_refused_by_name_and_nothing_is_moved(finished, what):
    folder = unfinished(finished)
    before = sorted(path.name for path in folder.checkpoints.iterdir())
    with pytest.raises(UserError, match=r"--fork NEW.*--anew") as refusal:
        find_start(folder, changed(folder, **OTHERS[what]), None)
    assert what in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == before
    assert not folder.aside.exists()


@pytest.mark.parametrize("what", OTHERS)
def test_a_checkpoint_that_is_asked_for_by_name_is_refused_in_the_same_way(finished, what):
    fields = merge(OTHERS[what], {"checkpoint": {"checkpoint_to_resume": "step_00000030"}})
    config = changed(unfinished(finished), **fields)
    shutil.rmtree(finished.checkpoints / "step_00000040")
    finished.journal.unlink()
    other = RunFolder(finished.path.with_name("other"))
    shutil.copytree(finished.path, other.path)
    shutil.rmtree(other.checkpoints)
    with pytest.raises(UserError, match=r"checkpoint.checkpoint_to_resume: .*another configuration") as refusal:
        find_start(other, config, finished.checkpoints / "step_00000030")
    assert what in str(refusal.value)


MAY = [
    {"training": {"max_steps": 60}, "total_steps": 60},
    {"training": {"eval_freq": 7, "eval_iters": 1}},
    {"checkpoint": {"save_every_n_iterations": 7, "keep_last": None}},
    {"data": {"path": "/elsewhere", "cache": True}},
]


@pytest.mark.parametrize("fields", MAY)
def test_what_may_change_goes_on(finished, fields):
    folder = unfinished(finished)
    start = find_start(folder, changed(folder, **fields), None)
    assert start.checkpoint.name == "step_00000040"
    assert start.messages == []
    assert not folder.aside.exists()


def test_a_flipped_bit_in_a_recorded_configuration_is_damage_and_no_other_configuration(finished):
    folder = unfinished(finished)
    state = folder.checkpoints / "step_00000040" / "state.json"
    digest = read_run(folder)[0].dataset.digest
    state.write_text(state.read_text().replace(digest, digest[:-1] + ("0" if digest[-1] != "0" else "1")))
    start = find_start(folder, read_run(folder)[0], None)
    assert start.checkpoint.name == "step_00000030"
    assert [kind for kind, message in start.messages if "step_00000040/state.json" in message] == ["checkpoint"]


def test_fewer_steps_than_were_taken_are_refused_until_the_run_is_finished(finished):
    fewer = {"training": {"max_steps": 20}, "total_steps": 20}
    with pytest.raises(UserError, match=r"training.max_steps: 20, but finished has taken 40 steps"):
        find_start(unfinished(finished), changed(finished, **fewer), None)


def test_fewer_steps_than_a_finished_run_took_begin_anew(finished):
    start = find_start(finished, changed(finished, training={"max_steps": 20}, total_steps=20), None)
    assert start.checkpoint is None
    assert [path.name for path in finished.aside.glob("*/checkpoints/step_*")]
    assert not finished.journal.exists()


def test_more_steps_go_on_where_fewer_ended(finished):
    before = open_checkpoint(finished.checkpoints / "step_00000040")
    write_yaml(finished.config, changed(finished, training={"max_steps": 50}, total_steps=50).model_dump(mode="json"))
    train(finished)
    started = [e for e in read_all(finished.journal) if e["event"] == "started"]
    assert [e["step"] for e in started] == [0, 40]
    assert final(finished)[0] == 50
    assert final(finished)[1] != before.model_sha256
    assert [e["step"] for e in read_current(finished.journal) if e["event"] == "step"] == list(range(1, 51))


def test_a_journal_that_lost_steps_or_all_is_told_of(finished):
    config, _ = read_run(finished)
    lines = finished.journal.read_bytes().splitlines(keepends=True)
    finished.journal.write_bytes(b"".join(line for line in lines if b'"step": 17,' not in line))
    (message,) = find_start(finished, config, None).messages
    assert message == ("journal", "journal.jsonl does not tell of 1 of the steps up to 40; the checkpoint is whole")
    finished.journal.unlink()
    (message,) = find_start(finished, config, None).messages
    assert "40 of the steps up to 40" in message[1]


def test_a_folder_elsewhere_is_gone_on_from_and_becomes_the_runs_own(new_run, finished, finished_run):
    folder, place = new_run("moved"), finished.checkpoints / "step_00000030"
    fields = read_yaml(folder.config)
    fields["checkpoint"]["checkpoint_to_resume"] = str(place)
    write_yaml(folder.config, fields)
    train(folder)
    assert final(folder) == final(finished_run)
    assert open_checkpoint(folder.checkpoints / "step_00000030").digest == open_checkpoint(place).digest
    assert [e["step"] for e in read_all(folder.journal) if e["event"] == "started"] == [30]
    shutil.rmtree(finished.path)
    train(folder)  # it is obeyed once
    assert final(folder) == final(finished_run)


def test_a_damaged_or_absent_folder_is_one_line(new_run, finished):
    folder = new_run("moved")
    weights = finished.checkpoints / "step_00000030" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    for place, what in ((weights.parent, "step_00000030/model.safetensors has"), (finished.path / "nowhere", "is not a folder here")):
        config = changed(folder, checkpoint={"checkpoint_to_resume": str(place)})
        with pytest.raises(UserError, match=what):
            find_start(folder, config, None)
    assert CheckpointStore(folder.checkpoints).folders() == []


def fork_of(folder, step, **changes):
    parent = open_checkpoint(folder.checkpoints / f"step_{step:08d}")
    lineage = {"experiment": "finished", "checkpoint": parent.name, "digest": parent.digest}
    return parent, merge(changes, {"checkpoint": {"fork_of": lineage}})


def test_a_fork_with_nothing_changed_ends_where_its_parent_did(corpus, finished, finished_run, tmp_path):
    parent, fields = fork_of(finished, 30)
    fork = make_run(tmp_path / "fork", corpus, **fields)
    process = start_trainer(fork, "--checkpoint", str(parent.path))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert final(fork) == final(finished_run)
    (started,) = [e for e in read_all(fork.journal) if e["event"] == "started"]
    assert started["forked_from"] == fields["checkpoint"]["fork_of"]
    first = open_checkpoint(fork.checkpoints / "step_00000030")
    assert first.model_sha256 == parent.model_sha256
    assert first.state()["config"]["checkpoint"]["fork_of"]["digest"] == parent.digest
    train(fork)  # needs its parent no more


def test_a_fork_may_change_everything_but_the_network(corpus, finished, tmp_path):
    parent, fields = fork_of(finished, 30, seed=8, training={"optimizer": "muon", "learning_rate": 1e-3, "max_steps": 36})
    fork = make_run(tmp_path / "fork", corpus, **fields)
    process = start_trainer(fork, "--checkpoint", str(parent.path))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert final(fork)[0] == 36
    losses = {e["step"]: e["loss"] for e in read_current(fork.journal) if e["event"] == "step"}
    assert list(losses) == list(range(31, 37))
    first = next(e["loss"] for e in read_all(finished.journal) if e["event"] == "step")
    assert losses[31] < first - 0.3, "it did not begin with the parent's weights"
    config = changed(fork, model={"n_layer": 3})
    shutil.rmtree(fork.checkpoints)
    fork.journal.unlink()
    with pytest.raises(UserError, match=r"another network \(model.n_layer: 2, now 3\)"):
        find_start(fork, config, parent.path)


def test_a_fork_of_something_else_is_refused(corpus, finished, tmp_path):
    parent, fields = fork_of(finished, 30)
    fork = make_run(tmp_path / "fork", corpus, **fields)
    config, _ = read_run(fork)
    with pytest.raises(UserError, match="nowhere to be found"):
        find_start(fork, config, None)
    with pytest.raises(UserError, match="another checkpoint than the one with digest"):
        find_start(fork, config, finished.checkpoints / "step_00000040")
    (parent.path / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"checkpoint.fork_of: step_00000030/state.json"):
        find_start(fork, config, parent.path)


def test_none_whole_is_refused(finished):
    config, _ = read_run(finished)
    for path in finished.checkpoints.glob("step_*/model.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(NoWholeCheckpoint, match=r"step_00000040/.*step_00000030/"):
        find_start(finished, config, None)
