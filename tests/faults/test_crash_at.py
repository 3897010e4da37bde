"""A crash at each single write, fsync and rename that durability hangs on: the next start recovers, as if nothing had been.

As `__main__` (`python -m tests.faults.test_crash_at FOLDER`) it stores evaluation results, to be killed at it.
"""

import functools
import random
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from model.evaluation.score_store import store_scores, stored_scores
from model.evaluation.scores import Scores
from tests.faults.conftest import said, wait_for_event

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

DOUBLE_CRASHES = 12
BASE_SEALED = 16
"""After so many operations a post-training has sealed what it begins with: what comes then is as in any training."""
SCORES = {
    key * 64: Scores(
        {"text_bits_per_byte": 1.5 + number, "exact_match": 0.25},
        {"text_bits_per_byte": (1.25 + number, 1.75 + number)},
        [{"id": str(row), "half": "choose", "answer_bits": row / 7, "answer": None if row % 2 else "ä"} for row in range(50)],
        [{"prompt": "Q: Who?", "text": "ß"}],
    )
    for number, key in enumerate("ab")
}


def operations_of(started, counted, code=0):
    """How many operations a process makes, counted to a file while it comes to its end."""
    process = started({"CRASH_COUNT": str(counted)})
    assert process.wait(60) == code
    return int(counted.read_text())


def every(numbers, check):
    """Check each, two at a time; all that failed are told together."""
    failed = []

    def one(number):
        try:
            check(number)
        except BaseException as error:
            failed.append((number, error))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, numbers))
    failed.sort(key=lambda failure: failure[0])
    told = "\n".join(f"{number}: {type(error).__name__}: {str(error)[:1500]}" for number, error in failed[:5])
    assert not failed, f"{len(failed)} of {len(numbers)} failed: {[number for number, _ in failed]}\n{told}"


VARIANTS = pytest.mark.parametrize("variant", ["short", "post-trained, short"])


@pytest.fixture(scope="module")
def operations(trainer, undisturbed, tmp_path_factory):
    """How many there are in an uninterrupted training of a variant."""

    @functools.cache
    def of(variant):
        root = tmp_path_factory.mktemp("counted")
        folder = undisturbed(variant).copy_beginning(root / "run")
        count = operations_of(lambda environment: trainer.start(folder, environment=environment), root / "count")
        undisturbed(variant).check_equal(folder)
        return count

    return of


def crash(trainer, folder, number):
    """Start a training that dies at this operation; False if it came to its end before."""
    code = trainer.start(folder, environment={"CRASH_AT": str(number)}).wait(60)
    assert code in (0, -signal.SIGKILL), f"ended with {code} instead: {said(folder)}"
    return code != 0


@VARIANTS
def test_every_operation_of_a_training_may_be_its_last(trainer, undisturbed, operations, tmp_path, variant):
    expected = undisturbed(variant)
    assert operations(variant) >= 60, "store, journal, and token cache count their operations"

    def check(number):
        folder = expected.copy_beginning(tmp_path / str(number) / "run")
        assert crash(trainer, folder, number)
        trainer.train(folder)
        expected.check_equal(folder)

    each = range(1, operations(variant) + 1)
    every(each if variant == "short" else [number for number in each if number <= BASE_SEALED or number % 8 == 0], check)


def test_a_recovery_may_crash_too(trainer, undisturbed, operations, tmp_path):
    expected, count, rng = undisturbed("short"), operations("short"), random.Random(1)

    def check(pair):
        folder = expected.copy_beginning(tmp_path / "-".join(map(str, pair)) / "run")
        assert crash(trainer, folder, pair[0])
        crash(trainer, folder, pair[1])
        trainer.train(folder)
        expected.check_equal(folder)

    pairs = [(first := rng.randint(1, count), rng.randint(1, max(1, count - first // 2))) for _ in range(DOUBLE_CRASHES)]
    every(pairs, check)


def test_every_operation_of_a_stop_may_be_its_last(trainer, undisturbed, tmp_path):
    """The emergency checkpoint, too, is there or not at all."""
    expected = undisturbed("unsaved")

    def stop(folder, environment):
        process = trainer.start(folder, environment=environment)
        wait_for_event(folder, process, "step", 1)
        process.send_signal(signal.SIGTERM)
        return process

    stopped = expected.copy_beginning(tmp_path / "counted" / "run")
    count = operations_of(lambda environment: stop(stopped, environment), tmp_path / "count", 75)

    def check(number):
        folder = expected.copy_beginning(tmp_path / str(number) / "run")
        assert stop(folder, {"CRASH_AT": str(number)}).wait(60) in (75, -signal.SIGKILL)
        trainer.train(folder)
        expected.check_equal(folder)

    every(range(max(1, count - 12), count + 1), check)


def test_every_operation_of_storing_scores_may_be_its_last(warm, tmp_path):
    def store(folder, environment):
        return warm.start("tests.faults.test_crash_at", str(folder), environment=environment, stderr=tmp_path / f"{folder.name}.said")

    count = operations_of(lambda environment: store(tmp_path / "counted", environment), tmp_path / "count")
    assert count >= 2 * 4

    def check(number):
        folder = tmp_path / str(number)
        assert store(folder, {"CRASH_AT": str(number)}).wait(60) == -signal.SIGKILL
        for key, scores in SCORES.items():
            assert stored_scores(folder, key) in (None, scores)
        assert store(folder, {}).wait(60) == 0
        for key, scores in SCORES.items():
            assert stored_scores(folder, key) == scores
        assert {path.name for path in folder.rglob("*")} == {path.name for path in (tmp_path / "counted").rglob("*")}

    every(range(1, count + 1), check)


if __name__ == "__main__":
    for key, scores in SCORES.items():
        if stored_scores(Path(sys.argv[1]), key) is None:
            store_scores(Path(sys.argv[1]), key, scores)
