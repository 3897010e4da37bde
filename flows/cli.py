"""`gpt2`: the commands that people type, and how it ends."""

import sys

import typer
from typer.exceptions import TyperException

from flows.commands import benchmarking, comparing, deploying, looking, replaying, reporting, restoring, running, serving, using
from flows.commands.shared import say
from model.errors import EXIT_FAULT, EXIT_STOPPED, EXIT_USER, Stopped, UserError

app = typer.Typer(
    help="Pre-train GPT-2 from scratch: train, post-train, register, evaluate, use.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

for command in (
    running.train,
    running.post_train,
    running.evaluate,
    looking.checkpoints,
    looking.status,
    looking.data,
    comparing.compare,
    looking.plan,
    looking.benchmark,
    using.generate,
    using.chat,
    using.export,
    replaying.replay,
    benchmarking.benchmark_lm,
    reporting.report,
    running.sync,
    restoring.restore,
    serving.services,
    serving.worker,
    deploying.deploy,
):
    app.command()(command)


def main() -> None:
    """The entry point: errors are one line on standard error. 0 done, 1 a fault, 2 the user's mistake, 75 stopped and resumable."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except UserError as error:
        say(str(error))
        sys.exit(EXIT_USER)
    except TyperException as error:
        say(f"{error.format_message()} See gpt2 --help")
        sys.exit(EXIT_USER)
    except (Stopped, KeyboardInterrupt, typer.Abort) as stopped:
        say(str(stopped) or "stopped")
        sys.exit(EXIT_STOPPED)
    except ConnectionError as error:
        say(str(error))
        sys.exit(EXIT_FAULT)


if __name__ == "__main__":
    main()
