"""How fast, how big and how soon: this project's stream beside the other ways to feed a GPT-2, in one table of one run.

    python -m benchmarks.stream           # six minutes on two cores, and up to 11 GB of memory: for `datasets`
    python -m benchmarks.stream --quick   # under 90 s; the hub-shaped files are smaller, so memory and start look better

Every contestant runs alone, in a process of its own, to the same number of tokens. Data are made once and kept (`--data`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import corpora
from benchmarks.contestants import BUFFER, CONTESTANTS, SEED, Task, english_texts
from benchmarks.measure import in_own_process, machine
from model.config import DataConfig
from model.stream.resolve import resolve
from model.tokenizer import END_OF_TEXT, load_tokenizer

FILES = 8
_PREPARED_TOKENS = 4_000_000
"""Tokens made beforehand for the memory map and the cache, at most; they go over them as often as it takes."""
_SPARE = 1.2
"""Of which the validation split takes its part."""


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    rows: int
    """Of each hub-shaped file."""
    small_rows: int
    """Of each small shard."""
    tokens: int
    """Each contestant makes, on the hub-shaped files."""
    small_tokens: int
    """The same on the small shards. Less than they hold beside a full shuffle buffer: `datasets` sleeps 5 s when it has read all."""


FULL = Size(rows=155_000, small_rows=5_000, tokens=80_000_000, small_tokens=18_000_000)
QUICK = Size(rows=12_000, small_rows=3_000, tokens=5_000_000, small_tokens=5_000_000)

Results = dict[str, dict[str, dict[str, Any]]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write it as JSON if asked to."""
    options = _options(arguments)
    size = _size(options)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    console = Console(stderr=True)
    results: Results = {}
    with console.status("making the data") as status:
        options.data.mkdir(parents=True, exist_ok=True)
        texts = corpora.prose(corpora.PROSE_FOLDER)
        folders = {
            "small": (corpora.small(options.data, texts, FILES, size.small_rows), size.small_tokens),
            "hub_shaped": (corpora.hub_shaped(options.data, texts, FILES, size.rows), size.tokens),
        }
        for dataset, (folder, tokens) in folders.items():
            status.update(f"{dataset}: resolving, filling the cache")
            task = _prepared(folder, tokens, cores, options.data)
            results[dataset] = {}
            for turn, contestant in itertools.product(range(options.repeat), CONTESTANTS):
                status.update(f"{dataset}: {contestant}, {turn + 1} of {options.repeat}")
                found = _run(contestant, task, options.data)
                best = results[dataset].setdefault(contestant, found)
                results[dataset][contestant] = max(best, found, key=lambda found: found["tokens_per_cpu_s"])
    Console(width=None if Console().is_terminal else 140).print(_table(results, size))
    if options.json:
        options.json.write_text(json.dumps({**results, "machine": machine(cores), "size": asdict(size)}, indent=1) + "\n", encoding="utf-8")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stream", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="under 90 seconds, with smaller hub-shaped files")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        default=Path(tempfile.gettempdir()) / "gpt2-stream-benchmark",
        help="where the generated data are kept for the next time (0.6 GB; default: %(default)s)",
    )
    parser.add_argument("--tokens", type=int, metavar="N", help="each contestant makes N tokens")
    parser.add_argument("--rows", type=int, metavar="N", help="rows of each hub-shaped file; a small shard has no more")
    parser.add_argument(
        "--repeat",
        type=int,
        metavar="N",
        default=1,
        help="take turns N times and keep each contestant's best: for a machine that others use",
    )
    options = parser.parse_args(arguments)
    options.data = options.data.absolute()
    return options


def _size(options: argparse.Namespace) -> Size:
    size = QUICK if options.quick else FULL
    rows = options.rows or size.rows
    return Size(rows, min(rows, size.small_rows), options.tokens or size.tokens, options.tokens or size.small_tokens)


def _prepared(folder: Path, tokens: int, cores: int, data_folder: Path) -> Task:
    """What is done once, before any clock runs: the manifest, the tokens of the first samples in a file and in the cache."""
    data = DataConfig(path=str(folder), buffer_size=BUFFER)
    manifest = resolve(data, SEED, data_folder)
    count = min(tokens, _PREPARED_TOKENS)
    few = data.model_copy(update={"num_samples": max(data.lanes * 8, round(_SPARE * count / manifest.tokens_per_sample))})
    first = resolve(few, SEED, data_folder)
    work = data_folder / f"{folder.name}.prepared-{first.samples}"
    work.mkdir(exist_ok=True)
    manifest.write(work / "manifest.json")
    first.write(work / "cached_manifest.json")
    encode = load_tokenizer().encode_to_numpy
    texts = english_texts(folder, first.train_samples)
    np.concatenate([np.append(encode(text, disallowed_special=()), END_OF_TEXT).astype(np.uint16) for text in texts]).tofile(
        work / "tokens.bin"
    )
    names = {
        "manifest": work / "manifest.json",
        "cached_manifest": work / "cached_manifest.json",
        "cache": work / "cache",
        "tokens_file": work / "tokens.bin",
    }
    places = {name: str(path) for name, path in names.items()}
    task = Task("fill_cache", tokens, str(folder), threads=cores, max_length=data.max_length, **places)
    _run("fill_cache", task, data_folder)
    return task


def _run(contestant: str, task: Task, data_folder: Path) -> Any:
    """The measurement of one contestant; `datasets` keeps what it keeps in the data folder and asks nobody."""
    env = {**os.environ, "HF_HOME": str(data_folder / "huggingface"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return in_own_process("benchmarks.contestants", {**asdict(task), "contestant": contestant}, env)


def _table(results: Results, size: Size) -> Table:
    share = "" if size.rows >= FULL.rows else f" (the Hub's have {FULL.rows:,})"
    caption = (
        f"{FILES} hub-shaped files of one row group of {size.rows:,} rows{share}, {size.tokens / 1e6:g} M tokens each; "
        f"{FILES} small shards of {size.small_rows:,} rows, {size.small_tokens / 1e6:g} M tokens. "
        "CPU seconds: of all threads, from before the dataset is opened; “later”: from the first batch on. "
        "MB read: before the first batch, memory maps not counted."
    )
    table = Table(title="The stream", caption=caption)
    table.add_column("contestant")
    for heading in ("Mtok/CPU-s", "× plain", "× tokenizer", "later", "Mtok/s wall", "peak RSS MB", "MB read", "s to 1st batch"):
        table.add_column(heading, justify="right")
    for dataset, rows in results.items():
        table.add_section()
        table.add_row(f"[bold]{dataset}")
        for contestant, found in rows.items():
            table.add_row(contestant, *_cells(found, rows))
    return table


def _cells(found: dict[str, Any], rows: dict[str, dict[str, Any]]) -> list[str]:
    speed, read = found["tokens_per_cpu_s"], found["bytes_to_first_batch"]
    return [
        f"{speed / 1e6:.2f}",
        f"{speed / rows['datasets_plain']['tokens_per_cpu_s']:.2f}",
        f"{speed / rows['tokenizer']['tokens_per_cpu_s']:.2f}",
        f"{found['tokens_per_cpu_s_after_first_batch'] / 1e6:.2f}",
        f"{found['tokens_per_wall_s'] / 1e6:.2f}",
        f"{found['peak_rss_mb']:,.0f}",
        "–" if read is None else f"{read / 1e6:,.1f}",
        f"{found['seconds_to_first_batch']:.2f}",
    ]


if __name__ == "__main__":
    main()
