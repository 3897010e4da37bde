"""Bringing a registered checkpoint back from the external storage, whatever this clone has: `gpt2 restore NAME@champion`.

The registry has its digest, and the notes of tasks/pushed.py lead from there to what DVC pushed. What is not pushed yet is looked for among
the copies of the trainings that run (tasks/mirror.py).

Nothing that lies in the storage is believed: no name in it becomes a path here, and the digest that the registry has decides what is whole.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model import disk
from model.checkpoint.store import MANIFEST, Checkpoint, CheckpointStore, NotWhole, is_name, name_of, open_checkpoint
from model.errors import UserError
from model.params import check_experiment_name
from model.run_folder import RunFolder
from model.secrets import redacted
from tasks import tracking
from tasks.forwarder import trainer_lives
from tasks.lease import entries, open_place
from tasks.project import Project, read_json
from tasks.pushed import DIGEST, Source, among_pushed, fetch, in_folder, storage_of
from tasks.starting_point import find_whole, registered_digest


@dataclass(frozen=True)
class Restored:
    """A checkpoint that is whole and here."""

    what: str
    """What was asked for."""
    checkpoint: Checkpoint
    source: str | None
    """Where in the storage it came from; None if it was here already."""

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        step, folder = _step(self.checkpoint), str(self.checkpoint.path)
        return {"what": self.what, "step": step, "digest": self.checkpoint.digest, "folder": folder, "source": self.source}


def restore(project: Project, what: str, to: Path | None = None) -> Restored:
    """Bring the checkpoint behind `NAME@alias` or `NAME/version` back from the storage: as the new folder `to`, else into the run of NAME
    where it is missing there, or into its `aside/restored` where it would change what the run is. One that is whole and here stays.

    Raises:
        UserError: there is no such version, the storage holds no whole copy of it, or `to` exists.
    """
    what = what.removeprefix("models:/")
    name, *version = re.split("[@/]", what, maxsplit=1)
    project.experiment(check_experiment_name(name))
    if not any(version):
        raise UserError(f"{what}: say which version, such as {name}@champion or {name}/3")
    if to is not None and to.exists():
        raise UserError(f"--to: {to} is there already; give a new folder")
    digest = _registered(project, name, what)
    if to is None and (here := find_whole(project, digest)):
        return Restored(what, here, None)
    beside = project.run_folder(name).path if to is None else to.absolute().parent
    partial = beside / f".restore.{os.getpid()}.partial"
    try:
        beside.mkdir(parents=True, exist_ok=True)
        disk.sweep(beside, ".restore.")
        source = _fetch(project, name, what, digest, partial)
        place = to if to is not None else _place(project, name, open_checkpoint(partial))
        place.parent.mkdir(parents=True, exist_ok=True)
        disk.rename(partial, place)
        disk.fsync(place.parent)
    except OSError as error:
        raise UserError(f"{what}: cannot be written to {beside}: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Restored(what, open_checkpoint(place), source.place)


def _registered(project: Project, name: str, what: str) -> str:
    """The digest that the registry has for it. A registry that is not there is not made."""
    database = tracking.mlflow_folder(project, project.experiment(name)) / "mlflow.db"
    if not os.environ.get("MLFLOW_TRACKING_URI") and not database.exists():
        raise UserError(
            f"{what}: there is no registry ({database} does not exist): set storage.base_folder to the storage that it was trained with, "
            "or MLFLOW_TRACKING_URI to MLflow's address"
        )
    digest = registered_digest(project, name, f"models:/{what}", what)
    if not DIGEST.fullmatch(digest):  # it becomes part of a path
        raise UserError(f"{what} is not a checkpoint of this project: its digest is none")
    return digest


def _fetch(project: Project, name: str, what: str, digest: str, partial: Path) -> Source:
    """Copy the whole checkpoint with this digest to the folder `partial`; where it comes from."""
    storage = storage_of(project, name)
    shown, complaints = redacted(storage), []
    try:
        fs, root = open_place(storage)
        for source in itertools.chain(among_pushed(fs, root, name, digest), _among_copies(fs, root, name, digest)):
            try:
                fetch(fs, source, digest, partial)
                return source
            except (FileNotFoundError, NotWhole) as error:
                complaints.append(str(error))
    except ImportError as error:
        raise UserError(f"storage.base_folder: {shown}: {error}; or pip install 'gpt2-from-scratch[s3,ssh]'") from None
    except Exception as error:  # every file system of fsspec has errors of its own
        raise UserError(f"storage.base_folder: no copy from {shown}: {type(error).__name__}: {error}") from None
    if complaints:
        raise UserError(f"{what}: the storage {shown} has no whole copy of it ({digest[:12]}): {'; '.join(complaints)}")
    raise UserError(
        f"{what}: the storage {shown} does not hold it ({digest[:12]}); send it where it was trained (gpt2 sync {name}), or set "
        "storage.base_folder to the storage that has it"
    )


def _among_copies(fs: Any, root: str, name: str, digest: str) -> Iterator[Source]:
    """What trainings that run copied there, of the newest token first."""
    below = f"{root}/checkpoints/{name}"
    for config in filter(DIGEST.fullmatch, entries(fs, below)):
        for token in reversed(entries(fs, f"{below}/{config}")):
            for checkpoint in filter(is_name, entries(fs, f"{below}/{config}/{token}") if "token_" in token else []):
                place = f"{below}/{config}/{token}/{checkpoint}"
                manifest = f"{place}/{MANIFEST}"
                if fs.exists(manifest) and hashlib.sha256(fs.cat_file(manifest)).hexdigest() == digest:
                    yield in_folder(place)


def _place(project: Project, name: str, checkpoint: Checkpoint) -> Path:
    """Where it belongs: among the run's checkpoints if it takes the place of a damaged one, or if it is an older one that the run has
    registered; never where training would go on from it and did not before. Else, and while the run is trained, beside them."""
    folder, step = project.run_folder(name), name_of(_step(checkpoint))
    place = folder.checkpoints / step
    fits = folder.config.exists() and tracking.read_config(folder).digest == checkpoint.state().get("config_digest")
    if fits and not trainer_lives(project, name) and not _is_whole(place) and (place.exists() or _is_older(folder, checkpoint)):
        if place.exists():
            CheckpointStore.set_aside([place], folder.aside / "damaged")
        return place
    place = folder.aside / "restored" / step
    if place.exists():  # another version of this step
        CheckpointStore.set_aside([place], folder.aside / "restored" / "before")
    return place


def _is_older(folder: RunFolder, checkpoint: Checkpoint) -> bool:
    """Whether the run has registered it, and a newer one."""
    registered = any(entry.get("digest") == checkpoint.digest for entry in read_json(folder.registered) or [])
    return registered and any(there.step > _step(checkpoint) for there in CheckpointStore(folder.checkpoints).checkpoints())


def _step(checkpoint: Checkpoint) -> int:
    """As it says itself: its folder may be called anything."""
    return int(checkpoint.state()["step"])


def _is_whole(place: Path) -> bool:
    try:
        open_checkpoint(place).verify()
    except NotWhole:
        return False
    return True
