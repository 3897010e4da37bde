"""The command that makes a run's report."""

import os

from rich.console import Console

from flows.commands.shared import Name
from tasks.project import find_project


def report(name: Name) -> None:
    """Make one HTML page of a run: curves, checkpoints and their scores, texts, data, cost and energy, how to reproduce it. Asks no server.

    Every flow makes it at its end; of a training that runs or was stopped, it shows how far that is. The page refers to nothing outside
    itself: send it as it is.

    Example: gpt2 report quickstart
    """
    project = find_project()
    with Console(stderr=True).status(f"making the report of {name}"):
        from tasks.report.page import write_report

        path = write_report(project, name)
    print(os.path.relpath(path))
