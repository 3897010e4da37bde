"""Parquet files of SYNTH's columns, lengths and layout for the benchmarks, with realistic prose: a tokenizer's speed depends on it.

The prose is that of a folder of SYNTH-shaped parquet files beside the repository, if there is one, else Python's own documentation.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import pydoc_data.topics
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from model.stream.quickstart import SCHEMA

PROSE_FOLDER = Path(__file__).parents[2] / "shared/data/wiki-synth"

_MEAN_LENGTHS = {"query": 221, "query_seed_text": 1_200, "synthetic_reasoning": 2_078, "synthetic_answer": 1_454}
"""Characters; SYNTH's own means, and as much seed text as makes up its 5.1 kB a row."""
_SPREAD = 0.6
"""Sigma of the log-normal lengths."""
_LANGUAGES = {"en": 0.807, "fr": 0.08, "es": 0.06, "de": 0.0515, None: 0.0015}
_ARTICLES = 115
"""A file."""
_ROWS_AT_ONCE = 5_000


def prose(folder: Path) -> dict[str, str]:
    """A long text for each language there is, `en` among them."""
    if not folder.is_dir():
        return {"en": " ".join(paragraph for topic in pydoc_data.topics.topics.values() for paragraph in topic.split("\n\n"))}
    table = pq.read_table(folder, columns=["language", "synthetic_reasoning", "synthetic_answer"])
    texts: dict[str, dict[str, None]] = {}
    for row in table.to_pylist():
        for text in (row["synthetic_reasoning"], row["synthetic_answer"]):
            if row["language"] and text:
                texts.setdefault(row["language"], {})[text] = None
    rng = random.Random(0)
    return {language: " ".join(rng.sample(list(found), len(found))) for language, found in texts.items()}


def small(parent: Path, texts: dict[str, str], files: int, rows: int) -> Path:
    """A folder of `files` different shards of `rows` rows each, one row group a shard; made if it is not there."""
    folder = parent / f"small-{files}x{rows}-{_identity(texts)}"
    if not folder.is_dir():
        with _Partial(folder) as partial:
            for number in range(files):
                _write(partial / f"part_{number:03d}.parquet", texts, rows, seed=number)
    return folder


def hub_shaped(parent: Path, texts: dict[str, str], files: int, rows: int) -> Path:
    """A folder of `files` files with ONE row group of `rows` rows each, as the Hub's are; made if it is not there.

    They are one file under several names, so they take the room of one.
    """
    folder = parent / f"hub_shaped-{files}x{rows}-{_identity(texts)}"
    if not folder.is_dir():
        with _Partial(folder) as partial:
            first = partial / "part_000.parquet"
            _write(first, texts, rows, seed=1000)
            for number in range(1, files):
                _link(first, partial / f"part_{number:03d}.parquet")
    return folder


def _identity(texts: dict[str, str]) -> str:
    return hashlib.sha256(repr([texts, _MEAN_LENGTHS, _SPREAD, _LANGUAGES]).encode()).hexdigest()[:8]


class _Partial:
    """A folder that appears whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._partial = folder, folder.with_name(f".{folder.name}.{os.getpid()}.partial")

    def __enter__(self) -> Path:
        self._partial.mkdir(parents=True)
        return self._partial

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and not self._folder.exists():
            self._partial.rename(self._folder)
        shutil.rmtree(self._partial, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _write(path: Path, texts: dict[str, str], rows: int, seed: int) -> None:
    """One file of one row group; Snappy, as `datasets` writes."""
    made = _rows(texts, rows, seed)
    parts = (list(itertools.islice(made, _ROWS_AT_ONCE)) for _ in range(0, rows, _ROWS_AT_ONCE))
    table = pa.Table.from_batches([pa.RecordBatch.from_pylist(part, schema=SCHEMA) for part in parts])
    pq.write_table(table, path, row_group_size=rows, compression="snappy")


def _rows(texts: dict[str, str], rows: int, seed: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(seed)
    names, shares = list(_LANGUAGES), list(_LANGUAGES.values())
    weights = [rng.lognormvariate(0, 1) for _ in range(_ARTICLES)]
    for number in range(rows):
        (language,) = rng.choices(names, shares)
        (article,) = rng.choices(range(_ARTICLES), weights)
        text = texts.get(language or "en", texts["en"])
        row = {column: _excerpt(rng, text, mean) for column, mean in _MEAN_LENGTHS.items()}
        yield {
            "synth_id": f"{seed:04x}{number:08x}",
            "language": language,
            "exercise": rng.choice(["memorization", "mcq", "creative writing", "math exercise", "rag"]),
            "model": "none",
            "query_seed_url": f"https://example.org/article/{seed}-{article}",
            "seed_license": "CC-By-SA 4.0",
            "words": sum(len(text) for text in row.values()) // 6,
            **row,
        }


def _excerpt(rng: random.Random, text: str, mean: int) -> str:
    """A piece of the text from some word on, of log-normal length."""
    length = max(1, round(mean * rng.lognormvariate(-_SPREAD * _SPREAD / 2, _SPREAD)))
    start = rng.randrange(max(1, len(text) - length))
    start = text.find(" ", start, start + 200) + 1 or start
    return text[start : start + length]
