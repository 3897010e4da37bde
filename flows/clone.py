"""Where a worker's flows run: in its own machine's clone of the project, wherever that lies and wherever they were deployed from."""

import os
from pathlib import Path

from tasks.project import find_project

PROJECT = "GPT2_PROJECT"
"""The environment variable that names a worker's clone; by default it is the one whose code is installed."""


def enter() -> dict[str, str]:
    """A pull step of the deployments (prefect.yaml): make the clone the working directory.

    Raises:
        UserError: no project is there.
    """
    root = find_project(Path(os.environ.get(PROJECT) or Path(__file__).parents[1])).root
    os.chdir(root)
    return {"directory": str(root)}
