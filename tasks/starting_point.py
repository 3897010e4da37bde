"""Checkpoints that an experiment begins with and does not hold itself: where they lie on this machine.

The trainer asks no server and looks in no other run; it is told the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path

from model.checkpoint.store import MANIFEST, Checkpoint, CheckpointStore, NotWhole, is_name, open_checkpoint
from model.errors import UserError
from model.run_config import RunConfig
from model.run_folder import RunFolder
from model.training.journal import read_current
from model.training.resume import wanted_last
from tasks import tracking
from tasks.project import Project

REGISTRY = "models:/"
"""Begins what names a registered version."""


def named_checkpoint(project: Project, name: str, config: RunConfig) -> Path | None:
    """The folder that `checkpoint_to_resume`, `fork_of` or `post_training` names; None if none is named or the run holds it itself.

    Raises:
        UserError: it is nowhere to be found.
    """
    folder = project.run_folder(name)
    wanted, fork = config.checkpoint.checkpoint_to_resume, config.checkpoint.fork_of
    if wanted is not None and not is_name(wanted) and wanted_last(read_current(folder.journal)) != wanted:
        return locate(project, name, wanted)
    if config.begins_with is None or _has_begun(folder, config):
        return None
    if config.post_training is not None:
        from tasks.post_training import place_of  # which asks this module

        return place_of(project, config.post_training.base)
    if fork is not None:
        place = find_by_digest(project, fork.digest)
        if place is None:
            raise UserError(
                f"checkpoint.fork_of: {fork.checkpoint} of {fork.experiment} ({fork.digest[:12]}) is not in runs/; bring it back: "
                f"dvc pull train@{fork.experiment}"
            )
        return place
    return None


def _has_begun(folder: RunFolder, config: RunConfig) -> bool:
    """Whether the run holds a checkpoint of this configuration. (One of another is set aside when training begins.)"""
    for path in CheckpointStore(folder.checkpoints).folders():
        with contextlib.suppress(NotWhole):
            if open_checkpoint(path).state().get("config_digest") == config.digest:
                return True
    return False


def locate(project: Project, name: str, wanted: str) -> Path:
    """The folder of a checkpoint that is given as a folder (relative to the project, or absolute) or as a registered version of `name`'s
    MLflow: `models:/quickstart@champion`, `models:/quickstart/3`, `models:/m-…`.

    Raises:
        UserError: there is no such folder or version, or its checkpoint is not in runs/.
    """
    if not wanted.startswith(REGISTRY):
        if "://" in wanted or ":/" in wanted[3:]:
            raise UserError(f"checkpoint.checkpoint_to_resume: {wanted}: give a folder, or a registered version such as {REGISTRY}NAME/3")
        try:
            place = (project.root / wanted).resolve()
            there = place.is_dir()
        except (OSError, ValueError):  # NUL, too long, …
            there = False
        if not there:
            raise UserError(f"checkpoint.checkpoint_to_resume: {wanted[:200]!r} is not a folder here")
        return place
    digest = registered_digest(project, name, wanted)
    place_or_none = find_by_digest(project, digest)
    if place_or_none is None:
        cure = "dvc pull" if wanted.startswith(f"{REGISTRY}m-") else f"gpt2 restore {wanted.removeprefix(REGISTRY)}"
        raise UserError(f"checkpoint.checkpoint_to_resume: {wanted} ({digest[:12]}) is not in runs/; bring it back: {cure}")
    return place_or_none


def registered_digest(project: Project, name: str, uri: str, asked_by: str | None = None) -> str:
    """The digest of the checkpoint behind an MLflow URI, in the registry that the experiment `name` uses.

    Raises:
        UserError: there is no such version, or MLflow does not answer; the message begins with `asked_by`.
    """
    from mlflow import MlflowException

    asked_by = asked_by or f"checkpoint.checkpoint_to_resume: {uri}"

    client = tracking.connect(project, project.experiment(name))
    what = uri.removeprefix(REGISTRY)
    try:
        if what.startswith("m-"):
            tags = client.get_logged_model(what).tags
        elif "@" in what:
            tags = client.get_model_version_by_alias(*what.split("@", 1)).tags
        else:
            model, _, version = what.partition("/")
            tags = client.get_model_version(model, version).tags
    except MlflowException as error:
        raise UserError(f"{asked_by}: {error.message.splitlines()[0]}") from None
    if tracking.DIGEST_TAG not in tags:
        raise UserError(f"{asked_by} is not a checkpoint of this project")
    return str(tags[tracking.DIGEST_TAG])


def find_by_digest(project: Project, digest: str) -> Path | None:
    """A checkpoint's folder in the project's runs, set aside ones included; its bytes are the trainer's to verify."""
    return next(_folders_with(project, digest), None)


def find_whole(project: Project, digest: str) -> Checkpoint | None:
    """The same, with every byte verified; damaged ones are passed over."""
    for folder in _folders_with(project, digest):
        with contextlib.suppress(NotWhole):
            checkpoint = open_checkpoint(folder)
            checkpoint.verify()
            return checkpoint
    return None


def _folders_with(project: Project, digest: str) -> Iterator[Path]:
    manifests = (project.root / "runs").glob(f"*/**/step_*/{MANIFEST}")
    for manifest in sorted(manifests, key=lambda path: ("damaged" in path.parts, "aside" in path.parts, path)):
        if hashlib.sha256(manifest.read_bytes()).hexdigest() == digest:
            yield manifest.parent
