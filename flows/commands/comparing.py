"""The command that sets two checkpoints side by side."""

import json
from typing import Annotated

import typer
from rich.console import Console

from flows.commands.shared import Json
from tasks.project import find_project

_WHICH = "An experiment (its champion), or one of its checkpoints: NAME/step_00001000."


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help=_WHICH)],
    b: Annotated[str, typer.Argument(metavar="B", help=_WHICH)],
    as_json: Json = False,
) -> None:
    """Compare two checkpoints on the same held-out samples: each figure, the paired difference, and who wins by the champion rule.

    What is not scored yet is scored, with A's evaluation settings. No alias is moved: each experiment has a champion of its own.
    Experiments of other data, seed or split are refused. The keys of --json are the fields of Comparison in tasks/compare.py.

    Example: gpt2 compare quickstart quickstart/step_00000360
    """
    project = find_project()
    with Console(stderr=True).status(f"comparing {a} and {b}"):
        from flows.comparison_page import print_comparison
        from tasks.compare import compare as measure

        comparison = measure(project, a, b)
    if as_json:
        print(json.dumps(comparison.as_json(), indent=1))
    else:
        print_comparison(comparison)
