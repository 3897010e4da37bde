"""What it costs that rows in a window do not see each other: forward and backward pass over the same rows, in one table of one run.

    python -m benchmarks.post_training                             # a tiny network, windows of 1,024 tokens: three minutes on one core
    python -m benchmarks.post_training --preset small --rows 64    # GPT-2 124M, on a GPU

The ways take turns, so what a busy machine does to one it does to its neighbours; a ratio is the median over the rounds of paired figures.
transformers is the peer: rows padded to the longest of their batch, questions and padding labelled -100.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.corpora import PROSE_FOLDER, prose, small
from model.config import PRESETS, SYNTH_TEMPLATE, DataConfig, ModelConfig
from model.gpt2 import GPT2, SummedCrossEntropy
from model.huggingface import hugging_face_config, to_hugging_face
from model.stream.reader import Reader
from model.stream.resolve import resolve
from model.stream.row_packing import IGNORED, Row, packed, rows_of
from model.tokenizer import END_OF_TEXT

REFERENCE = "rows packed, attention across rows"
Way = Callable[[], None]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write it as JSON if asked to."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = _rows(options.rows, options.max_length)
    network = GPT2(ModelConfig(preset=options.preset, context_length=options.max_length, dropout=0.0)).to(device).train()
    together, alone = (np.stack(packed(rows, options.max_length, one_each)) for one_each in (False, True))
    ways: dict[str, tuple[Way, int]] = {
        REFERENCE: (_ours(network, together, options.batch, apart=False), together[:, 0].size),
        "rows packed, each alone (ours)": (_ours(network, together, options.batch, apart=True), together[:, 0].size),
        "one row a window": (_ours(network, alone, options.batch, apart=True), alone[:, 0].size),
        "transformers, padded": _theirs(network, rows, options.batch, device),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with Console(stderr=True).status("warming up") as status:
        for way, _ in ways.values():
            way()
        names = list(ways)
        for number in range(options.rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                status.update(f"round {number + 1} of {options.rounds}: {name}")
                network.zero_grad()
                began = time.perf_counter()
                ways[name][0]()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - began)
    read = sum(len(row.tokens) for row in rows)
    learned = sum(len(row.tokens) - row.completion for row in rows)
    results = {
        name: {
            "seconds": statistics.median(seconds[name]),
            "ratio": statistics.median(ours / theirs for ours, theirs in zip(seconds[name], seconds[REFERENCE], strict=True)),
            "tokens_per_s": read / statistics.median(seconds[name]),
            "filled": read / positions,
        }
        for name, (_, positions) in ways.items()
    }
    table = Table(
        title=f"{options.preset}, {len(rows)} rows of at most {options.max_length} tokens: {read:,} tokens, {learned:,} of them learned"
    )
    for column in ("way", "seconds", "times the first", "tokens/s", "positions filled"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name, row in results.items():
        table.add_row(name, f"{row['seconds']:.2f}", f"{row['ratio']:.2f}", f"{row['tokens_per_s']:,.0f}", f"{row['filled']:.0%}")
    Console(width=None if Console().is_terminal else 120).print(table)
    if options.json:
        options.json.write_text(json.dumps({"results": results, "rows": len(rows), "read": read, "learned": learned}, indent=1) + "\n")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.post_training", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", choices=list(PRESETS), default="tiny", help="size of the network (default: tiny)")
    parser.add_argument("--max-length", type=int, default=1024, metavar="T", help="tokens a window (default: 1024)")
    parser.add_argument("--rows", type=int, default=12, metavar="N", help="rows a round (default: 12)")
    parser.add_argument("--batch", type=int, default=4, metavar="B", help="windows, or rows of the peer, at once (default: 4)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of each way (default: 5)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="on a CPU (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    return parser.parse_args(arguments)


def _rows(count: int, max_length: int) -> list[Row]:
    """The first rows of SYNTH's shape that fit."""
    with tempfile.TemporaryDirectory() as scratch:
        corpus = small(Path(scratch), prose(PROSE_FOLDER), files=1, rows=max(2_000, 100 * count))
        data = DataConfig(path=str(corpus), filter=None, max_length=max_length, text_template=SYNTH_TEMPLATE)
        reader, found = Reader(data, 0, rows=True), []
        for file in resolve(data, 0, Path(scratch)).files:
            for batch in reader.samples(file, ["train"], data.text_columns):
                found += [row for documents in reader.texts(batch).documents() for row in rows_of(documents) if row is not None]
                if len(found) >= count:
                    return found[:count]
    raise SystemExit(f"--max-length {max_length}: only {len(found)} rows fit; raise it, or ask for fewer --rows")


def _ours(network: GPT2, windows: np.ndarray, batch: int, apart: bool) -> Way:
    device = network.wte.weight.device
    whole = torch.from_numpy(windows.astype(np.int64)).to(device)

    def way() -> None:
        for part in whole.split(batch):
            targets_N = part[:, 1].flatten()
            wanted_N = (targets_N != IGNORED).nonzero()[:, 0]
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                x_ND = network.hidden(part[:, 0], apart=apart).flatten(0, 1)[wanted_N]
                SummedCrossEntropy.apply(x_ND, network.wte.weight, targets_N[wanted_N], True).backward()

    return way


def _theirs(network: GPT2, rows: Sequence[Row], batch: int, device: torch.device) -> tuple[Way, int]:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(**hugging_face_config(network.config))).to(device).train()
    model.load_state_dict({**to_hugging_face(network.state_dict()), "lm_head.weight": network.wte.weight.detach()})
    batches: list[dict[str, Any]] = []
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        longest = max(len(row.tokens) for row in some) + 1
        tokens = torch.full((len(some), longest), END_OF_TEXT)
        labels, mask = torch.full((len(some), longest), -100), torch.zeros((len(some), longest), dtype=torch.long)
        for number, row in enumerate(some):
            end = len(row.tokens) + 1
            tokens[number, 1:end] = torch.from_numpy(row.tokens.astype(np.int64))
            labels[number, 1 + row.completion : end] = tokens[number, 1 + row.completion : end]
            mask[number, :end] = 1
        batches.append({"input_ids": tokens.to(device), "labels": labels.to(device), "attention_mask": mask.to(device)})

    def way() -> None:
        model.zero_grad()
        for inputs in batches:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                model(**inputs).loss.backward()

    return way, sum(inputs["input_ids"].numel() for inputs in batches)


if __name__ == "__main__":
    main()
