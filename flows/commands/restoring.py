"""The command that brings back what the storage holds: restore."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flows.commands.shared import Json
from tasks.project import find_project


def restore(
    what: Annotated[str, typer.Argument(metavar="VERSION", help="A registered version: NAME@champion, NAME@best, NAME/3.")],
    to: Annotated[Path | None, typer.Option(metavar="FOLDER", help="A new folder; by default the run of NAME.")] = None,
    as_json: Json = False,
) -> None:
    """Bring a registered checkpoint back from the storage, whatever is checked out here. Every byte is compared with its digest.

    It needs the registry (MLFLOW_TRACKING_URI, or the one in the storage) and the storage, and no dvc.lock. The keys of --json are those
    of Restored.as_json in tasks/restore.py.

    Example: gpt2 restore quickstart@champion
    """
    from tasks import restore as restoring

    with Console(stderr=True).status(f"looking for {what}"):
        restored = restoring.restore(find_project(), what, to)
    if as_json:
        print(json.dumps(restored.as_json(), indent=1))
    else:
        already = "" if restored.source else ", and was already"
        print(f"{restored.what} is in {restored.checkpoint.path}{already}")
