"""Before anything is changed: has this machine what the experiment asks for? A device, a way to the data, a place for the results."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from model.config import Experiment
from model.errors import UserError
from tasks import versioning
from tasks.project import Project

HUB_ANSWERS_WITHIN_S = 5.0


def check(project: Project, name: str, overrides: dict[str, Any], trains_here: bool = True) -> Experiment:
    """The experiment with these overrides, if it can be trained on this machine now. Nothing is written. Where another machine trains
    (not `trains_here`) this one needs no device.

    Raises:
        UserError: what is missing, all of it in one line. A training that is done already misses nothing.
    """
    experiment = project.with_overrides(name, overrides)
    missing = [what for what in (_device(experiment) if trains_here else None, _data(experiment), _storage(project, experiment)) if what]
    if missing and not _is_trained(project, name, overrides):
        raise UserError("; ".join(missing))
    return experiment


def _is_trained(project: Project, name: str, overrides: dict[str, Any]) -> bool:
    needed = {"build-config", project.training_stage(name)}
    return overrides == project.overrides(name) and needed <= set(versioning.up_to_date(project, name))


def _device(experiment: Experiment) -> str | None:
    if experiment.hardware.device in ("auto", "cpu"):
        return None
    from model.device import pick_device  # seconds of torch, only where a device was asked for

    try:
        pick_device(experiment.hardware.device)
    except UserError as error:
        return str(error)
    return None


def _data(experiment: Experiment) -> str | None:
    """Only the Hub is asked here, because a machine without a network is common; build-config says what else is wrong with the data."""
    from model.stream.hub import is_dataset_id

    path = experiment.data.path
    if not is_dataset_id(path) or Path(path).exists():
        return None
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(hub, timeout=HUB_ANSWERS_WITHIN_S):  # noqa: S310 (the user's own setting)
            return None
    except urllib.error.HTTPError:
        return None  # it answers
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", error)
        return f"data.path: {path} is on the Hub, and {hub} cannot be reached ({why}); connect, or set data.path to a local folder"


def _storage(project: Project, experiment: Experiment) -> str | None:
    base, folder = experiment.storage.base_folder, project.storage_folder(experiment)
    if folder is None:
        import fsspec

        try:
            fsspec.url_to_fs(base)
        except (ImportError, ValueError) as error:
            return f"storage.base_folder: {base} cannot be used here: {error}"
        return None
    if folder.exists() and not folder.is_dir():
        return f"storage.base_folder: {folder} is a file, not a folder"
    place = folder if folder.exists() else folder.parent
    if not place.exists():
        return f"storage.base_folder: {place} does not exist; mount it, or create it"
    if not os.access(place, os.W_OK):
        return f"storage.base_folder: {place} cannot be written to"
    return None
