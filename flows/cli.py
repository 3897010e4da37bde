"""`gpt2`: the commands that people type. What takes long to import is imported where it is used."""

import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.exceptions import TyperException

from flows.stop import STOP
from model.errors import EXIT_FAULT, EXIT_STOPPED, EXIT_USER, Stopped, UserError
from model.params import parse_overrides
from model.secrets import redacted
from tasks.project import Project, find_project
from tasks.steps import stop_signals

app = typer.Typer(
    help="Pre-train GPT-2 from scratch: train, register, evaluate, use.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="An experiment of params.yaml.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Which = Annotated[str | None, typer.Option("--checkpoint", help="Such as step_00001000; by default the champion.")]

_ENVIRONMENT = {
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # the terminal shows the stages; Prefect's log is in its UI
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DVC_NO_ANALYTICS": "1",
}
"""For the flow in this process, and what it starts."""


@app.command()
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
    from tasks import preflight

    project, overrides = find_project(), parse_overrides(changes or [])
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
    _run_flow(project, name, "train-gpt2", {"experiment": name, "overrides": overrides})


@app.command()
def evaluate(
    name: Name,
    questions: Annotated[int | None, typer.Option(help="Held-out questions to ask; recorded in overrides.yaml.")] = None,
) -> None:
    """Evaluate every checkpoint that is not evaluated yet, and mark the champion. Running it again changes nothing.

    Example: gpt2 evaluate quickstart --questions 5
    """
    project = find_project()
    _need_checkpoints(project, name)
    if questions is not None:
        project.with_overrides(name, {"evaluation": {"questions": questions}})
    _run_flow(project, name, "re-evaluate", {"experiment": name, "questions": questions})


@app.command()
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
        from flows.checkpoint_page import table

        Console().print(table(rows))
    else:
        print(f"{name} has no checkpoints yet; train it first: gpt2 train {name}")
    if not all(row["whole"] for row in rows):
        _say("; ".join(row["problem"] for row in rows if not row["whole"]) + ". Bring it back: dvc checkout, or dvc pull")
        raise typer.Exit(EXIT_FAULT)


@app.command()
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


@app.command()
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


@app.command()
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


@app.command()
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
    with Console(stderr=True).status("measuring"):
        from flows.plan_page import print_measurements
        from tasks.machine_benchmark import measure

        measured = measure(preset, window, batch, dropout, compile_model, seconds)
    if as_json:
        print(json.dumps([row.as_json() for row in measured], indent=1))
    else:
        print_measurements(measured)


@app.command()
def generate(
    name: Name,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the text begins with.")],
    checkpoint: Which = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Choose among the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Choose among the likeliest tokens that reach p.")] = None,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal text.")] = 0,
) -> None:
    """Let the champion write on.

    Example: gpt2 generate quickstart "Q: What is 12 + 30?"
    """
    from tasks import use

    chosen = use.pick_checkpoint(find_project(), name, checkpoint)
    print(prompt, end="", flush=True)
    for piece in use.generate(chosen, prompt, max_new_tokens, temperature, top_k, top_p, seed):
        print(piece, end="", flush=True)
    print()


@app.command()
def export(name: Name, folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder.")], checkpoint: Which = None) -> None:
    """Export the champion in Hugging Face's format (safetensors), for AutoModelForCausalLM and AutoTokenizer.

    Example: gpt2 export quickstart out/
    """
    from tasks import use

    chosen = use.pick_checkpoint(find_project(), name, checkpoint)
    use.export(chosen, folder)
    print(f"{chosen.name} of {name} is in {folder}")


@app.command()
def sync(name: Name, as_json: Json = False) -> None:
    """Send MLflow and the storage what they missed while they were away. Every run does it at its end; repeating it adds nothing.

    The keys of --json are the fields of Part in tasks/sync.py.

    Example: gpt2 sync quickstart
    """
    from tasks.sync import sync as send

    _stop_on_signals()
    with Console(stderr=True).status(f"sending what is missing of {name}"):
        parts = send(find_project(), name, STOP)
    if as_json:
        print(json.dumps([part.as_json() for part in parts], indent=1))
    for part in parts:
        if part.problem:
            _say(part.problem)
        elif not as_json:
            print(f"{part.service}: {part.message}")
    if any(part.problem for part in parts):
        raise typer.Exit(EXIT_FAULT)


@app.command()
def services(
    prefect_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of Prefect's server and UI.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of MLflow's server and UI.")] = 5000,
) -> None:
    """Start Prefect's and MLflow's servers with their UIs and a worker of the pool `gpu`, and deploy. Ctrl-C ends all of them.

    Example: gpt2 services
    """
    from flows.services import run_services

    run_services(find_project(), prefect_port, mlflow_port)


def main() -> None:
    """The entry point: errors are one line on standard error. 0 done, 1 a fault, 2 the user's mistake, 75 stopped and resumable."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except UserError as error:
        _say(str(error))
        sys.exit(EXIT_USER)
    except TyperException as error:
        _say(f"{error.format_message()} See gpt2 --help")
        sys.exit(EXIT_USER)
    except (Stopped, KeyboardInterrupt, typer.Abort) as stopped:
        _say(str(stopped) or "stopped")
        sys.exit(EXIT_STOPPED)
    except ConnectionError as error:
        _say(str(error))
        sys.exit(EXIT_FAULT)


def _run_flow(project: Project, name: str, flow_name: str, parameters: dict[str, Any]) -> None:
    """Run a flow in this process, show it, and end with the table of checkpoints, or with what went wrong as the exit code."""
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    _stop_on_signals()
    from flows.local_server import use_prefect_server

    use_prefect_server()
    from flows.re_evaluate import re_evaluate
    from flows.terminal import Terminal
    from flows.train_gpt2 import train_gpt2

    flow: Any = {"train-gpt2": train_gpt2, "re-evaluate": re_evaluate}[flow_name]
    with Terminal(project.run_folder(name).journal):
        state = flow(**parameters, return_state=True)
    if state.is_failed():
        error = state.result(raise_on_failure=False)
        if isinstance(error, UserError | Stopped):
            raise error
        _say(str(error))
        raise typer.Exit(EXIT_FAULT)
    if not state.is_completed():
        raise Stopped(state.message)
    from flows.checkpoint_page import print_result

    print_result(project, name)


def _stop_on_signals() -> None:
    """The first Ctrl-C (or SIGTERM) asks for a resumable stop, the second leaves at once: what still runs notices, saves, and leaves."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        if STOP.is_set():
            os._exit(EXIT_STOPPED)
        STOP.set()

    for number in stop_signals():
        signal.signal(number, on_signal)


def _need_checkpoints(project: Project, name: str) -> None:
    project.experiment(name)
    if not any(project.run_folder(name).checkpoints.glob("step_*")):
        raise UserError(f"{name} has no checkpoints yet; train it first: gpt2 train {name}")


def _say(message: str) -> None:
    print(f"error: {' '.join(redacted(message).split())}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
