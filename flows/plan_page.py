"""What `gpt2 plan` and `gpt2 benchmark` print."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from flows.units import count, duration, rounded, size
from tasks.plan import Plan

if TYPE_CHECKING:
    from tasks.machine_benchmark import Measurement

_MEMORY = {
    "weights": "weights, fp32",
    "gradients": "gradients, fp32",
    "optimizer": "optimizer's moments, fp32",
    "half_weights": "copies of matrices, bf16",
    "activations": "activations",
    "loss": "the head's logits and copies",
    "total": "total",
}


def print_plan(plan: Plan) -> None:
    """Print what `gpt2 plan` shows, as wide as the terminal."""
    console = Console(highlight=False)
    with console.capture() as captured:
        console.print(_summary(plan))
        console.print()
        _print_table(
            console,
            f"memory of a step with micro-batches of {count(plan.micro_batch, 'window')}" + _on_each(plan),
            _memory_table(plan),
            "Tensors counted, without torch.compile; the runtime's own memory and fragmentation come on top.",
        )
        console.print()
        gpus = "one GPU" if plan.ranks == 1 else f"{plan.ranks} GPUs"
        _print_table(
            console,
            f"time and cost on {gpus} at {plan.mfu:.0%} MFU",
            _gpu_table(plan),
            f"Assumed: {plan.mfu:.0%} of the dense peak (--mfu), and the prices of {plan.prices_as_of} (--price H100=2.50). "
            "fits: the largest micro-batch, in windows, by the count above.",
        )
        if plan.hints:
            console.print("\nhints")
        for hint in plan.hints:
            console.print(Padding(f"- {hint}", (0, 0, 0, 2)), markup=False)
    _print_without_padding(captured.get())


def print_measurements(rows: list[Measurement]) -> None:
    """Print what `gpt2 benchmark` shows."""
    first = rows[0]
    compiled = "compiled" if first.compiled else "eager"
    table = _table()
    for column in ("batch", "tokens/s", "MFU", "ms a step", "steps", "peak memory"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row.batch:,}",
            rounded(row.tokens_per_s),
            "unknown" if row.mfu is None else f"{row.mfu:.1%}",
            f"{row.step_time_s * 1000:,.1f}",
            f"{row.steps:,}",
            size(round(row.memory_mb * 1e6)),
        )
    console = Console(highlight=False)
    with console.capture() as captured:
        _print_table(
            console,
            f"{first.preset}, {first.parameters:,} parameters, windows of {first.window:,}, dropout {first.dropout:g}, {compiled}",
            table,
            f"{first.device}; {first.precision}; torch {first.torch}",
        )
    _print_without_padding(captured.get())


def _print_without_padding(text: str) -> None:
    """Rich fills tables up to their width with spaces, which a narrower window would wrap."""
    print("\n".join(line.rstrip() for line in text.rstrip().split("\n")))


def _summary(plan: Plan) -> Table:
    page = Table.grid(padding=(0, 2, 0, 0))
    page.add_column(no_wrap=True)
    page.add_column()
    tokens = plan.tokens
    page.add_row(plan.experiment, f"{plan.parameters:,} parameters")
    page.add_row("data", _data(plan))
    page.add_row("step", f"{count(plan.global_batch, 'window')} of {plan.max_length:,}: {tokens.per_step:,} tokens")
    epochs = "" if tokens.epochs is None else f", {tokens.epochs:.3g} epochs"
    cut = ""
    if plan.steps_of_all_epochs and plan.steps < plan.steps_of_all_epochs:
        cut = f" of the {plan.steps_of_all_epochs:,} that all epochs take"
    page.add_row("run", f"{count(plan.steps, 'step')}{cut}: {_big(tokens.total)} tokens{epochs}")
    page.add_row("", f"{tokens.per_parameter:.3g} tokens a parameter (about 20 use a given effort best: Hoffmann et al. 2022)")
    page.add_row("effort", f"{plan.flops_per_token / 1e6:,.1f} MFLOP a token, {plan.flops:.3g} FLOP in all; validation adds {_share(plan)}")
    one, kept = size(plan.checkpoints.total), count(plan.checkpoints.kept, "checkpoint")
    page.add_row(
        "checkpoint", f"{one}: weights {size(plan.checkpoints.weights)}, optimizer {size(plan.checkpoints.optimizer)}, and a few kB"
    )
    page.add_row("", f"{plan.checkpoints.made:,} made, at most {plan.checkpoints.kept:,} kept")
    page.add_row("disk", f"{size(plan.storage.run_folder)} here while training")
    page.add_row(
        "",
        f"{size(plan.storage.external)} in the storage afterwards ({kept} and the champion's weights), "
        f"{size(plan.storage.external_peak)} while DVC pushes",
    )
    if plan.storage.token_cache:
        page.add_row("", f"{size(plan.storage.token_cache)} here for the token cache")
    return page


def _data(plan: Plan) -> str:
    tokens = plan.tokens
    if tokens.epoch is None:
        return "an epoch's length is not known before build-config has run; the steps are training.max_steps"
    what = f"{tokens.train_samples:,} training samples of {tokens.per_sample:,.0f} tokens: {_big(tokens.epoch)} an epoch"
    return f"{what}, an estimate until build-config has run" if tokens.estimated else f"{what}, as build-config found them"


def _share(plan: Plan) -> str:
    return "less than 0.1%" if plan.validation_share < 0.001 else f"{plan.validation_share:.1%}"


def _on_each(plan: Plan) -> str:
    return "" if plan.ranks == 1 else f", on each of {plan.ranks} ranks"


def _memory_table(plan: Plan) -> Table:
    table = _table()
    table.add_column("", no_wrap=True)
    for precision in plan.memory:
        table.add_column(precision, justify="right")
    for part, label in _MEMORY.items():
        table.add_row(label, *(size(parts[part]) if parts[part] else "" for parts in plan.memory.values()))
    return table


def _gpu_table(plan: Plan) -> Table:
    table = _table()
    table.add_column("GPU", no_wrap=True)
    for column in ("TFLOP/s", "memory", "fits", "tokens/s", "time", "USD/h", "USD"):
        table.add_column(column, justify="right", no_wrap=True)
    for rent in plan.gpus:
        table.add_row(
            rent.gpu,
            f"{rent.peak_tflops:,.0f} {rent.precision}",
            f"{rent.memory_gb} GB",
            f"{rent.micro_batch:,}" if rent.micro_batch else "no",
            rounded(rent.tokens_per_s),
            duration(rent.hours * 3600),
            f"{rent.usd_per_hour:.2f}",
            f"{rent.usd:,.2f}",
        )
    return table


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _print_table(console: Console, title: str, table: Table, note: str) -> None:
    """Not Rich's own title and caption, which are as narrow as the table."""
    console.print(title, style="bold")
    console.print(table)
    console.print(note, style="dim")


def _big(number: float) -> str:
    """Three digits and a word."""
    for unit, word in ((1e12, " trillion"), (1e9, " billion"), (1e6, " million")):
        if number >= unit:
            return f"{number / unit:.3g}{word}"
    return f"{number:,.0f}"
