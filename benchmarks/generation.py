"""How fast a GPT-2 writes: this project with its cache, recomputing every prefix, and transformers' `generate`, on the same weights.

    python -m benchmarks.generation            # GPT-2 small, ten minutes on one core
    python -m benchmarks.generation --quick    # a tiny network, seconds

All write greedily, many texts at once. The weights are random, exported once for transformers, and never end a text. A round is a turn of
each; ratios are medians over the rounds. Recomputing takes long and has one round. Exit code 1 if two disagree about a token, but for ties:
where rounding decides between two tokens, texts may part.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from benchmarks.measure import machine
from model.config import PRESETS, ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

    from model.gpt2 import GPT2

OURS, RECOMPUTING, THEIRS = "ours", "recomputing", "transformers"
TIE = 1e-4
"""Logits that differ by less, as a share of the standard deviation of all, are as good as equal in fp32."""
Write = Callable[["Tensor", int], "Tensor"]
"""(prompts_BT, new tokens) to the new tokens."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write it as JSON if asked to."""
    options = _options(arguments)
    import torch

    from model.device import pick_device

    torch.set_num_threads(options.threads)
    as_torch_has_it = torch.backends.mkldnn.matmul.fp32_precision
    device = pick_device(options.device)
    ours_has_it = torch.backends.mkldnn.matmul.fp32_precision
    model = _network(ModelConfig(preset=options.preset, dropout=0.0)).to(device)
    shape = (options.batch, options.prompt)
    prompts_BT = torch.randint(0, 50_256, shape, generator=torch.Generator().manual_seed(1)).to(device)
    console = Console(stderr=True)
    with console.status("exporting"), tempfile.TemporaryDirectory() as folder:
        writers: dict[str, Write] = {OURS: _ours(model), THEIRS: _theirs(model, Path(folder)), RECOMPUTING: _recomputing(model)}
    turns: dict[str, list[dict[str, float]]] = {row: [] for row in writers}
    texts: dict[str, list[list[int]]] = {}
    with console.status("warming up") as status:
        for row in (OURS, THEIRS, RECOMPUTING):
            writers[row](prompts_BT, 2)
        for number in range(options.rounds):
            for row in writers if number == 0 else (OURS, THEIRS):
                status.update(f"round {number + 1} of {options.rounds}: {row}")
                torch.backends.mkldnn.matmul.fp32_precision = as_torch_has_it if row == THEIRS else ours_has_it
                text_BT, turn = _timed(writers[row], prompts_BT, options.tokens)
                turns[row].append(turn)
                texts[row] = text_BT.tolist()
    results = {row: _result(row, turns, texts, options.batch * options.tokens) for row in writers}
    for row, result in results.items():
        result["parted_at_ties"] = _parted_at_ties(model, prompts_BT, texts[OURS], texts[row])
    settings = {key: getattr(options, key) for key in ("preset", "batch", "prompt", "tokens", "threads", "rounds")}
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    Console(width=None if Console().is_terminal else 140).print(_table(results, settings, name))
    if options.json:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        text = json.dumps({**results, "settings": settings, "device": name, "machine": machine(cores)}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    if any(result["equal_texts"] + result["parted_at_ties"] < options.batch for result in results.values()):
        sys.exit("the texts are not equal")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", choices=list(PRESETS), help="size of the network (default: small; tiny with --quick)")
    parser.add_argument("--batch", type=int, default=16, metavar="B", help="texts at once (default: 16)")
    parser.add_argument("--prompt", type=int, default=64, metavar="T", help="tokens of each prompt (default: 64)")
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="new tokens of each text (default: 128)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="turns of each but the recomputing, which has one (default: 3)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="on a CPU")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where there is one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--quick", action="store_true", help="a tiny network: seconds")
    options = parser.parse_args(arguments)
    options.preset = options.preset or ("tiny" if options.quick else "small")
    context = PRESETS[options.preset]["context_length"]
    if options.prompt + options.tokens > context or options.tokens > context // 2:
        parser.error(f"--prompt and --tokens: {options.preset} has a context of {context}; new tokens take at most half of it")
    return options


def _network(config: ModelConfig) -> GPT2:
    """Wider weights than a fresh network's, which would write one token for ever; a row of no length for the end of text, which then is
    never the likeliest."""
    import torch

    from model.gpt2 import GPT2
    from model.tokenizer import END_OF_TEXT

    model = GPT2(config, seed=0).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and name.startswith("h."):
                parameter.mul_(6)
        model.wte.weight[END_OF_TEXT] = 0
    return model


def _ours(model: GPT2) -> Write:
    import torch

    from model.generation import next_tokens

    return lambda prompts_BT, count: torch.stack(list(next_tokens(model, prompts_BT.tolist(), count)), dim=1)


