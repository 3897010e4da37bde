"""The command that measures a model where others are measured: benchmark-lm."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from flows.commands.shared import Json, Name, Which, need_checkpoints, say, stop_on_signals
from flows.stop import STOP
from model.errors import EXIT_FAULT
from model.secrets import redacted
from tasks.project import find_project

if TYPE_CHECKING:
    from tasks.benchmark_lm import Benchmarked


def benchmark_lm(
    name: Name,
    tasks: Annotated[
        str | None, typer.Option(metavar="TASK,…", help="Names that lm_eval knows; by default evaluation.benchmarks, or the usual four.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many examples of each task: to try it out, no score.")] = None,
    include_path: Annotated[Path | None, typer.Option(metavar="FOLDER", help="A folder with tasks of your own (YAML).")] = None,
    checkpoint: Which = None,
    again: Annotated[bool, typer.Option("--again", help="Run what is known already, too.")] = False,
    as_json: Json = False,
) -> None:
    """Run HellaSwag, LAMBADA, ARC-Easy and PIQA by lm-evaluation-harness on the champion and on the steps of evaluation.milestones.

    Needs the extra lm-eval, here or in an environment of its own whose Python GPT2_LM_EVAL_PYTHON names. The data of its tasks are
    downloaded from the Hub once. The keys of --json are the fields of Benchmarked in tasks/benchmark_lm.py.

    Example: gpt2 benchmark-lm quickstart --tasks hellaswag,piqa --limit 100
    """
    from tasks import benchmark_lm as benchmarking

    project = find_project()
    need_checkpoints(project, name)
    stop_on_signals()
    try:
        with Console(stderr=True).status(f"lm_eval works on {name}"):
            chosen = benchmarking.chosen_checkpoints(project, name, checkpoint, _note)
            wanted = [task.strip() for task in tasks.split(",") if task.strip()] if tasks else []
            found = benchmarking.benchmark_lm(project, name, chosen, wanted, limit, include_path, again, _note, STOP)
    except benchmarking.BenchmarkFault as fault:
        say(str(fault))
        raise typer.Exit(EXIT_FAULT) from None
    if as_json:
        print(json.dumps([asdict(row) for row in found], indent=1))
    else:
        _print(found, benchmarking.GPT2_124M)


def _print(found: list["Benchmarked"], peers: dict[tuple[str, str], float]) -> None:
    limit = found[0].limit
    of = f"the first {limit} examples of each task: no score" if limit else "zero-shot"
    table = Table("checkpoint", "task", "metric", title=f"lm-evaluation-harness {found[0].lm_eval_version}, {of}", title_justify="left")
    for column in ("value", "± stderr", "GPT-2 124M"):
        table.add_column(column, justify="right")
    for row in found:
        for task, values in row.results.items():
            for metric in _shown(values):
                error, peer = values.get(f"{metric}_stderr"), peers.get((task, metric))
                figures = f"{values[metric]:.4f}", "" if error is None else f"{error:.4f}", "" if peer is None else f"{peer:.4f}"
                table.add_row(row.checkpoint, task, metric, *figures)
    Console().print(table)
    if any("hellaswag" in row.results for row in found):
        print(
            "HellaSwag is acc_norm here: the ending with the highest likelihood a byte. GPT-2 124M's 0.2955 is another metric (completion)."
        )


def _shown(values: dict[str, float]) -> list[str]:
    """What stands for a task: acc_norm rather than acc, and whatever else it tells."""
    metrics = [metric for metric in values if not metric.endswith("_stderr") and "_stderr." not in metric]
    return [metric for metric in metrics if not (metric == "acc" and "acc_norm" in metrics)]


def _note(message: str) -> None:
    print(redacted(message), file=sys.stderr, flush=True)
