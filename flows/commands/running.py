"""Commands that run the pipeline: train, post-train, evaluate, sync."""

import json
from typing import Annotated

import typer
from rich.console import Console

from flows.commands.shared import Json, Name, need_checkpoints, run_flow, say, stop_on_signals
from flows.stop import STOP
from model.errors import EXIT_FAULT, UserError
from model.params import merge, parse_overrides
from tasks.project import find_project


def train(
    name: Name,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change a field for this run; may be given again.")
    ] = None,
    fork: Annotated[
        str | None, typer.Option(metavar="NEW", help="Begin the new experiment NEW with NAME's newest checkpoint, and train that.")
    ] = None,
    anew: Annotated[bool, typer.Option("--anew", help="Set what was trained aside, and begin at step 0.")] = False,
) -> None:
    """Train an experiment, register and evaluate its checkpoints. What is up to date is skipped, what was interrupted goes on.

    Ctrl-C stops it resumably (exit code 75): the same command goes on. A fork begins with another checkpoint than the newest if
    checkpoint.checkpoint_to_resume names one, and with the fields of --set changed; it is written into params.yaml.

    Example: gpt2 train quickstart --set training.max_steps=100

    Example: gpt2 train quickstart --fork warmer --set training.learning_rate=0.003
    """
    from tasks import post_training, preflight

    project, overrides = find_project(), parse_overrides(changes or [])
    post_training.check_is_none(project, name)
    preflight.check(project, name, overrides)
    if fork is not None or anew:
        from tasks.fork import anew as set_aside
        from tasks.fork import fork as begin_with

        if anew and fork is not None:
            raise UserError("--anew: a fork begins with a checkpoint; leave one of --anew and --fork out")
        if fork is not None:
            parent = begin_with(project, name, fork, overrides)
            print(f"{fork} begins with {parent.name} of {name}; it is in params.yaml now")
            name, overrides = fork, {}
        elif where := set_aside(project, name):
            print(f"what was trained of {name} is in {where.relative_to(project.root)} now")
    run_flow(project, name, "train-gpt2", {"experiment": name, "overrides": overrides})


def post_train(
    name: Annotated[str, typer.Argument(metavar="NAME", help="An experiment with post_training, or the one that it begins with.")],
    base: Annotated[
        str | None,
        typer.Option(metavar="BASE", help="Begin with this one: models:/quickstart/3, a checkpoint's folder, or an exported one."),
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change a field for this run; may be given again.")
    ] = None,
    anew: Annotated[bool, typer.Option("--anew", help="Set what was trained aside, and begin with the base.")] = False,
) -> None:
    """Teach a trained network to answer: fine-tune it on questions with their answers, register and evaluate its checkpoints beside it.

    It begins with the champion unless its entry in params.yaml or --base says otherwise. What is up to date is skipped, what was
    interrupted goes on. Ctrl-C stops it resumably (exit code 75): the same command goes on.

    Example: gpt2 post-train quickstart

    Example: gpt2 post-train quickstart --base models:/quickstart@best --set training.learning_rate=0.001
    """
    from tasks import post_training, preflight
    from tasks.fork import anew as set_aside

    project, overrides = find_project(), parse_overrides(changes or [])
    name = post_training.named(project, name)
    if base is not None:
        overrides = merge(overrides, {"post_training": {"base": post_training.written(project, base)}})
    preflight.check(project, name, overrides)
    if anew and (where := set_aside(project, name)):
        print(f"what was trained of {name} is in {where.relative_to(project.root)} now")
    run_flow(project, name, "post-train", {"experiment": name, "overrides": overrides})


def evaluate(
    name: Name,
    questions: Annotated[int | None, typer.Option(help="Held-out questions to ask; recorded in overrides.yaml.")] = None,
) -> None:
    """Evaluate every checkpoint that is not evaluated yet, and mark the champion. Running it again changes nothing.

    Example: gpt2 evaluate quickstart --questions 5
    """
    project = find_project()
    need_checkpoints(project, name)
    if questions is not None:
        project.with_overrides(name, {"evaluation": {"questions": questions}})
    run_flow(project, name, "re-evaluate", {"experiment": name, "questions": questions})


def sync(name: Name, as_json: Json = False) -> None:
    """Send MLflow and the storage what they missed while they were away. Every run does it at its end; repeating it adds nothing.

    The keys of --json are the fields of Part in tasks/sync.py.

    Example: gpt2 sync quickstart
    """
    from tasks.sync import sync as send

    stop_on_signals()
    with Console(stderr=True).status(f"sending what is missing of {name}"):
        parts = send(find_project(), name, STOP)
    if as_json:
        print(json.dumps([part.as_json() for part in parts], indent=1))
    for part in parts:
        if part.problem:
            say(part.problem)
        elif not as_json:
            print(f"{part.service}: {part.message}")
    if any(part.problem for part in parts):
        raise typer.Exit(EXIT_FAULT)
