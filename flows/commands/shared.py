"""What the commands have in common: their arguments, errors in one line, and running a flow in this process."""

import os
import signal
import sys
from types import FrameType
from typing import Annotated, Any

import typer

from flows.stop import STOP
from model.errors import EXIT_FAULT, EXIT_STOPPED, Stopped, UserError
from model.secrets import redacted
from tasks.project import Project
from tasks.steps import stop_signals

Name = Annotated[str, typer.Argument(metavar="NAME", help="An experiment of params.yaml.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Which = Annotated[str | None, typer.Option("--checkpoint", help="Such as step_00001000; by default the champion.")]

_ENVIRONMENT = {
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # the terminal shows the stages; Prefect's log is in its UI
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # as deployed runs (prefect.yaml): five minutes of silence count as dead
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DVC_NO_ANALYTICS": "1",
}
"""For the flow in this process, and what it starts."""


def run_flow(project: Project, name: str, flow_name: str, parameters: dict[str, Any]) -> None:
    """Run a flow in this process, show it, and end with the table of checkpoints, or with what went wrong as the exit code."""
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    stop_on_signals()
    from prefect.exceptions import Abort

    from flows.local_server import use_prefect_server

    use_prefect_server()
    from flows.post_train import post_train
    from flows.re_evaluate import re_evaluate
    from flows.terminal import Terminal
    from flows.train_gpt2 import train_gpt2

    flow: Any = {"train-gpt2": train_gpt2, "post-train": post_train, "re-evaluate": re_evaluate}[flow_name]
    try:
        with Terminal(project.run_folder(name).journal):
            state = flow(**parameters, return_state=True)
    except Abort as abort:
        raise Stopped(str(abort)) from abort
    if state.is_failed():
        error = state.result(raise_on_failure=False)
        if isinstance(error, UserError | Stopped):
            raise error
        say(str(error))
        raise typer.Exit(EXIT_FAULT)
    if not state.is_completed():
        raise Stopped(state.message)
    from flows.checkpoint_page import print_result

    print_result(project, name)


def stop_on_signals() -> None:
    """The first Ctrl-C (or SIGTERM) asks for a resumable stop, the second leaves at once: what still runs notices, saves, and leaves."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        if STOP.is_set():
            os._exit(EXIT_STOPPED)
        STOP.set()

    for number in stop_signals():
        signal.signal(number, on_signal)


def need_checkpoints(project: Project, name: str) -> None:
    """Refuse an experiment without any."""
    project.experiment(name)
    if not any(project.run_folder(name).checkpoints.glob("step_*")):
        raise UserError(f"{name} has no checkpoints yet; train it first: gpt2 {project.training_stage(name)} {name}")


def say(message: str) -> None:
    """An error, on one line of standard error."""
    print(f"error: {' '.join(redacted(message).split())}", file=sys.stderr, flush=True)
