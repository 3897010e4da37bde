"""Fewer tokens to the same loss: AdamW at nanoGPT's recipe, AdamW with split rates, and Muon, on the same windows of real text.

    python -m benchmarks.optimizers           # about five minutes of one core
    python -m benchmarks.optimizers --sweep   # how the rates were chosen: one other seed, each recipe at the rates beside its own
    python -m benchmarks.optimizers --quick   # half a minute, a tiny network: shows that it works, not who is better

The reference trains for all steps. Each other recipe is a complete run of its own, whose schedule (warm-up and decay included) is as long
as its smaller budget: to reach the reference's final loss it must finish its own decay earlier, not only be ahead on the way.
Of one seed all recipes see the same windows in the same order, from the same initial weights. One thread; seconds are CPU-seconds of
training alone, without the validations.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.measure import machine
from model.config import DataConfig, ModelConfig, TrainingConfig
from model.device import pick_device
from model.gpt2 import GPT2
from model.stream.batches import TrainingWindows
from model.stream.resolve import resolve
from model.stream.validation import validation_windows
from model.training.optimizer import build_optimizer, set_learning_rate
from model.training.schedule import learning_rate_factor

DATA = Path(__file__).parents[2] / "shared/data/wiki-synth"
TEXT = "{query_seed_text}"
"""The beginnings of encyclopedia articles, each once: nothing in a text repeats another part of it."""
SPLIT_SEED = 0
"""All runs share the validation windows; a run's own seed decides its initial weights and the order of its windows."""
VOCABULARY = 50_257
"""GPT-2's."""
SWEEP_SEED = 100
"""Rates are chosen on a seed that is not among those compared."""
NANOGPT = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "gradient_clip": 1.0, "schedule": "cosine", "min_learning_rate_ratio": 0.1}
"""What all recipes share (nanoGPT's train.py, its rate for small networks: 1e-3)."""


@dataclass(frozen=True)
class Size:
    """The network and how long it is trained."""

    model: ModelConfig
    batch: int
    """Windows a step."""
    steps: int
    """The reference's."""
    validations: int
    """Of the reference; other recipes are validated at the same steps, and at their last."""
    validation_windows: int


