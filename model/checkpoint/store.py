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
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from model import disk
from model.digest import file_sha256, sealed, unsealed
from model.errors import NoWholeCheckpoint

MANIFEST = "manifest.json"
MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
FILES = (MODEL, OPTIMIZER, STATE)
_NAME = re.compile(r"step_(\d{8})")
_OTHER_BYTES = "its bytes are not the ones that were written (SHA-256 differs)"


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
        """The contents of state.json, every byte of which is compared with the manifest: what it says is acted upon.

        Raises:
            NotWhole: they are not what was written, or not a JSON object.
        """
        try:
            written = unsealed((self.path / MANIFEST).read_bytes().decode())["files"][STATE]["sha256"]
            content = (self.path / STATE).read_bytes()
            if hashlib.sha256(content).hexdigest() != written:
                raise NotWhole(f"{self.name}/{STATE}: {_OTHER_BYTES}")
            state = json.loads(content)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise NotWhole(f"{self.name}/{STATE} cannot be read: {error}") from None
        if not isinstance(state, dict):
            raise NotWhole(f"{self.name}/{STATE} is not the state of a training")
        return state

    def verify(self) -> None:
        """Read every byte.

        Raises:
            NotWhole: a file is missing, has another size or another digest, does not belong there, or is no safetensors file (whoever can
                write a manifest can seal anything).
        """
        files = _manifest(self.path)
        if hashlib.sha256((self.path / MANIFEST).read_bytes()).hexdigest() != self.digest:
            raise NotWhole(f"{self.name}/{MANIFEST} changed since it was opened")
        with ThreadPoolExecutor(len(files)) as threads:
            found = threads.map(lambda name: _sha256(self.path / name), files)
        for name, digest in zip(files, found, strict=True):
            if digest != files[name]["sha256"]:
                raise NotWhole(f"{self.name}/{name}: {_OTHER_BYTES}")
        for name in (MODEL, OPTIMIZER):
            try:
                with safe_open(self.path / name, "numpy"):
                    pass
            except (SafetensorError, OSError) as error:
                raise NotWhole(f"{self.name}/{name} is not a safetensors file: {error}") from None
        self.state()


def name_of(step: int) -> str:
    """`step_00001000` for 1000."""
    return f"step_{step:08d}"


def step_of(name: str) -> int:
    """1000 for `step_00001000`. A ValueError for anything else."""
    match = _NAME.fullmatch(name)
    if not match:
        raise ValueError(f"{name!r} is not a checkpoint's name, such as step_00001000")
    return int(match[1])


def is_name(text: str) -> bool:
    """Whether it is a checkpoint's name."""
    return _NAME.fullmatch(text) is not None


def _sha256(path: Path) -> str:
    """Of a file; a disk that cannot read it has not kept it."""
    try:
        return file_sha256(path)
    except OSError as error:
        return str(error)


def _manifest(folder: Path) -> dict[str, Any]:
    """The files by name, and the cheap half of the truth: they are all there and have the size it says."""
    try:
        contents = unsealed((folder / MANIFEST).read_bytes().decode())
        files = {name: {"size": entry["size"], "sha256": entry["sha256"]} for name, entry in contents["files"].items()}
        right = contents == _contents(files) and set(files) == set(FILES)
    except FileNotFoundError:
        raise NotWhole(f"{folder.name}/{MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise NotWhole(f"{folder.name}/{MANIFEST} cannot be read: {error}") from None
    if not right:
        raise NotWhole(f"{folder.name}/{MANIFEST} is not the manifest of a checkpoint")
    for name, entry in files.items():
        try:
            found = (folder / name).stat()
        except OSError:
            raise NotWhole(f"{folder.name}/{name} is missing") from None
        if not stat.S_ISREG(found.st_mode):  # reading a pipe would never end
            raise NotWhole(f"{folder.name}/{name} is not a file")
        if found.st_size != entry["size"]:
            raise NotWhole(f"{folder.name}/{name} has {found.st_size:,} bytes, not {entry['size']:,}")
    return files


def _contents(files: Mapping[str, Any]) -> dict[str, Any]:
    return {"version": 1, "files": files}


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

    def write(
        self,
        step: int,
        files: Mapping[str, Iterable[disk.Bytes]],
        before_sealing: Callable[[], None] = lambda: None,
        digest: str | None = None,
    ) -> Checkpoint:
        """Seal a new checkpoint from the pieces of each of FILES.

        An equal step that is already sealed is left as it is and returned. `before_sealing` is called when all is on the disk, and may
        raise: then there is no checkpoint. If a `digest` is given, the checkpoint must have it.

        Raises:
            OSError: the disk said no; nothing that counts was left behind.
            NotWhole: it would have another digest.
        """
        assert set(files) == set(FILES)
        place = self.folder / name_of(step)
        if place.exists():
            try:
                there = open_checkpoint(place)
                there.verify()
                return there
            except NotWhole:
                self.set_aside([place], self.folder.parent / "aside" / "damaged")
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".{place.name}.{os.getpid()}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            entries = {name: _write(partial / name, pieces) for name, pieces in files.items()}
            manifest = sealed(_contents(entries)).encode()
            if digest not in (None, hashlib.sha256(manifest).hexdigest()):
                raise NotWhole(f"{place.name}: {_OTHER_BYTES}")
            _write(partial / MANIFEST, [manifest])
            disk.fsync(partial)
            before_sealing()
            disk.rename(partial, place)
            disk.fsync(self.folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return open_checkpoint(place)

    def adopt(self, checkpoint: Checkpoint) -> Checkpoint:
        """A copy of a checkpoint that lies elsewhere. What is in its place and is another one is set aside.

        Raises:
            NotWhole: its bytes are not the ones that were written.
            OSError: the disk said no.
        """
        place = self.folder / checkpoint.name
        if place.exists():
            try:
                there = open_checkpoint(place)
                there.verify()
                if there.digest == checkpoint.digest:
                    return there
            except NotWhole:
                pass
            self.set_aside([place], self.folder.parent / "aside" / "replaced")

        return self.write(checkpoint.step, {name: _pieces(checkpoint.path / name) for name in FILES}, digest=checkpoint.digest)

    def retain(self, keep: Iterable[str]) -> list[str]:
        """Delete the checkpoints not named in `keep`; returns the names that went."""
        kept = set(keep)
        gone = []
        for folder in self.folders():
            if folder.name not in kept:
                doomed = folder.with_name(f".{folder.name}.doomed")
                shutil.rmtree(doomed, ignore_errors=True)
                disk.rename(folder, doomed)  # from now on it is not there, however far the deletion gets
                shutil.rmtree(doomed, ignore_errors=True)
                gone.append(folder.name)
        return gone

    def sweep(self) -> None:
        """Remove what a kill left half-written or half-deleted. Only the run's one writer may call this, before it writes."""
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
            disk.rename(folder, target)


def _write(path: Path, pieces: Iterable[disk.Bytes]) -> dict[str, Any]:
    """Write a file durably; its entry in the manifest. The digest is of what was meant to be written, not of what the disk made of it."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for piece in pieces:
            digest.update(piece)
            disk.write(file, piece)
            size += len(piece)
    disk.fsync(path)
    return {"size": size, "sha256": digest.hexdigest()}


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(16 << 20):
            yield piece
