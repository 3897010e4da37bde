"""How fast a GPT-2 trains: forward, backward and optimizer step of this project beside other implementations, in one table of one run.

    python -m benchmarks.train_step --peer ../nanoGPT                       # seven minutes on one core; without --peer only transformers
    python -m benchmarks.train_step --quick                                 # a tiny network, a minute
    python -m benchmarks.train_step --preset small --dropout 0 --batch 32   # on a GPU: tokens/s, MFU and peak GPU memory as well

Every implementation lives in a process of its own, so that its peak memory is its own. The processes wait for each other: a round is one
turn of each, so what a busy machine does to one it does to its neighbours, and ratios are medians over the rounds of paired figures.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.measure import ROOT, machine, peak_rss
from model.config import PRESETS, ModelConfig, TrainingConfig
from model.flops import flops_per_token, mfu, peak_flops

REFERENCE = "peer.eager"
ROWS = ("ours.eager", "ours.compiled", "transformers.eager", "peer.eager", "peer.compiled")
WARM_UP_STEPS = 3
"""The first step compiles and makes the optimizer's state; a compiled one may compile again when gradients first exist."""


class Contestant(NamedTuple):
    """What one implementation needs for a step."""

    module: Any
    """The torch module; `torch.compile` wraps it."""
    optimizer: Any
    loss_of: Callable[[Any, Any, Any], Any]
    """(module, tokens_BT, targets_BT) to the mean cross-entropy."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write it as JSON if asked to."""
    options = _options(arguments)
    if options.worker:
        _work(json.loads(options.worker))
        return
    task = {
        "model": ModelConfig(preset=options.preset, dropout=options.dropout).model_dump(),
        "batch": options.batch,
        "steps": options.steps,
        "threads": options.threads,
        "peer": None if options.peer is None else str(options.peer.resolve()),
    }
    console = Console(stderr=True)
    with console.status("starting") as status, contextlib.ExitStack() as stack:
        workers = {}
        for row in options.rows:
            status.update(f"{row}: building, warming up")
            workers[row] = stack.enter_context(_worker(row, task, options.huge_pages))
        rounds: dict[str, list[dict[str, Any]]] = {row: [] for row in workers}
        names = list(workers)
        for number in range(options.rounds):
            first = number % len(names)
            for row in names[first:] + names[:first]:
                status.update(f"round {number + 1} of {options.rounds}: {row}")
                rounds[row].append(_ask(workers[row], "round"))
        ends = {row: _ask(worker, "end") for row, worker in workers.items()}
    results = _results(rounds, ends)
    settings = {key: getattr(options, key) for key in ("preset", "batch", "dropout", "threads", "rounds", "steps", "huge_pages")} | {
        "context_length": task["model"]["context_length"]
    }
    device = next(iter(ends.values()))["device"]
    Console(width=None if Console().is_terminal else 140).print(_table(results, settings, device))
    if options.json:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        text = json.dumps({**results, "settings": settings, "device": device, "machine": machine(cores)}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", choices=list(PRESETS), help="size of the network (default: mini; tiny with --quick)")
    parser.add_argument("--batch", type=int, metavar="B", help="windows a step (default: 8; 4 with --quick)")
    parser.add_argument("--dropout", type=float, default=0.0, metavar="P", help="the same for all (default: 0)")
    parser.add_argument("--rounds", type=int, metavar="N", help="turns of each implementation (default: 12; 4 with --quick)")
    parser.add_argument("--steps", type=int, metavar="N", help="steps a turn (default: 1 on a CPU, 20 on a GPU)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of each on a CPU; more of them spin, which costs CPU-seconds")
    parser.add_argument("--peer", type=Path, metavar="PATH", help="a nanoGPT checkout; its model.py is imported and measured, too")
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", help=f"some of {', '.join(ROWS)}")
    parser.add_argument("--huge-pages", action="store_true", help="THP_MEM_ALLOC_ENABLE=1 for all of them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--quick", action="store_true", help="a tiny network and few rounds: about a minute")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.preset = options.preset or ("tiny" if options.quick else "mini")
    options.batch = options.batch or (4 if options.quick else 8)
    options.rounds = options.rounds or (4 if options.quick else 12)
    if options.peer is not None and not (options.peer / "model.py").is_file():
        parser.error(f"--peer {options.peer}: there is no model.py in it; give the folder of a nanoGPT checkout")
    if options.peer is None and any(row.startswith("peer.") for row in options.only or ()):
        parser.error("--only peer.…: give --peer PATH as well")
    options.rows = [row for row in options.only or ROWS if options.peer is not None or not row.startswith("peer.")]
    return options


@contextlib.contextmanager
def _worker(row: str, task: dict[str, Any], huge_pages: bool) -> Iterator[subprocess.Popen[str]]:
    """The process of one row, warmed up and waiting for its turn.

    The command line is this module's own, so nothing but the row differs.
    """
    implementation, _, mode = row.partition(".")
    argument = json.dumps({**task, "implementation": implementation, "compiled": mode == "compiled"})
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "THP_MEM_ALLOC_ENABLE": "1" if huge_pages else "0"}
    command = [sys.executable, "-m", "benchmarks.train_step", "--worker", argument]
    with subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            _ask(process, "warm up")
            yield process
        finally:
            process.kill()