@dataclass(frozen=True)
class Recipe:
    """One contestant."""

    label: str
    share: float
    """Of the reference's steps."""
    fields: dict[str, Any]
    """Of `TrainingConfig`."""
    sweep: dict[str, Sequence[float]] = field(default_factory=dict)
    """What `--sweep` tries, one field at a time, beside the values in `fields`."""

    def training(self, steps: int) -> TrainingConfig:
        """Its fields for a run of so many steps, a twentieth of them warm-up."""
        return TrainingConfig(**NANOGPT, warmup_steps=max(1, steps // 20), **self.fields)


FULL = Size(ModelConfig(preset="tiny", vocab_size=8192, context_length=128, dropout=0.0), 8, 300, 20, 64)
QUICK = Size(ModelConfig(preset="nano", vocab_size=512, context_length=32, dropout=0.0), 4, 20, 5, 8)

REFERENCE = "adamw"
RECIPES = {
    "adamw": Recipe("AdamW as in nanoGPT", 1.0, {"learning_rate": 1e-3}, {"learning_rate": [5e-4, 2e-3]}),
    "adamw_split": Recipe(
        "AdamW, split rates",
        0.6,
        {"learning_rate": 5e-4, "embedding_learning_rate": 4e-2},
        {"learning_rate": [1e-3], "embedding_learning_rate": [1e-2, 2e-2]},
    ),
    "muon": Recipe(
        "Muon, split rates",
        0.4,
        {"optimizer": "muon", "learning_rate": 2e-3, "matrix_learning_rate": 8e-3, "embedding_learning_rate": 1e-2},
        {"learning_rate": [1e-3, 4e-3], "matrix_learning_rate": [4e-3, 1.6e-2], "embedding_learning_rate": [5e-3, 2e-2]},
    ),
}


@dataclass
class Curve:
    """One run: where it stood at each validation, the untrained network first."""

    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    optimizer_seconds: float = 0.0

    def at_loss(self, loss: float, axis: Sequence[float]) -> float | None:
        """Where on `axis` (its tokens or seconds) the curve first comes down to `loss`, on straight lines between validations."""
        for index, now in enumerate(self.loss):
            if now <= loss:
                if index == 0:
                    return axis[0]
                before = self.loss[index - 1]
                return axis[index - 1] + (axis[index] - axis[index - 1]) * (before - loss) / (before - now)
        return None


Results = dict[str, dict[str, Any]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train all recipes, print the table, and write JSON and plot if asked to."""
    options = _options(arguments)
    if not any(options.data.glob("*.parquet")):
        options.error(f"--data {options.data}: no parquet files there; name a folder of files with SYNTH's columns")
    torch.set_num_threads(1)
    pick_device("cpu")  # multiply as the trainer does
    size = _size(options)
    console = Console(stderr=True)
    with console.status("tokenizing") as status:
        train, validation = _windows(options.data, size)
        if options.sweep:
            _sweep(size, train, validation, status.update)
            return
        runs: dict[str, list[Curve]] = {name: [] for name in RECIPES}
        for seed, (name, recipe) in itertools.product(range(options.seeds), RECIPES.items()):
            runs[name].append(_run(recipe, size, seed, train, validation, status.update))
    results = summarise(runs, size)
    Console(width=None if Console().is_terminal else 140).print(_table(results, size, options.seeds))
    if options.json:
        facts = {"size": asdict(size) | {"model": size.model.model_dump()}, "seeds": options.seeds, "machine": machine(1)}
        options.json.write_text(json.dumps({**results, **facts}, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        draw(options.plot, results)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizers", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="half a minute with a tiny network")
    parser.add_argument("--sweep", action="store_true", help="try the rates beside each recipe's own, and print their final losses")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each recipe (default: %(default)s)")
    parser.add_argument("--steps", type=int, metavar="N", help="the reference's steps; the others have their shares of them")
    parser.add_argument("--vocabulary", type=int, metavar="N", help=f"words of their own; {VOCABULARY} are all of GPT-2's, and slow")
    parser.add_argument("--data", type=Path, default=DATA, metavar="FOLDER", help="parquet files with SYNTH's columns (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves there, as an SVG")
    options = parser.parse_args(arguments)
    options.error = parser.error
    return options


def _size(options: argparse.Namespace) -> Size:
    size = QUICK if options.quick else FULL
    model = size.model.model_copy(update={"vocab_size": options.vocabulary or size.model.vocab_size})
    return replace(size, model=model, steps=options.steps or size.steps)


def _windows(folder: Path, size: Size) -> tuple[np.ndarray, np.ndarray]:
    """What the reference sees, uint16 [steps * batch, T + 1], and as many held-out windows as the size says, from this project's stream."""
    data = DataConfig(path=str(folder), text_template=TEXT, max_length=size.model.context_length)
    with tempfile.TemporaryDirectory() as storage:
        manifest = resolve(data, SPLIT_SEED, Path(storage))
        batches = TrainingWindows(manifest, data, SPLIT_SEED, size.batch, num_epochs=100)
        train = np.concatenate([batch.windows.numpy() for batch in itertools.islice(batches, size.steps)])
        batches.close()
        validation = validation_windows(manifest, data, SPLIT_SEED, size.validation_windows)
    numbers = _smaller_vocabulary(train, size.model.vocab_size)
    return numbers[train], numbers[validation]


def _smaller_vocabulary(train: np.ndarray, vocab_size: int) -> np.ndarray:
    """A number below `vocab_size` for each of GPT-2's words: the most frequent ones each have their own, all others share the last one."""
    counts = np.bincount(train.ravel(), minlength=VOCABULARY)
    numbers = np.full(VOCABULARY, vocab_size - 1, np.int64)
    numbers[np.argsort(-counts, kind="stable")[: vocab_size - 1]] = np.arange(vocab_size - 1)
    return numbers


def _run(recipe: Recipe, size: Size, seed: int, train: np.ndarray, validation: np.ndarray, tell: Callable[[str], None]) -> Curve:
    """Train one recipe from scratch."""
    steps = round(size.steps * recipe.share)
    every = max(1, size.steps // size.validations)
    config = recipe.training(steps)
    model = GPT2(size.model, seed)
    optimizer = build_optimizer(model, config)
    order = np.random.default_rng(seed).permutation(len(train))
    curve, cpu = Curve(), 0.0
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            curve.tokens.append(step * size.batch * size.model.context_length)
            curve.seconds.append(round(cpu, 3))
            curve.loss.append(round(_loss(model, validation, size.batch), 5))
            tell(f"seed {seed}, {recipe.label}: step {step} of {steps}, loss {curve.loss[-1]:.3f}")
        if step == steps:
            break
        windows = torch.from_numpy(train[order[step * size.batch : (step + 1) * size.batch]])
        began = time.process_time()
        set_learning_rate(optimizer, learning_rate_factor(step, config, steps))
        (model(windows[:, :-1], windows[:, 1:]) / windows[:, 1:].numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip)
        before_optimizer = time.process_time()
        optimizer.step()
        ended = time.process_time()
        optimizer.zero_grad(set_to_none=True)
        cpu += ended - began
        curve.optimizer_seconds += ended - before_optimizer
    return curve


@torch.no_grad()
def _loss(model: GPT2, validation: np.ndarray, batch: int) -> float:
    """Mean cross-entropy of the held-out targets, nats."""
    model.eval()
    total = sum(float(model(part[:, :-1], part[:, 1:])) for part in torch.from_numpy(validation).split(batch))
    model.train()
    return total / validation[:, 1:].size


def summarise(runs: dict[str, list[Curve]], size: Size) -> Results:
    """Figures of each recipe: its mean curve, and where each seed's run reaches the final loss of the same seed's reference.

    `tokens_to_reference_loss` and `seconds_to_reference_loss` are means over the seeds; null if a run ends above the reference.
    """
    targets = [curve.loss[-1] for curve in runs[REFERENCE]]
    spent = [(curve.tokens[-1], curve.seconds[-1]) for curve in runs[REFERENCE]]
    results: Results = {}
    for name, curves in runs.items():
        tokens = [curve.at_loss(target, curve.tokens) for curve, target in zip(curves, targets, strict=True)]
        seconds = [curve.at_loss(target, curve.seconds) for curve, target in zip(curves, targets, strict=True)]
        finals = [curve.loss[-1] for curve in curves]
        mean_tokens, mean_seconds = _mean(tokens), _mean(seconds)
        results[name] = {
            "label": RECIPES[name].label,
            "fields": RECIPES[name].fields,
            "tokens": curves[0].tokens,
            "seconds": [round(statistics.mean(values), 3) for values in zip(*(curve.seconds for curve in curves), strict=True)],
            "loss": [round(statistics.mean(values), 5) for values in zip(*(curve.loss for curve in curves), strict=True)],
            "losses": [curve.loss for curve in curves],
            "final_loss": round(statistics.mean(finals), 5),
            "final_loss_deviation": round(statistics.stdev(finals), 5) if len(finals) > 1 else None,
            "optimizer_share": round(sum(curve.optimizer_seconds for curve in curves) / sum(curve.seconds[-1] for curve in curves), 4),
            "tokens_to_reference_loss": mean_tokens and round(mean_tokens),
            "seconds_to_reference_loss": mean_seconds and round(mean_seconds, 3),
            "token_ratio": mean_tokens and round(statistics.mean(used for used, _ in spent) / mean_tokens, 3),
            "time_ratio": mean_seconds and round(statistics.mean(used for _, used in spent) / mean_seconds, 3),
        }
    return results


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if len(known) == len(values) else None


def _table(results: Results, size: Size, seeds: int) -> Table:
    model = size.model
    caption = (
        f"{model.n_layer} layers, {model.n_embd} wide, {model.vocab_size:,} words, context {model.context_length}, {size.batch} windows a "
        f"step; seeds: {seeds}, means of them; {size.validation_windows} held-out windows. “To the loss”: of the first line, reached by a "
        "complete run of the length in the second column."
    )
    table = Table(title="Fewer tokens to the same loss", caption=caption)
    table.add_column("recipe", no_wrap=True)
    for heading in ("k tokens", "CPU-s", "final loss", "±", "k tokens to the loss", "CPU-s to it", "× fewer", "× sooner", "optimizer"):
        table.add_column(heading, justify="right")
    for found in results.values():
        table.add_row(
            found["label"],
            f"{found['tokens'][-1] / 1e3:,.0f}",
            f"{found['seconds'][-1]:,.1f}",
            f"{found['final_loss']:.3f}",
            _cell(found["final_loss_deviation"], "{:.3f}"),
            _cell(found["tokens_to_reference_loss"], "{:,.0f}", 1e-3),
            _cell(found["seconds_to_reference_loss"], "{:,.1f}"),
            _cell(found["token_ratio"], "{:.2f}"),
            _cell(found["time_ratio"], "{:.2f}"),
            f"{found['optimizer_share']:.0%}",
        )
    return table


def _cell(value: float | None, form: str, scale: float = 1.0) -> str:
    return "–" if value is None else form.format(value * scale)


def _sweep(size: Size, train: np.ndarray, validation: np.ndarray, tell: Callable[[str], None]) -> None:
    """Each recipe at its own rates, and with each rate changed; one line a run, as it ends."""
    for recipe in RECIPES.values():
        for fields in _neighbours(recipe):
            curve = _run(Recipe(recipe.label, recipe.share, fields), size, SWEEP_SEED, train, validation, tell)
            rates = ", ".join(f"{key} {value:g}" for key, value in fields.items() if key != "optimizer")
            print(f"{recipe.label}: {rates}: {curve.loss[-1]:.3f} after {curve.tokens[-1]:,} tokens", flush=True)


def _neighbours(recipe: Recipe) -> Iterator[dict[str, Any]]:
    yield recipe.fields
    for name, values in recipe.sweep.items():
        for value in values:
            yield {**recipe.fields, name: value}


def draw(path: Path, results: Results) -> None:
    """Mean loss of each recipe against tokens and against seconds, as an SVG. The dashed line is the reference's final loss."""
    target = results[REFERENCE]["final_loss"]
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    colours = ("#555555", "#4c78a8", "#b5402a", "#5a9e6f")
    for axes, key, scale, label in ((left, "tokens", 1e-3, "thousand tokens"), (right, "seconds", 1.0, "CPU-seconds of training")):
        axes.axhline(target, color="#999999", linestyle="--", linewidth=1)
        for (name, found), colour in zip(results.items(), colours, strict=False):
            axes.plot([value * scale for value in found[key]], found["loss"], color=colour, label=found["label"] if axes is left else None)
            reached = found[f"{key}_to_reference_loss"]
            if name != REFERENCE and reached is not None:
                ratio = found["token_ratio" if key == "tokens" else "time_ratio"]
                axes.plot(reached * scale, target, "o", color=colour)
                axes.annotate(f"{ratio:.1f} ×", (reached * scale, target), (5, 5), textcoords="offset points", color=colour)
        axes.set_xlabel(label)
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
    best = min(min(found["loss"]) for found in results.values())
    left.set_ylim(best - 0.15, target + 1.5)
    left.set_ylabel("validation loss, nats a token")
    left.set_title("Against tokens", loc="left")
    right.set_title("Against time", loc="left")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with matplotlib.rc_context({"svg.hashsalt": "gpt2", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(partial, format="svg", metadata={"Date": None})
    os.replace(partial, path)


if __name__ == "__main__":
    main()
