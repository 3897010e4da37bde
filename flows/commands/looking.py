"""Commands that look and change nothing: checkpoints, status, data, plan, benchmark."""

import json
from typing import Annotated

import typer
from rich.console import Console

from flows.commands.shared import Json, Name, say
from model.errors import EXIT_FAULT
from model.params import parse_overrides
from tasks.project import find_project


def checkpoints(
    name: Name,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and compare its digest.")] = False,
    as_json: Json = False,
) -> None:
    """List the checkpoints of an experiment: which are whole, which is the champion.

    Example: gpt2 checkpoints quickstart --verify
    """
    from tasks.overview import checkpoint_list

    project = find_project()
    project.experiment(name)
    rows = checkpoint_list(project, name, verify)
    if as_json:
        print(json.dumps(rows, indent=1))
    elif rows:
        from flows.checkpoint_page import print_checkpoints

        print_checkpoints(project, name, rows)
    else:
        print(f"{name} has no checkpoints yet; train it first: gpt2 {project.training_stage(name)} {name}")
    if not all(row["whole"] for row in rows):
        say("; ".join(row["problem"] for row in rows if not row["whole"]) + ". Bring it back: dvc checkout, or dvc pull")
        raise typer.Exit(EXIT_FAULT)


def status(name: Name, as_json: Json = False) -> None:
    """Show how far an experiment is, and which stages are up to date.

    Example: gpt2 status quickstart --json
    """
    from tasks.overview import code_differs, run_status

    project = find_project()
    found = run_status(project, name)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    print(f"{name}: {found['state']}, step {found['step']:,}, {found['tokens']:,} tokens")
    print(f"config {found['config_digest'] or 'not built yet'}")
    if code_differs(project, name):
        print("the code is not the one it was last trained with")
    for stage, state in found["stages"].items():
        print(f"  {stage:<13}{state}")


def data(
    name: Name,
    show: Annotated[int, typer.Option(min=0, metavar="N", help="Samples to print, as the trainer sees them.")] = 3,
    as_json: Json = False,
) -> None:
    """Show what an experiment trains on: samples, the split, lengths, the size and time of an epoch. Works before and after training.

    Draws the lengths into runs/NAME/report. The keys of --json are the fields of DataReport in tasks/data_report.py.

    Example: gpt2 data quickstart --show 3
    """
    project = find_project()
    project.experiment(name)
    with Console(stderr=True).status(f"looking at the data of {name}"):
        from flows.data_page import print_data
        from tasks.data_report import data_report

        report = data_report(project, name, show)
    if as_json:
        print(json.dumps(report.as_json(), indent=1))
    else:
        print_data(project, report)


def plan(
    name: Name,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Plan with a field changed; may be given again.")
    ] = None,
    mfu: Annotated[float, typer.Option(metavar="SHARE", help="Share of the GPU's peak that is assumed, 0 to 1.")] = 0.4,
    gpu: Annotated[list[str] | None, typer.Option(metavar="GPU", help="Only this GPU type, such as H100; may be given again.")] = None,
    price: Annotated[list[str] | None, typer.Option(metavar="GPU=USD", help="USD an hour, such as H100=2.50; may be given again.")] = None,
    as_json: Json = False,
) -> None:
    """Say what an experiment will take: parameters, tokens, FLOPs, memory, hours and cost by GPU type, checkpoints, storage.

    Trains nothing and reads no data. The keys of --json are the fields of Plan in tasks/plan.py.

    Example: gpt2 plan samples2m --set training.gradient_accumulation=120 --gpu H100
    """
    from flows.plan_page import print_plan
    from tasks.plan import plan as make_plan

    made = make_plan(find_project(), name, parse_overrides(changes or []), mfu, gpu or (), price or ())
    if as_json:
        print(json.dumps(made.as_json(), indent=1))
    else:
        print_plan(made)


def benchmark(
    preset: Annotated[str, typer.Option(help="The network's size: nano, tiny, mini, small, medium, large or xl.")] = "small",
    window: Annotated[int | None, typer.Option(min=2, help="Tokens a window; by default all that the preset can look back on.")] = None,
    batch: Annotated[str, typer.Option(help="Windows a step; auto: powers of two until a GPU's memory is full.")] = "8",
    dropout: Annotated[float, typer.Option(min=0.0, max=0.99, help="While training.")] = 0.0,
    compile_model: Annotated[bool, typer.Option("--compile", help="torch.compile the network first.")] = False,
    seconds: Annotated[float, typer.Option(min=0.1, help="To measure each micro-batch for.")] = 20.0,
    as_json: Json = False,
) -> None:
    """Measure training on this machine: tokens/s, MFU, step time, memory, on random tokens. Works outside a project, too.

    bf16 autocast on CUDA, fp32 on a CPU. The keys of --json are the fields of Measurement in tasks/machine_benchmark.py.

    Example: gpt2 benchmark --preset small --window 1024 --batch auto --compile
    """
    from model.libraries import prepare_libraries

    prepare_libraries()
    with Console(stderr=True).status("measuring"):
        from flows.plan_page import print_measurements
        from tasks.machine_benchmark import measure

        measured = measure(preset, window, batch, dropout, compile_model, seconds)
    if as_json:
        print(json.dumps([row.as_json() for row in measured], indent=1))
    else:
        print_measurements(measured)
