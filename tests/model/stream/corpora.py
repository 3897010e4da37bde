"""Small datasets for the tests of the stream, as real parquet files of one row group each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from model.config import DataConfig
from model.stream.batches import TrainingWindows
from model.stream.lanes import plan_lanes
from model.stream.manifest import DatasetManifest
from model.stream.reader import document

TEMPLATE = "{id} {text}"
WORDS = ["the", "river", "stone", "green", "seven", "walks", "under", "light", "paper", "42", "über", "naïve", "文字", "<|endoftext|>"]


def make_rows(count: int, seed: int = 0, articles: int = 7) -> list[dict[str, Any]]:
    """Rows of very different lengths; some languages, articles and texts are null."""
    rng = random.Random(seed)
    return [
        {
            "id": f"row{seed}-{number}",
            "article": rng.choice([None, *(f"https://article/{rng.randrange(articles)}" for _ in range(9))]),
            "language": rng.choice(["en", "en", "en", "fr", None]),
            "text": rng.choice([None, ""] + [" ".join(rng.choices(WORDS, k=rng.choice([1, 3, 8, 40]))) for _ in range(8)]),
            "words": rng.randrange(100),
        }
        for number in range(count)
    ]


SCHEMA = pa.schema([("id", pa.string()), ("article", pa.string()), ("language", pa.string()), ("text", pa.string()), ("words", pa.int64())])


def write_file(path: Path, rows: Sequence[dict[str, Any]], schema: pa.Schema = SCHEMA) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path, row_group_size=max(1, len(rows)))


def write_files(folder: Path, sizes: Sequence[int], seed: int = 0) -> list[list[dict[str, Any]]]:
    files = [make_rows(size, seed=1000 * seed + number) for number, size in enumerate(sizes)]
    for number, rows in enumerate(files):
        write_file(folder / f"part_{number:03d}.parquet", rows)
    return files


def data_config(path: Path | str, **fields: Any) -> DataConfig:
    defaults = {"text_template": TEMPLATE, "id_column": "id", "article_column": "article", "max_length": 16, "buffer_size": 20, "lanes": 2}
    return DataConfig(path=str(path), **{**defaults, **fields})


def text_of(row: dict[str, Any]) -> str:
    return f"{row['id']} {row['text'] or ''}"


def tokens_of(row: dict[str, Any]) -> tuple[int, ...]:
    return tuple(int(token) for token in document(text_of(row)))


def lane_streams(manifest: DatasetManifest, data: DataConfig, seed: int, epochs: int) -> list[list[int]]:
    """Each lane's tokens as delivered, every token once: windows of a lane overlap by the one token they share."""
    streams: list[list[int]] = [[] for _ in plan_lanes(manifest, data.lanes)]
    for batch in TrainingWindows(manifest, data, seed, 1, epochs):
        lane = (batch.state["slot"] - 1) % len(streams)
        window = batch.windows[0].tolist()
        assert not streams[lane] or streams[lane][-1] == window[0]
        streams[lane] += window[1:] if streams[lane] else window
    return streams


def documents_in(stream: Sequence[int]) -> list[tuple[int, ...]]:
    """The whole documents of a token stream; a last one that is cut off is left out."""
    ends = np.flatnonzero(np.array(stream) == 50256) + 1
    return [tuple(piece.tolist()) for piece in np.split(np.array(stream, dtype=np.int64), ends)[:-1]]