def _recomputing(model: GPT2) -> Write:
    """The whole text through the network for each token; only the last position through the head."""
    import torch

    @torch.inference_mode()
    def write(prompts_BT: Tensor, count: int) -> Tensor:
        tokens_BT = prompts_BT
        for _ in range(count):
            next_B = model.logits(model.hidden(tokens_BT)[:, -1]).argmax(dim=-1)
            tokens_BT = torch.cat([tokens_BT, next_B[:, None]], dim=1)
        return tokens_BT[:, prompts_BT.shape[1] :]

    return write


def _theirs(model: GPT2, folder: Path) -> Write:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    import torch
    from transformers import AutoModelForCausalLM

    from model.huggingface import export

    export(model, folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").to(model.wte.weight.device).eval()

    @torch.inference_mode()
    def write(prompts_BT: Tensor, count: int) -> Tensor:
        whole_BT = theirs.generate(
            prompts_BT,
            attention_mask=torch.ones_like(prompts_BT),
            max_new_tokens=count,
            do_sample=False,
            use_cache=True,
        )
        return whole_BT[:, prompts_BT.shape[1] :]

    return write


def _timed(write: Write, prompts_BT: Tensor, count: int) -> tuple[Tensor, dict[str, float]]:
    import torch

    cpu, wall = time.process_time(), time.perf_counter()
    text_BT = write(prompts_BT, count)
    if text_BT.is_cuda:
        torch.cuda.synchronize()
    return text_BT, {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}


def _result(row: str, turns: dict[str, list[dict[str, float]]], texts: dict[str, list[list[int]]], tokens: int) -> dict[str, Any]:
    """A row, as the JSON has it. Ratios are of CPU-seconds on a CPU that others use, too; of seconds elsewhere."""
    import torch

    clock = "wall_s" if torch.cuda.is_available() else "cpu_s"

    def ratio_to(other: str) -> float:
        return round(statistics.median(theirs[clock] / ours[clock] for ours, theirs in zip(turns[row], turns[other], strict=False)), 2)

    return {
        "tokens_per_s": round(tokens / statistics.median(turn["wall_s"] for turn in turns[row]), 1),
        "tokens_per_cpu_s": round(tokens / statistics.median(turn["cpu_s"] for turn in turns[row]), 1),
        "ratio_to_recomputing": ratio_to(RECOMPUTING),
        "ratio_to_transformers": ratio_to(THEIRS),
        "equal_texts": sum(text == ours for text, ours in zip(texts[row], texts[OURS], strict=True)),
        "different_tokens": len({token for text in texts[row] for token in text}),
        "seconds": [round(turn[clock], 3) for turn in turns[row]],
    }


def _parted_at_ties(model: GPT2, prompts_BT: Tensor, ours: list[list[int]], theirs: list[list[int]]) -> int:
    """Texts whose first different token had all but the same logit as ours: closer than rounding moves it."""
    import torch

    ties = 0
    for prompt_T, our_text, their_text in zip(prompts_BT, ours, theirs, strict=True):
        at = next((i for i, (a, b) in enumerate(zip(our_text, their_text, strict=True)) if a != b), None)
        if at is not None:
            tokens_BT = torch.cat([prompt_T, torch.tensor(our_text[:at], dtype=torch.int64, device=prompt_T.device)])[None]
            with torch.inference_mode():
                logits_V = model.logits(model.hidden(tokens_BT)[0, -1])
            ties += bool((logits_V[our_text[at]] - logits_V[their_text[at]]).abs() < TIE * logits_V.std())
    return ties


def _table(results: dict[str, dict[str, Any]], settings: dict[str, Any], device: str) -> Table:
    caption = (
        f"{settings['preset']}, {settings['batch']} texts, prompts of {settings['prompt']} tokens, {settings['tokens']} new ones each, "
        + "greedy, fp32, "
        + (f"{settings['threads']} thread(s). Ratios in CPU-seconds." if device == "cpu" else f"{device}. Ratios in seconds.")
    )
    table = Table(title="Writing", caption=caption)
    table.add_column("")
    for heading in ("tok/s", "tok/CPU-s", "× recomputing", "× transformers", "equal texts", "parted at a tie", "different tokens"):
        table.add_column(heading, justify="right")
    for row, result in results.items():
        table.add_row(
            row,
            f"{result['tokens_per_s']:,.0f}",
            f"{result['tokens_per_cpu_s']:,.0f}",
            f"{result['ratio_to_recomputing']:.2f}",
            f"{result['ratio_to_transformers']:.2f}",
            f"{result['equal_texts']} of {settings['batch']}",
            f"{result['parted_at_ties']}",
            f"{result['different_tokens']:,}",
        )
    return table


if __name__ == "__main__":
    main()
