"""A refactor that should not change numbers proves it: the first 20 losses of a small fixed training against those stored here.

    python -m benchmarks.loss_parity            # two seconds; exit code 1 if a loss is another one
    python -m benchmarks.loss_parity --update   # the numbers were meant to change: store the new ones, and say why in docs/experiments.md

On the machine and torch that made the reference the losses are equal to the last bit. Another library for the products, or other chunks of
the cross-entropy, moved them by 2e-7 (relative); GELU with erf instead of tanh by 2e-5, a LayerNorm with an epsilon of 1e-6 by 6e-6.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from model.config import ModelConfig, TrainingConfig
from model.device import pick_device
from model.gpt2 import GPT2
from model.training.optimizer import build_optimizer

REFERENCE = Path(__file__).with_suffix(".json")
TOLERANCE = 3e-6
"""Largest relative difference of a loss: ten times what another order of additions makes, half of what a small mistake makes."""
STEPS, BATCH, LENGTH = 20, 10, 64
VOCABULARY, WORDS = 5003, 200
"""Only so many of the vocabulary occur: the loss falls fast, and each step shows in the next."""
CASES = {"without dropout": 0.0, "dropout 0.1": 0.1}


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare (or store), print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss_parity", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--update", action="store_true", help="store the losses instead of comparing them")
    parser.add_argument("--reference", type=Path, metavar="FILE", default=REFERENCE, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    found = {case: training_losses(dropout) for case, dropout in CASES.items()}
    if options.update:
        made_with = {"torch": torch.__version__, "processor": platform.machine(), "mkl": torch.backends.mkl.is_available()}
        text = json.dumps({"made_with": made_with, "losses": found}, indent=1)
        options.reference.write_text(text + "\n", encoding="utf-8")
        print(f"loss parity: stored in {options.reference}")
        return 0
    stored = json.loads(options.reference.read_text(encoding="utf-8"))
    cases = [case for case in CASES if CASES[case] == 0 or stored["made_with"]["mkl"] == torch.backends.mkl.is_available()]
    Console(width=None if Console().is_terminal else 140).print(_table(found, stored, cases))
    if cases != list(CASES):
        print("loss parity: torch draws dropout differently without MKL, so only the training without it is compared", file=sys.stderr)
    for case in cases:
        for step, (ours, theirs) in enumerate(zip(found[case], stored["losses"][case], strict=True), start=1):
            if not relative_difference(ours, theirs) <= TOLERANCE:
                print(
                    f"loss parity: {case}, step {step}: {ours:.7f} instead of {theirs:.7f} "
                    f"({relative_difference(ours, theirs):.1e} relative, {TOLERANCE:g} is tolerated); if that is meant: --update",
                    file=sys.stderr,
                )
                return 1
    equal = all(found[case] == stored["losses"][case] for case in cases)
    print("loss parity: equal to the last bit" if equal else f"loss parity: equal within {TOLERANCE:g}")
    return 0


def training_losses(dropout: float) -> list[float]:
    """Mean cross-entropies (nats) of the first steps, on one CPU thread; a pure function of the code, torch and the processor."""
    pick_device("cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # wide initial weights, so that GELU and LayerNorm work where their details show
        config = ModelConfig(
            preset="nano",
            n_layer=2,
            n_head=4,
            n_embd=64,
            context_length=LENGTH,
            vocab_size=VOCABULARY,
            initializer_range=0.2,
            dropout=dropout,
        )
        model = GPT2(config, seed=1).train()
        optimizer = build_optimizer(model, TrainingConfig(learning_rate=3e-3))
        words = torch.randint(0, config.vocab_size, (WORDS,), generator=torch.Generator().manual_seed(2))
        windows = words[torch.randint(0, WORDS, (4, BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(3))]
        losses = []
        for step in range(STEPS):
            torch.manual_seed(step)
            tokens_BT, targets_BT = windows[step % 4, :, :-1], windows[step % 4, :, 1:]
            loss = model(tokens_BT, targets_BT) / targets_BT.numel()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        return losses
    finally:
        torch.set_num_threads(threads)


def relative_difference(ours: float, theirs: float) -> float:
    """Of two losses; NaN differs from everything."""
    return abs(ours - theirs) / abs(theirs)


def _table(found: dict[str, list[float]], stored: dict[str, Any], cases: list[str]) -> Table:
    made_with = stored["made_with"]
    table = Table(title="The first losses", caption=f"stored: torch {made_with['torch']}, {made_with['processor']}")
    table.add_column("step", justify="right")
    for case in cases:
        for heading in (case, "stored", "relative difference"):
            table.add_column(heading, justify="right")
    for step in range(STEPS):
        cells = []
        for case in cases:
            ours, theirs = found[case][step], stored["losses"][case][step]
            cells += [f"{ours:.6f}", f"{theirs:.6f}", "0" if ours == theirs else f"{relative_difference(ours, theirs):.1e}"]
        table.add_row(str(step + 1), *cells)
    return table


if __name__ == "__main__":
    sys.exit(main())
