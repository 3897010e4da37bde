"""The contestants of benchmarks/stream.py. `python -m benchmarks.contestants TASK` runs one and prints its measurement as JSON.

Each is a function that imports and loads what it needs beforehand, and returns the function that starts it: the clocks run from there
until the tokens of the budget are made. All but the tokenizer deliver what a network takes: batches of int64 [8, max_length + 1].
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.measure import report
from model.config import SYNTH_TEMPLATE, DataConfig
from model.stream.manifest import DatasetManifest
from model.tokenizer import END_OF_TEXT, load_tokenizer

if TYPE_CHECKING:
    import torch

BATCH = 8
"""Windows."""
SEED = 42
BUFFER = 10_000
"""Samples in the shuffle."""
COLUMNS = ["query", "synthetic_reasoning", "synthetic_answer"]
"""Those of the template."""
ENDLESS = 1_000_000
"""Epochs."""

Start = Callable[[], Iterator[int]]


@dataclass(frozen=True)
class Task:
    """What one process is to run."""

    contestant: str
    tokens: int
    """Budget."""
    folder: str
    """Of the parquet files."""
    manifest: str
    """What resolve found in it."""
    cached_manifest: str
    """The same of the first samples only: those whose tokens are cached."""
    cache: str
    """Folder for the token cache."""
    tokens_file: str
    """uint16 tokens made beforehand."""
    threads: int
    """For `ours_threads`."""
    max_length: int

    @property
    def data(self) -> DataConfig:
        """How ours reads the folder."""
        return DataConfig(path=self.folder, max_length=self.max_length, buffer_size=BUFFER)


def datasets_plain(task: Task) -> Start:
    """The way of the tutorials: streaming, filter, shuffle buffer, and one row after the other through the tokenizer."""
    from datasets import load_dataset

    encode = load_tokenizer().encode

    def documents() -> Iterator[list[int]]:
        rows = load_dataset("parquet", data_files=_files(task), split="train", streaming=True)
        for row in rows.filter(lambda row: row["language"] == "en").shuffle(seed=SEED, buffer_size=BUFFER):
            yield [*encode(_text(row), disallowed_special=()), END_OF_TEXT]

    return _loader(task, documents)


def datasets_batched(task: Task) -> Start:
    """The best that `datasets` can do: needed columns and rows only, small record batches, a thousand texts at a time."""
    from datasets import load_dataset

    tokenizer = load_tokenizer()

    def encode(rows: dict[str, list[str | None]]) -> dict[str, list[list[int]]]:
        texts = [_text(dict(zip(COLUMNS, cells, strict=True))) for cells in zip(*(rows[name] for name in COLUMNS), strict=True)]
        return {"tokens": [[*tokens, END_OF_TEXT] for tokens in tokenizer.encode_ordinary_batch(texts, num_threads=1)]}

    def documents() -> Iterator[list[int]]:
        rows = load_dataset(
            "parquet",
            data_files=_files(task),
            split="train",
            streaming=True,
            columns=["language", *COLUMNS],
            filters=[("language", "==", "en")],
            batch_size=1000,
        )
        shuffled = rows.shuffle(seed=SEED, buffer_size=BUFFER)
        for row in shuffled.map(encode, batched=True, batch_size=1000, remove_columns=["language", *COLUMNS]):
            yield row["tokens"]

    return _loader(task, documents)


def ours(task: Task) -> Start:
    """`TrainingWindows`, one thread ahead."""
    return _windows(task, task.manifest, threads=1)


def ours_threads(task: Task) -> Start:
    """`TrainingWindows`, a thread ahead for each core."""
    return _windows(task, task.manifest, threads=task.threads)


def ours_cached(task: Task) -> Start:
    """`TrainingWindows` over samples whose tokens are all in its cache."""
    return _windows(task, task.cached_manifest, threads=1, cache=Path(task.cache))


def tokenizer(task: Task) -> Start:
    """The speed limit: nothing but `encode_to_numpy`, over as many different texts of the same files as make the budget, in memory."""
    encode = load_tokenizer().encode_to_numpy
    tokens_per_sample = DatasetManifest.read(Path(task.manifest)).tokens_per_sample
    texts = english_texts(Path(task.folder), round(task.tokens / tokens_per_sample))

    def start() -> Iterator[int]:
        for text in itertools.cycle(texts):
            yield len(encode(text, disallowed_special=())) + 1

    return start


def memmap(task: Task) -> Start:
    """nanoGPT's way (`get_batch` of its train.py): random places of a file of tokens that was made beforehand."""
    import torch

    def start() -> Iterator[int]:
        rng = np.random.default_rng(SEED)
        length = task.max_length + 1
        while True:
            tokens = np.memmap(task.tokens_file, dtype=np.uint16, mode="r")
            places = rng.integers(len(tokens) - length, size=BATCH)
            yield _count(torch.stack([torch.from_numpy(tokens[place : place + length].astype(np.int64)) for place in places]))

    return start


