"""Every checkpoint is scored once, however many evaluators there are and however they end."""

import multiprocessing
import os
import signal
import time

import pytest
import torch

from model.config import ModelConfig
from model.errors import Stopped
from model.evaluation.likelihood import continuation_bits
from model.evaluation.score_store import claim, score_each, store_scores, stored_scores
from model.evaluation.scores import Scores
from model.gpt2 import GPT2

PROCESSES = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
if os.name != "nt":
    PROCESSES.set_forkserver_preload([__name__])  # torch is imported once for all of them
PAIRS = [("Q: 1 + 1?", " 2"), ("Q: 2 + 2?", " 4"), ("Q: Who?", " He."), ("Q: Why?", " So.")]


def key_of(number):
    return f"{number:064x}"[::-1]


def scores_of(number):
    """The scores of a network that `number` decides."""
    torch.manual_seed(number)
    network = GPT2(ModelConfig(preset="nano", n_layer=1, n_head=1, n_embd=4, context_length=16))
    bits = continuation_bits(network, PAIRS, 2)
    rows = [
        {"half": "report", "id": question, "answer_bits": bit, "well_formed": None} for (question, _), bit in zip(PAIRS, bits, strict=True)
    ]
    return Scores({"answer_bits_per_byte": sum(bits)}, {"answer_bits_per_byte": (0.0, sum(bits))}, rows, [{"prompt": "Q: ", "text": "?"}])


def evaluate(folder, keys, told, seconds):
    """What one evaluator does, as a process of its own: tells what it is at, what it scored itself, and what it has."""
    torch.set_num_threads(1)
    with told.open("w", buffering=1) as say:

        def compute(number):
            say.write(f"at {number}\n")
            time.sleep(seconds)
            scores = scores_of(number)
            say.write(f"scored {number}\n")
            return scores

        for number, result in score_each(folder, [key_of(number) for number in range(keys)], compute):
            say.write(f"has {number}\n" if isinstance(result, Scores) else f"failed {result}\n")


def said(told, what):
    lines = told.read_text().splitlines() if told.exists() else []
    return [int(line.split()[1]) for line in lines if line.startswith(what)]


@pytest.mark.slow
def test_eight_evaluators_of_a_hundred_checkpoints_score_each_once(tmp_path):
    folder, told = tmp_path / "evaluation", [tmp_path / str(number) for number in range(8)]
    evaluators = [PROCESSES.Process(target=evaluate, args=(folder, 100, file, 0.0)) for file in told]
    for process in evaluators:
        process.start()
    for process in evaluators:
        process.join(120)
    assert [process.exitcode for process in evaluators] == [0] * 8
    scored = [said(file, "scored") for file in told]
    assert sorted(number for numbers in scored for number in numbers) == list(range(100)), "each by one of them, none twice"
    assert sum(map(bool, scored)) > 1, "they shared the work"
    for file in told:
        assert sorted(said(file, "has")) == list(range(100)), "and each of them has all"
    assert sorted(path.name for path in folder.iterdir()) == sorted(key_of(number)[:24] for number in range(100))
    for number in (0, 57, 99):
        assert stored_scores(folder, key_of(number)) == scores_of(number)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_a_killed_evaluator_leaves_nothing_that_counts_and_its_claim_is_free_at_once(tmp_path):
    folder, told = tmp_path / "evaluation", tmp_path / "told"
    process = PROCESSES.Process(target=evaluate, args=(folder, 1, told, 600.0))
    process.start()
    deadline = time.monotonic() + 60
    while not said(told, "at"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with claim(folder, key_of(0)) as ours:
        assert not ours, "it is at it"
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    with claim(folder, key_of(0)) as ours:
        assert ours
    assert not list(folder.glob("*"))
    began = time.monotonic()
    assert list(score_each(folder, [key_of(0)], scores_of)) == [(0, scores_of(0))]
    assert time.monotonic() - began < 5, "nobody waits for the dead"


def test_an_evaluator_goes_on_with_others_and_comes_back_for_what_was_busy(tmp_path):
    done = []

    def compute(number):
        done.append(number)
        return scores_of(number)

    with claim(tmp_path / "evaluation", key_of(1)) as ours:
        assert ours
        each = score_each(tmp_path / "evaluation", [key_of(number) for number in range(4)], compute)
        assert [next(each)[0] for _ in range(3)] == [0, 2, 3]
        store_scores(tmp_path / "evaluation", key_of(1), scores_of(1))
    assert list(each) == [(1, scores_of(1))]
    assert done == [0, 2, 3], "what the other one did is taken as it is"


def test_a_failure_is_told_and_never_stored_and_keeps_no_other_back(tmp_path):
    def compute(number):
        if number == 1:
            raise ValueError("a weight that is not a number")
        return scores_of(number)

    keys = [key_of(number) for number in range(3)]
    found = dict(score_each(tmp_path / "evaluation", keys, compute))
    assert (found[0], found[2]) == (scores_of(0), scores_of(2))
    assert isinstance(found[1], ValueError)
    assert stored_scores(tmp_path / "evaluation", key_of(1)) is None
    assert dict(score_each(tmp_path / "evaluation", keys, scores_of))[1] == scores_of(1), "tried again, and the claim was given back"


def test_a_stop_is_no_failure(tmp_path):
    def compute(number):
        raise Stopped("asked to")

    with pytest.raises(Stopped):
        list(score_each(tmp_path / "evaluation", [key_of(0), key_of(1)], compute))
    assert not list((tmp_path / "evaluation").glob("*"))


@pytest.mark.parametrize("name", ["items.parquet", "summary.json"])
def test_a_damaged_byte_is_noticed_and_scored_again(tmp_path, name):
    folder = tmp_path / "evaluation"
    store_scores(folder, key_of(0), scores_of(0))
    place = next(folder.iterdir())
    content = bytearray((place / name).read_bytes())
    content[len(content) // 2] ^= 1
    (place / name).write_bytes(content)
    assert stored_scores(folder, key_of(0)) is None
    assert list(score_each(folder, [key_of(0)], scores_of)) == [(0, scores_of(0))]
    assert stored_scores(folder, key_of(0)) == scores_of(0)


def test_equal_beginnings_of_keys_are_not_taken_for_equal_keys(tmp_path):
    store_scores(tmp_path, "a" * 64, scores_of(0))
    assert stored_scores(tmp_path, "a" * 63 + "b") is None