def _ask(process: subprocess.Popen[str], question: str) -> dict[str, Any]:
    """What the worker answers.

    Raises:
        RuntimeError: it died; what it said stands above.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(question + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise RuntimeError(f"a worker ended with exit code {process.wait()} at {question!r}: {process.args}")
    return json.loads(answer)


def _work(task: dict[str, Any]) -> None:
    """The other side of `_ask`, until it is told to end. Only answers go to standard output."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a peer may print what it likes
    import torch

    torch.set_num_threads(task["threads"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = ModelConfig(**task["model"])
    shape, generator = (64, task["batch"], config.context_length + 1), torch.Generator().manual_seed(0)
    windows = torch.randint(0, config.vocab_size, shape, generator=generator).to(device)
    contestant = BUILDERS[task["implementation"]](config, device, task["peer"])
    forward = torch.compile(contestant.module) if task["compiled"] else contestant.module
    done, losses = 0, []

    def step() -> None:
        nonlocal done
        window = windows[done % len(windows)]
        tokens_BT, targets_BT = window[:, :-1].contiguous(), window[:, 1:].contiguous()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = contestant.loss_of(forward, tokens_BT, targets_BT)
        loss.backward()
        contestant.optimizer.step()
        contestant.optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        done += 1

    for line in sys.stdin:
        question, answer = line.strip(), {}
        if question == "warm up":
            for _ in range(WARM_UP_STEPS):
                step()
        elif question == "round":
            steps = task["steps"] or (20 if device.type == "cuda" else 1)
            answer = (_round_on_gpu if device.type == "cuda" else _round_on_cpu)(step, steps)
            answer["tokens"] = steps * task["batch"] * config.context_length
        else:
            answer = {
                "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
                "peak_rss_mb": round(peak_rss() / 1e6, 1),
                "peak_gpu_mb": round(torch.cuda.max_memory_allocated() / 1e6, 1) if device.type == "cuda" else None,
                "parameters": sum(parameter.numel() for parameter in contestant.module.parameters()),
                "flops_per_token": flops_per_token(config, config.context_length),
                "first_loss": round(float(losses[0]), 4),
                "last_loss": round(float(losses[-1]), 4),
            }
        print(json.dumps(answer), file=answers, flush=True)


def _round_on_cpu(step: Callable[[], None], steps: int) -> dict[str, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(steps):
        step()
    return {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}


def _round_on_gpu(step: Callable[[], None], steps: int) -> dict[str, float]:
    """`wall_s` is the device's own time. Between turns the memory goes back, for all of them share one GPU."""
    import torch

    step()
    torch.cuda.synchronize()
    began, ended, cpu = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True), time.process_time()
    began.record()
    for _ in range(steps):
        step()
    ended.record()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return {"cpu_s": time.process_time() - cpu, "wall_s": began.elapsed_time(ended) / 1000}


def _ours(config: ModelConfig, device: Any, peer: str | None) -> Contestant:
    from model.device import pick_device
    from model.gpt2 import GPT2
    from model.training.optimizer import build_optimizer

    pick_device(device.type)
    model = GPT2(config).to(device).train()
    optimizer = build_optimizer(model, TrainingConfig())
    return Contestant(model, optimizer, lambda module, tokens_BT, targets_BT: module(tokens_BT, targets_BT) / targets_BT.numel())


def _transformers(config: ModelConfig, device: Any, peer: str | None) -> Contestant:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from model.huggingface import hugging_face_config

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**hugging_face_config(config))).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    return Contestant(
        model,
        optimizer,
        lambda module, tokens_BT, targets_BT: module(tokens_BT, labels=targets_BT, shift_labels=targets_BT, use_cache=False).loss,
    )


