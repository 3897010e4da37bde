"""The command that looks back: replay."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from flows.commands.shared import Json, say, stop_on_signals
from flows.stop import STOP
from flows.units import count
from model.errors import EXIT_FAULT
from tasks.project import find_project


def replay(
    run_id: Annotated[str, typer.Argument(metavar="RUN_ID", help="An MLflow run of a training: the 32 digits in its address.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps to take and compare.")] = 20,
    folder: Annotated[Path | None, typer.Option(help="A new folder; by default replays/NAME-… in the project. It stays.")] = None,
    data: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where the run's data files lie now, if they have moved.")] = None,
    as_json: Json = False,
) -> None:
    """Begin a training again from its MLflow run, and say whether its first losses are the same to the bit.

    Restores the code of its commit, its config and its data manifest into a new folder, and names whatever is not as it was. Nothing is
    registered or logged. Exit code 0: the same, 1: not the same. The keys of --json are the fields of Replay in tasks/replay.py.

    Example: gpt2 replay 0f3c5a1e9b7d4c2f8a6e5d4c3b2a1908 --steps 20
    """
    from tasks import replay as replaying

    stop_on_signals()
    try:
        with Console(stderr=True).status(f"training {count(steps, 'step')} again"):
            result = replaying.replay(find_project(), run_id, steps, folder, data, STOP)
    except replaying.ReplayFault as fault:
        say(str(fault))
        raise typer.Exit(EXIT_FAULT) from None
    if as_json:
        print(json.dumps(result.as_json(), indent=1))
    else:
        print(f"{result.experiment}, run {result.run_id}: replayed in {result.folder}")
        print(f"code: {result.code}")
        for difference in result.differences:
            print(f"differs: {difference}")
        for note in result.notes:
            print(f"note: {note}")
        for name, pairs in (("losses", result.losses), ("validation losses", result.validation)):
            if pairs:
                same = sum(pair.equal for pair in pairs)
                print(f"{same} of {len(pairs)} {name} equal to the bit (steps {pairs[0].step} to {pairs[-1].step})")
        unequal = [pair for pair in result.losses if not pair.equal] or [pair for pair in result.validation if not pair.equal]
        if unequal:
            table = Table("step", "in the run", "now", title="the first that differ", title_justify="left")
            for pair in unequal[:3]:
                table.add_row(str(pair.step), repr(pair.run), repr(pair.replay))
            Console().print(table)
    if not result.equal:
        raise typer.Exit(EXIT_FAULT)