CONTESTANTS: dict[str, Callable[[Task], Start]] = {
    contestant.__name__: contestant for contestant in (datasets_plain, datasets_batched, ours, ours_threads, tokenizer, memmap, ours_cached)
}


def fill_cache(task: Task) -> None:
    """The epoch that puts the tokens into the cache."""
    from model.stream.batches import TrainingWindows

    manifest = DatasetManifest.read(Path(task.cached_manifest))
    for _ in TrainingWindows(manifest, task.data, SEED, BATCH, num_epochs=1, cache=Path(task.cache)):
        pass


def english_texts(folder: Path, count: int) -> list[str]:
    """The first `count` samples as text."""
    texts: list[str] = []
    for path in sorted(folder.glob("*.parquet")):
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            for batch in file.iter_batches(1000, columns=["language", *COLUMNS]):
                texts += [_text(row) for row in batch.to_pylist() if row["language"] == "en"]
                if len(texts) >= count:
                    return texts[:count]
    return texts


def _text(row: dict[str, str | None]) -> str:
    return SYNTH_TEMPLATE.format_map({name: row[name] or "" for name in COLUMNS})


def _files(task: Task) -> list[str]:
    return sorted(str(path) for path in Path(task.folder).glob("*.parquet"))


def _loader(task: Task, documents: Callable[[], Iterator[list[int]]]) -> Start:
    """Documents packed like ours, through torch's DataLoader."""
    import torch
    from torch.utils.data import DataLoader, IterableDataset

    class Windows(IterableDataset[torch.Tensor]):
        def __iter__(self) -> Iterator[torch.Tensor]:
            waiting = np.empty(0, dtype=np.int64)
            for document in documents():
                waiting = np.concatenate([waiting, np.array(document, dtype=np.int64)])
                while len(waiting) > task.max_length:
                    yield torch.from_numpy(waiting[: task.max_length + 1])
                    waiting = waiting[task.max_length :]

    return lambda: map(_count, DataLoader(Windows(), batch_size=BATCH, num_workers=0))


def _windows(task: Task, manifest: str, **options: Any) -> Start:
    import torch

    from model.stream.batches import TrainingWindows

    found = DatasetManifest.read(Path(manifest))

    def start() -> Iterator[int]:
        for batch in TrainingWindows(found, task.data, SEED, BATCH, num_epochs=ENDLESS, **options):
            yield _count(batch.windows.to(torch.int64))

    return start


def _count(windows: torch.Tensor) -> int:
    """Tokens that are predicted in a batch: a window's first one is not."""
    return windows.shape[0] * (windows.shape[1] - 1)


def main() -> None:
    """Run the task that the command line tells."""
    import pandas  # noqa: F401  pyarrow imports it at its first array, `datasets` with itself: for nobody inside the clock

    task = Task(**json.loads(sys.argv[1]))
    load_tokenizer().encode_to_numpy("warm")
    if task.contestant != "fill_cache":
        report(CONTESTANTS[task.contestant](task), task.tokens)
    fill_cache(task)
    print("null")


if __name__ == "__main__":
    main()