def _peer(config: ModelConfig, device: Any, peer: str | None) -> Contestant:
    import torch

    assert peer is not None
    spec = importlib.util.spec_from_file_location("peer_model", Path(peer) / "model.py")
    assert spec is not None
    assert spec.loader is not None
    nanogpt = sys.modules["peer_model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nanogpt)
    torch.manual_seed(0)
    shape = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd, "dropout": config.dropout}
    model = nanogpt.GPT(nanogpt.GPTConfig(block_size=config.context_length, **shape)).to(device).train()
    optimizer = model.configure_optimizers(weight_decay=0.1, learning_rate=3e-4, betas=(0.9, 0.95), device_type=device.type)
    return Contestant(model, optimizer, lambda module, tokens_BT, targets_BT: module(tokens_BT, targets_BT)[1])


BUILDERS = {"ours": _ours, "transformers": _transformers, "peer": _peer}


def _results(rounds: dict[str, list[dict[str, Any]]], ends: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A row for each, as the JSON has it. What is compared is CPU time on a CPU and the device's time on a GPU."""
    results: dict[str, dict[str, Any]] = {}
    for row, turns in rounds.items():
        end, tokens = ends[row], turns[0]["tokens"]
        on_gpu = end["device"] != "cpu"
        clock = "wall_s" if on_gpu else "cpu_s"
        per_s = tokens / statistics.median(turn["wall_s"] for turn in turns)
        results[row] = {
            "tokens_per_cpu_s": round(tokens / statistics.median(turn["cpu_s"] for turn in turns), 1),
            "peak_rss_mb": end["peak_rss_mb"],
            "ratio_to_peer": _ratio(rounds, row, REFERENCE, clock),
            "ratio_to_transformers": _ratio(rounds, row, "transformers.eager", clock),
            "tokens_per_s": round(per_s, 1),
            "mfu": mfu(per_s, end["flops_per_token"], peak_flops(end["device"], "bf16")),
            "peak_gpu_mb": end["peak_gpu_mb"],
            "parameters": end["parameters"],
            "first_loss": end["first_loss"],
            "last_loss": end["last_loss"],
            "seconds": [round(turn[clock], 4) for turn in turns],
        }
    return results


def _ratio(rounds: dict[str, list[dict[str, Any]]], row: str, other: str, clock: str) -> float | None:
    """How many times as fast as the other: the median over the rounds; null without the other."""
    if other not in rounds:
        return None
    return round(statistics.median(theirs[clock] / ours[clock] for ours, theirs in zip(rounds[row], rounds[other], strict=True)), 3)


def _table(results: dict[str, dict[str, Any]], settings: dict[str, Any], device: str) -> Table:
    on_gpu = device != "cpu"
    caption = (
        f"{settings['preset']}, {settings['batch']} × {settings['context_length']} tokens a step, dropout {settings['dropout']:g}, "
        + (f"bf16 autocast, {device}. " if on_gpu else f"fp32, {settings['threads']} thread(s). ")
        + f"Ratios: medians of {settings['rounds']} paired rounds, in {'device seconds' if on_gpu else 'CPU-seconds'}."
    )
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "tok/CPU-s": lambda row: f"{row['tokens_per_cpu_s']:,.0f}",
        "tok/s": lambda row: f"{row['tokens_per_s']:,.0f}",
        "× peer.eager": lambda row: _cell(row["ratio_to_peer"], "{:.2f}"),
        "× transformers": lambda row: _cell(row["ratio_to_transformers"], "{:.2f}"),
        "peak RSS MB": lambda row: f"{row['peak_rss_mb']:,.0f}",
    }
    if on_gpu:
        columns["MFU"] = lambda row: _cell(row["mfu"], "{:.1%}")
        columns["peak GPU MB"] = lambda row: _cell(row["peak_gpu_mb"], "{:,.0f}")
    columns["last loss"] = lambda row: f"{row['last_loss']:.2f}"
    table = Table(title="A training step", caption=caption)
    table.add_column("implementation")
    for heading in columns:
        table.add_column(heading, justify="right")
    for name, row in results.items():
        table.add_row(name, *(cell(row) for cell in columns.values()))
    return table


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


if __name__ == "__main__":
    main()
