"""Sealed checkpoints: a directory each, complete or not there at all.

    step_00001000/
        model.safetensors       weights, Hugging Face GPT-2 names and layout
        optimizer.safetensors   moments by parameter
        state.json              step, tokens, stream state, config and its digest, versions
        manifest.json           size and SHA-256 of each of the above; written last

It is written beside its place, fsynced, and renamed once; it is never written over and nothing in it is ever unpickled.
The checkpoint's digest is the SHA-256 of its manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.digest import digest_of, file_sha256
from model.errors import NoWholeCheckpoint

MANIFEST = "manifest.json"
MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
FILES = (MODEL, OPTIMIZER, STATE)
_NAME = re.compile(r"step_(\d{8})")


class NotWhole(Exception):
    """A checkpoint that must not be used; the message says which file and what is wrong with it."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest could be read. Whether every byte is right is `verify`'s to say."""

    path: Path
    digest: str
    """SHA-256 of manifest.json."""
    model_sha256: str
    """SHA-256 of model.safetensors: equal for equal weights, whatever machine and day they were written."""

    @property
    def name(self) -> str:
        """`step_00001000`."""
        return self.path.name

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return step_of(self.name)

    def state(self) -> dict[str, Any]:
        """The contents of state.json."""
        return json.loads((self.path / STATE).read_text(encoding="utf-8"))

    def verify(self) -> None:
        """Read every byte.

        Raises:
            NotWhole: a file is missing, has another size or another digest, or does not belong there.
        """
        files = _manifest(self.path)
        if hashlib.sha256((self.path / MANIFEST).read_bytes()).hexdigest() != self.digest:
            raise NotWhole(f"{self.name}/{MANIFEST} changed since it was opened")
        for name, entry in files.items():
            if file_sha256(self.path / name) != entry["sha256"]:
                raise NotWhole(f"{self.name}/{name}: its bytes are not the ones that were written (SHA-256 differs)")


def name_of(step: int) -> str:
    """`step_00001000` for 1000."""
    return f"step_{step:08d}"


def step_of(name: str) -> int:
    """1000 for `step_00001000`. A ValueError for anything else."""
    match = _NAME.fullmatch(name)
    if not match:
        raise ValueError(f"{name!r} is not a checkpoint's name, such as step_00001000")
    return int(match[1])


def _manifest_text(files: Mapping[str, Mapping[str, Any]]) -> str:
    """The manifest of these files. It ends with a SHA-256 of its contents and has one spelling: no byte of it can rot unseen."""
    contents = {"version": 1, "files": files}
    return json.dumps({**contents, "sha256_of_the_above": digest_of(contents)}, indent=1) + "\n"


def _manifest(folder: Path) -> dict[str, Any]:
    """The files by name, and the cheap half of the truth: they are all there and have the size it says."""
    try:
        text = (folder / MANIFEST).read_bytes().decode()
        files = {name: {"size": entry["size"], "sha256": entry["sha256"]} for name, entry in json.loads(text)["files"].items()}
        right = text == _manifest_text(files) and set(files) == set(FILES)
    except FileNotFoundError:
        raise NotWhole(f"{folder.name}/{MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotWhole(f"{folder.name}/{MANIFEST} cannot be read: {error}") from None
    if not right:
        raise NotWhole(f"{folder.name}/{MANIFEST}: its bytes are not the ones that were written")
    for name, entry in files.items():
        try:
            found = (folder / name).stat().st_size
        except OSError:
            raise NotWhole(f"{folder.name}/{name} is missing") from None
        if found != entry["size"]:
            raise NotWhole(f"{folder.name}/{name} has {found:,} bytes, not {entry['size']:,}")
    return files


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`.

    Raises:
        NotWhole: no readable manifest, or a file is missing or has another size.
    """
    files = _manifest(folder)
    digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    return Checkpoint(folder, digest, files[MODEL]["sha256"])


@dataclass(frozen=True)
class CheckpointStore:
    """The checkpoints of one run."""

    folder: Path

    def folders(self) -> list[Path]:
        """Everything named like a checkpoint, whole or not, oldest step first."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if _NAME.fullmatch(path.name))

    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints that look whole (manifest and sizes), oldest first."""
        found = []
        for folder in self.folders():
            try:
                found.append(open_checkpoint(folder))
            except NotWhole:
                continue
        return found

    def newest_whole(self, report: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint of which every byte is right; None if there is none at all.

        Each one that is passed over is reported.

        Raises:
            NoWholeCheckpoint: there are some, and not one is whole.
        """
        complaints = []
        for folder in reversed(self.folders()):
            try:
                checkpoint = open_checkpoint(folder)
                checkpoint.verify()
            except NotWhole as error:
                complaints.append(str(error))
                report(f"passed over a damaged checkpoint: {error}")
                continue
            return checkpoint
        if complaints:
            raise NoWholeCheckpoint(
                f"no whole checkpoint in {self.folder}: {'; '.join(complaints)}. "
                "Restore one (dvc checkout, or the storage's copy), or move the folder away to start anew."
            )
        return None

    def write(self, step: int, write_files: Mapping[str, Callable[[Path], None]]) -> Checkpoint:
        """Seal a new checkpoint. `write_files` maps each of FILES to a function that writes it to a path.

        An equal step that is already sealed is left as it is and returned.

        Raises:
            OSError, RuntimeError, safetensors.SafetensorError: the disk said no; nothing that counts was left behind.
        """
        assert set(write_files) == set(FILES)
        place = self.folder / name_of(step)
        if place.exists():
            try:
                sealed = open_checkpoint(place)
                sealed.verify()
                return sealed
            except NotWhole:
                self.set_aside([place], self.folder.parent / "aside" / "damaged")
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".{place.name}.{os.getpid()}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            entries = {}
            for name, write_file in write_files.items():
                write_file(partial / name)
                (partial / name).chmod(0o644)  # safetensors makes files that only their owner can read
                _fsync(partial / name)
                entries[name] = {"size": (partial / name).stat().st_size, "sha256": file_sha256(partial / name)}
            (partial / MANIFEST).write_bytes(_manifest_text(entries).encode())
            _fsync(partial / MANIFEST)
            _fsync(partial)
            os.rename(partial, place)
            _fsync(self.folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return open_checkpoint(place)

    def retain(self, keep: Iterable[str]) -> list[str]:
        """Delete the checkpoints not named in `keep`, and what a killed writer left; returns the names that went."""
        kept = set(keep)
        gone = []
        for folder in self.folders():
            if folder.name not in kept:
                doomed = folder.with_name(f".{folder.name}.doomed")
                os.rename(folder, doomed)
                gone.append(folder.name)
        self.sweep()
        return gone

    def sweep(self) -> None:
        """Remove what a kill left half-written or half-deleted. Only the run's one writer may call this."""
        if self.folder.is_dir():
            for leftover in [*self.folder.glob(".step_*.partial"), *self.folder.glob(".step_*.doomed")]:
                shutil.rmtree(leftover, ignore_errors=True)

    @staticmethod
    def set_aside(folders: Iterable[Path], where: Path) -> None:
        """Move checkpoints out of the run without deleting anything."""
        where.mkdir(parents=True, exist_ok=True)
        for folder in folders:
            target, n = where / folder.name, 0
            while target.exists():
                n += 1
                target = where / f"{folder.name}.{n}"
            os.rename(folder, target)


def _fsync(path: Path) -> None:
    """Make a file or directory durable; a directory cannot be opened on Windows, where the rename is durable itself."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
