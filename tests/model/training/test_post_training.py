"""Post-training: it begins with a trained network, seals that as its step 0, and goes on like any training."""

import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from model.checkpoint.store import MODEL, OPTIMIZER, CheckpointStore, open_checkpoint
from model.digest import file_sha256
from model.errors import UserError
from model.evaluation.likelihood import validation_loss
from model.huggingface import export, load_model
from model.params import merge, read_yaml, write_yaml
from model.stream.row_packing import IGNORED, count_learned, count_read
from model.stream.validation import validation_windows
from model.tokenizer import decode
from model.training.journal import read_all, read_current
from model.training.resume import find_start
from model.training.run import read_run
from tests.model.training.conftest import final, make_run, start_trainer, train

pytestmark = pytest.mark.slow

LENGTHS = {"training": {"max_steps": 20, "eval_freq": 10, "learning_rate": 1e-3}}


@pytest.fixture(scope="module")
def base(finished_run):
    return CheckpointStore(finished_run.checkpoints).checkpoints()[-1]


@pytest.fixture
def new_post_training(corpus, tmp_path, base):
    def make(name="tuned", **changes):
        fields = merge({"post_training": {"base": str(base.path)}, **LENGTHS}, changes)
        return make_run(tmp_path / name, corpus, **fields)

    return make


@pytest.fixture(scope="module")
def tuned(corpus, tmp_path_factory, base):
    """Trained once, never touched: compare with it."""
    run = make_run(tmp_path_factory.mktemp("post") / "tuned", corpus, post_training={"base": str(base.path)}, **LENGTHS)
    train(run)
    return run


def events(folder, name):
    return [event for event in read_current(folder.journal) if event["event"] == name]


def test_step_0_is_the_base_itself(tuned, base):
    first, *_ = CheckpointStore(tuned.checkpoints).checkpoints()
    assert (first.name, first.model_sha256) == ("step_00000000", base.model_sha256)
    with safe_open(first.path / OPTIMIZER, "numpy") as state:
        assert not list(state.keys()), "the optimizer begins anew"
    started = events(tuned, "started")[0]
    assert (started["step"], started["resumed_from"]) == (0, None)
    assert started["post_trains"]["digest"] == base.digest
    assert not base.path.samefile(first.path)


def test_the_base_is_validated_first_and_only_on_completions(tuned):
    config, manifest = read_run(tuned)
    count = config.training.eval_iters * config.training.batch_size
    windows = validation_windows(manifest, config.data, config.seed, count, "rows")
    assert count_learned(windows) < count_read(windows) < windows[:, 0].size
    before, *_, after = events(tuned, "validation")
    assert before["step"] == 0
    network = load_model(tuned.checkpoints / "step_00000000")
    assert before["loss"] == pytest.approx(validation_loss(network, windows, 4)[0], rel=1e-5)
    assert after["loss"] < before["loss"]


def test_steps_tell_what_was_read_and_what_was_learned(tuned):
    steps, tokens = events(tuned, "step"), 0
    for step in steps:
        read, tokens = step["tokens"] - tokens, step["tokens"]
        assert 0 < step["completion_tokens"] < read <= 4 * 32
    assert {"too_long", "unanswered"} <= set(events(tuned, "checkpoint")[-1]["odd_rows"])


def test_interrupted_it_ends_with_the_same_weights_without_its_base(new_post_training, tuned, base, tmp_path):
    moved = shutil.copytree(base.path, tmp_path / base.name)
    folder = new_post_training(post_training={"base": str(moved)})
    process = start_trainer(folder)
    while not events(folder, "step"):
        assert process.poll() is None, process.stderr.read()
    process.kill()
    process.wait()
    shutil.rmtree(moved)
    process = start_trainer(folder, "--checkpoint", "/nowhere")
    assert process.wait(120) == 0, process.stderr.read()
    assert final(folder) == final(tuned)


def test_ranks_learn_the_same(new_post_training):
    folder = new_post_training(model={"dropout": 0.0}, data={"lanes": 4})
    alone = new_post_training("alone", model={"dropout": 0.0}, data={"lanes": 4})
    process = start_trainer(folder, "--set", "hardware.devices=2")
    train(alone)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    for one, other in zip(events(alone, "step"), events(folder, "step"), strict=True):
        assert (one["tokens"], one["completion_tokens"]) == (other["tokens"], other["completion_tokens"])
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)


