"""The scores that a run keeps, each under its key: whole or not there at all, and made once however many evaluators there are.

    evaluation/
        0123456789abcdef01234567/   the key's beginning
            items.parquet           a row an item
            summary.json            figures, intervals, samples, and the SHA-256 of the above
    .evaluation.claims/
        0123456789abcdef01234567    locked by the evaluator that is at it; the system lets go of it when that ends, however it ends

The claims lie beside the folder and not in it: what is in it is versioned.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from model import disk
from model.digest import sealed, unsealed
from model.errors import Stopped
from model.evaluation.scores import Scores

SECONDS_BETWEEN_LOOKS = 0.1
"""How soon an evaluator looks again whether what another one is at is done."""


def stored_scores(folder: Path, key: str) -> Scores | None:
    """What was scored under this key before; None if nothing whole is there."""
    place = _place(folder, key)
    try:
        contents = unsealed((place / "summary.json").read_text(encoding="utf-8"))
        items = (place / "items.parquet").read_bytes()
        if contents["key"] != key or contents["items_sha256"] != hashlib.sha256(items).hexdigest():
            return None
        intervals = {name: (low, high) for name, (low, high) in contents["intervals"].items()}
        return Scores(contents["summary"], intervals, pq.read_table(pa.BufferReader(items)).to_pylist(), contents["samples"])
    except (OSError, ValueError, KeyError, pa.ArrowException):
        return None


def store_scores(folder: Path, key: str, scores: Scores) -> None:
    """Keep the scores under their key, all at once: a kill half-way leaves nothing that counts."""
    assert all(math.isfinite(value) for value in scores.summary.values())
    place = _place(folder, key)
    partial = folder / f".{place.name}.{os.getpid()}.partial"
    disk.sweep(folder, f".{place.name}.")
    partial.mkdir(parents=True)
    items = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(scores.items), items)
    disk.write_file(partial / "items.parquet", items.getvalue())
    contents = {
        "key": key,
        "items_sha256": hashlib.sha256(items.getvalue()).hexdigest(),
        "summary": scores.summary,
        "intervals": {name: list(interval) for name, interval in scores.intervals.items()},
        "samples": scores.samples,
    }
    disk.write_file(partial / "summary.json", sealed(contents).encode())
    if place.exists():  # what lay there was not whole, or `stored_scores` would have found it
        shutil.rmtree(place)
    try:
        disk.rename(partial, place)
        disk.fsync(folder)
    except OSError:
        if stored_scores(folder, key) is None:
            raise
        shutil.rmtree(partial)  # somebody else scored the same at the same time


@contextlib.contextmanager
def claim(folder: Path, key: str) -> Iterator[bool]:
    """Whether this evaluator alone may score the key meanwhile; False if another one is at it."""
    place = _place(folder, key)
    claims = folder.with_name(f".{folder.name}.claims")
    claims.mkdir(parents=True, exist_ok=True)
    lock = FileLock(claims / place.name)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def score_each(folder: Path, keys: Sequence[str], compute: Callable[[int], Scores]) -> Iterator[tuple[int, Scores | Exception]]:
    """The scores of each key, as (its index, its scores), in the order in which they are there: stored before, or by another evaluator
    meanwhile, or of `compute(index)`. What fails comes as its exception, is not stored, and keeps none of the others back.

    Raises:
        Stopped: `compute` did.
    """
    waiting = list(range(len(keys)))
    while waiting:
        busy = []
        for index in waiting:
            result = stored_scores(folder, keys[index]) or _score_claimed(folder, keys[index], lambda index=index: compute(index))  # type: ignore[misc]
            if result is None:
                busy.append(index)
            else:
                yield index, result
        if busy == waiting:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        waiting = busy


def _score_claimed(folder: Path, key: str, compute: Callable[[], Scores]) -> Scores | Exception | None:
    """None: another evaluator is at it."""
    with claim(folder, key) as ours:
        if not ours:
            return None
        scores = stored_scores(folder, key)  # another one was quicker
        if scores is None:
            try:
                scores = compute()
                store_scores(folder, key, scores)
            except Stopped:
                raise
            except Exception as error:
                return error
        return scores


def _place(folder: Path, key: str) -> Path:
    return folder / key[:24]