def test_a_spike_goes_back_as_far_as_the_base(new_post_training, base):
    spikes = {"action": "rollback", "threshold": 1.2, "history": 8}
    training = {"learning_rate": 1e-2, "max_bad_steps": 100, "max_steps": 24, "spike": spikes, "gradient_accumulation": 1}
    folder = new_post_training(training=training, checkpoint={"save_every_n_iterations": 100})
    train(folder)
    back = [event for event in read_all(folder.journal) if event["event"] == "started" and "rolled_back_from" in event]
    assert back, "such a threshold makes an ordinary step a spike"
    assert back[0]["resumed_from"] == "step_00000000"
    assert open_checkpoint(folder.checkpoints / "step_00000000").model_sha256 == base.model_sha256


def test_the_base_stays_when_older_checkpoints_go(new_post_training):
    folder = new_post_training(checkpoint={"save_every_n_iterations": 4, "keep_last": 1})
    train(folder)
    first, *others = CheckpointStore(folder.checkpoints).checkpoints()
    assert first.step == 0
    assert len(others) <= 2


def test_it_begins_with_an_export(new_post_training, base, tuned, tmp_path):
    place = tmp_path / "exported"
    export(load_model(base.path), place)
    folder = new_post_training()
    config = read_yaml(folder.config)
    config["post_training"]["base"] = {"source": str(place), "digest": file_sha256(place / MODEL)}
    write_yaml(folder.config, config)
    train(folder)
    steps = [[event["loss"] for event in events(run, "step")] for run in (folder, tuned)]
    assert steps[0] == steps[1]


def damaged(folder, place):
    weights = place / MODEL
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)


def gone(folder, place):
    shutil.rmtree(place)


def replaced(folder, place):
    gone(folder, place)
    shutil.copytree(CheckpointStore(folder.checkpoints).checkpoints()[0].path, place)


@pytest.mark.parametrize(("done", "what"), [(damaged, "SHA-256 differs"), (gone, "No such file"), (replaced, "another network than")])
def test_a_base_that_is_not_what_was_pinned_is_refused(new_post_training, base, finished_run, tmp_path, done, what):
    place = shutil.copytree(base.path, tmp_path / "base")
    folder = new_post_training(post_training={"base": str(place)})
    done(finished_run, place)
    errors = train(folder, exit_code=2)
    assert errors.startswith("error: post_training.base: ")
    assert what in errors
    assert len(errors.strip().splitlines()) == 1
    assert not any(folder.checkpoints.glob("step_*"))


def test_without_its_base_it_says_what_is_missing(new_post_training):
    folder = new_post_training()
    with pytest.raises(UserError, match=r"^post_training\.base: .* is nowhere to be found; bring it back"):
        find_start(folder, read_run(folder)[0], None)


def test_another_dataset_by_configuration_alone(new_post_training, tmp_path):
    rows = [{"ask": f"How many is {n} and one?", "reply": f"{n + 1}"} for n in range(400)]
    (tmp_path / "other").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "other" / "rows.parquet")
    other = {
        "path": str(tmp_path / "other"),
        "text_template": "{ask} It is {reply}.",
        "id_column": "ask",
        "article_column": None,
        "filter": None,
    }
    folder = new_post_training(data={**other, "lanes": 1}, training={"max_steps": 4, "eval_freq": 4})
    train(folder)
    windows = load_file(folder.validation_windows)["windows"]
    learned = windows[0, 1][windows[0, 1] != IGNORED].tolist()
    assert re.match(r"( It is \d+\.<\|endoftext\|>)+$", decode(learned))


def test_one_row_a_window(new_post_training):
    folder = new_post_training(post_training={"packing": False}, data={"max_length": 96}, training={"max_steps": 2})
    packed = new_post_training("packed", data={"max_length": 96}, training={"max_steps": 2})
    for each in (folder, packed):
        train(each)
    one, several = (events(each, "step")[-1]["tokens"] for each in (folder, packed))
    assert one < several
