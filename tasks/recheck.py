"""Are the stored checkpoints still the ones that were written? A disk that rots tells nobody.

Here, every byte of every checkpoint is read. (DVC's cache is linked to the same bytes.) The storage may be large, slow and paid by the
byte. In it lies what DVC pushed, of which dvc.lock names what counts, and copies of trainings that are not pushed yet (tasks/mirror.py). Of
both it is looked each time whether all files are there in their sizes. Their bytes are read in turn, about NIGHTLY_BYTES a day, so that all
is read once in as many days as that takes: a small project each day, a terabyte in fifty days.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from model.checkpoint.store import FILES, MANIFEST, CheckpointStore, NotWhole, is_name, open_checkpoint
from model.digest import unsealed
from model.errors import Stopped
from model.secrets import redacted
from tasks.lease import entries, open_place
from tasks.news import standing
from tasks.project import Project, read_json
from tasks.pushed import object_path, recorded, storage_of

NIGHTLY_BYTES = 20 * 10**9
"""Of the storage, for all experiments together."""
_PIECE = 16 << 20


@dataclass(frozen=True)
class Rotten:
    """A checkpoint of which a byte is not what was written."""

    checkpoint: str
    """Its name; `checkpoints` if it cannot be told which."""
    digest: str | None
    """None if nothing tells it any more."""
    place: str
    problem: str
    cure: str


@dataclass(frozen=True)
class Rechecked:
    """What was looked at, and what was found."""

    local: int = 0
    """Checkpoints here, read."""
    stored: int = 0
    """Files in the storage, seen."""
    read: int = 0
    """Bytes in the storage, read."""
    left: int = 0
    """Bytes in the storage whose turn is another day."""
    rotten: list[Rotten] = field(default_factory=list)


def recheck_local(project: Project, name: str, stop: threading.Event) -> Rechecked:
    """Read every byte of the checkpoints in the run folder.

    Raises:
        Stopped: `stop` was set meanwhile.
    """
    folder = project.run_folder(name)
    registered = {checkpoint: digest for digest, checkpoint in standing(project, name).registered.items()}
    versions = {entry["name"]: entry.get("version") or "VERSION" for entry in read_json(folder.registered) or []} if registered else {}
    rotten, looked = [], 0
    for path in CheckpointStore(folder.checkpoints).folders():
        if stop.is_set():
            raise Stopped(f"stopped while the checkpoints of {name} were read; the same command begins anew")
        try:
            checkpoint = open_checkpoint(path)
            checkpoint.verify()
        except NotWhole as error:
            if not path.exists():  # tidied away by the training that runs
                continue
            cure = f"gpt2 restore {name}/{versions.get(path.name, 'VERSION')}; else delete the file and its object in DVC's cache "
            cure += f"(find .dvc/cache -samefile FILE), then dvc pull {project.training_stage(name)}@{name}"
            rotten.append(Rotten(path.name, registered.get(path.name), "the run folder", str(error), cure))
        looked += 1
    return Rechecked(local=looked, rotten=rotten)


def recheck_stored(
    project: Project, name: str, budget: int | None, stop: threading.Event, *, pushed: bool = True, day: int | None = None
) -> Rechecked:
    """Look at what the storage holds of the run's checkpoints, and read about `budget` bytes of it (None: all); which ones, the `day` says
    (by default today's, counted from 1970). If not all is `pushed` that dvc.lock names, what is missing is not missed.

    Raises:
        Stopped: `stop` was set meanwhile.
        Any exception of a file system: the storage cannot be reached.
    """
    storage = storage_of(project, name)
    fs, root = open_place(storage)
    where = redacted(storage)
    if not fs.exists(root):
        return Rechecked()
    (objects, unlisted), (copies, unsealed_copies) = _pushed(project, name, fs, root, pushed), _copies(name, fs, root)
    found = [*unlisted, *unsealed_copies]
    whole: list[_File] = []
    for file in [*objects, *copies]:
        try:
            size = int(fs.size(file.path) or 0)
        except FileNotFoundError:
            if not file.gone(fs) and (pushed or file.seal):
                found.append(file.rotten(f"{file.file} is missing"))
            continue
        if file.size in (None, size):
            whole.append(replace(file, size=size))
        elif not file.gone(fs):
            found.append(file.rotten(f"{file.file} has {size:,} bytes, not {file.size:,}"))
    tonight, later = _share(whole, budget, int(time.time() // 86400) if day is None else day)
    for file in tonight:
        problem = _complaint_about_bytes(fs, file, stop, name)
        if problem and not file.gone(fs):
            found.append(file.rotten(problem))
    read, left = (sum(file.size or 0 for file in files) for files in (tonight, later))
    return Rechecked(stored=len(objects) + len(copies), read=read, left=left, rotten=[replace(each, place=where) for each in found])


@dataclass(frozen=True)
class _File:
    """A file in the storage, and what it has to be."""

    path: str
    hash: str
    """`md5` or `sha256`."""
    digest: str
    size: int | None
    """None: nobody wrote it down."""
    file: str
    """For people: `step_00000010/model.safetensors`, whatever DVC calls it."""
    checkpoint_digest: str | None
    cure: str
    seal: str | None = None
    """What stands as long as the copy does: a copy that its training removes loses its manifest first."""

    def gone(self, fs: Any) -> bool:
        """Whether it was removed by who made it, since it was listed."""
        return self.seal is not None and not fs.exists(self.seal)

    def rotten(self, problem: str) -> Rotten:
        """A finding about it."""
        return Rotten(self.file.partition("/")[0], self.checkpoint_digest, "", problem, self.cure)


def _pushed(project: Project, name: str, fs: Any, root: str, pushed: bool) -> tuple[list[_File], list[Rotten]]:
    """The files of the run's checkpoints in DVC's remote, as dvc.lock names them, and what is wrong with their list."""
    listed_as = recorded(project, name, project.run_folder(name).checkpoints)
    if listed_as is None:
        return [], []
    listing = object_path(root, listed_as)
    cure = f"delete {redacted(listing)}, then push anew: gpt2 sync {name}"
    try:
        content = fs.cat_file(listing)
    except FileNotFoundError:
        return [], [Rotten("checkpoints", None, "", "DVC's list of their files is missing", f"push it: gpt2 sync {name}")] if pushed else []
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != listed_as.removesuffix(".dir"):
        return [], [Rotten("checkpoints", None, "", "DVC's list of their files is not the one that was pushed (MD5 differs)", cure)]
    listed = {entry["relpath"]: entry["md5"] for entry in json.loads(content)}
    digests, sizes = _known_here(project, name, listed)
    files = []
    for file, md5 in listed.items():
        path = object_path(root, md5)
        cure = f"delete {redacted(path)} if it is there, then push anew from a whole copy: gpt2 sync {name}"
        files.append(_File(path, "md5", md5, sizes.get(file), file, digests.get(file.partition("/")[0]), cure))
    return files, []


def _known_here(project: Project, name: str, listed: Mapping[str, str]) -> tuple[dict[str, str], dict[str, int]]:
    """Of the listed checkpoints that are here, too (not others of their names): their digests, and their files' sizes."""
    digests: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for checkpoint in CheckpointStore(project.run_folder(name).checkpoints).checkpoints():
        try:
            manifest = (checkpoint.path / MANIFEST).read_bytes()
        except FileNotFoundError:  # tidied away by the training that runs
            continue
        if listed.get(f"{checkpoint.name}/{MANIFEST}") == hashlib.md5(manifest, usedforsecurity=False).hexdigest():
            digests[checkpoint.name] = checkpoint.digest
            sizes |= {f"{checkpoint.name}/{file}": entry["size"] for file, entry in unsealed(manifest.decode())["files"].items()}
    return digests, sizes


def _copies(name: str, fs: Any, root: str) -> tuple[list[_File], list[Rotten]]:
    """The files of the copies that trainings made, by the manifests beside them, and the manifests that cannot be read."""
    below = f"{root}/checkpoints/{name}"
    files: list[_File] = []
    faults: list[Rotten] = []
    for config in entries(fs, below):
        for token in entries(fs, f"{below}/{config}") if len(config) == 64 else []:
            for checkpoint in entries(fs, f"{below}/{config}/{token}") if token.startswith("token_") else []:
                if is_name(checkpoint):
                    try:
                        files += _copy(fs, f"{below}/{config}/{token}/{checkpoint}", checkpoint)
                    except NotWhole as error:
                        faults.append(Rotten(checkpoint, None, "", str(error), _CURE_OF_A_COPY.format(f"{token}/{checkpoint}")))
    return files, faults


_CURE_OF_A_COPY = "delete {} there; the training, or gpt2 sync, copies it again"


def _copy(fs: Any, folder: str, checkpoint: str) -> list[_File]:
    manifest = f"{folder}/{MANIFEST}"
    try:
        content = fs.cat_file(manifest)
    except FileNotFoundError:
        return []  # not sealed, or being removed
    digest, cure = hashlib.sha256(content).hexdigest(), _CURE_OF_A_COPY.format("/".join(folder.split("/")[-2:]))
    try:
        sealed = unsealed(content.decode())["files"]
        expected = {file: (sealed[file]["sha256"], sealed[file]["size"]) for file in FILES}
    except (ValueError, KeyError, TypeError) as error:
        raise NotWhole(f"{checkpoint}: {MANIFEST} cannot be read: {error}") from None
    return [
        _File(f"{folder}/{file}", "sha256", sha256, size, f"{checkpoint}/{file}", digest, cure, manifest)
        for file, (sha256, size) in expected.items()
    ]


def _complaint_about_bytes(fs: Any, file: _File, stop: threading.Event, name: str) -> str | None:
    found = hashlib.new(file.hash, usedforsecurity=False)
    try:
        with fs.open(file.path, "rb", block_size=_PIECE) as stream:
            while piece := stream.read(_PIECE):
                if stop.is_set():
                    raise Stopped(f"stopped while the storage of {name} was read; the same command begins anew")
                found.update(piece)
    except FileNotFoundError:
        return f"{file.file} is missing"
    right = found.hexdigest() == file.digest
    return None if right else f"{file.file}: its bytes are not the ones that were written ({file.hash} differs)"


def _share(files: Sequence[_File], budget: int | None, day: int) -> tuple[list[_File], list[_File]]:
    """Whose turn it is on `day`, and the others. All have theirs once in as many days as `budget` bytes a day take; on which of them, a
    file's digest says, so the turns need no memory."""
    total = sum(file.size or 0 for file in files)
    days = 1 if budget is None else max(1, -(-total // max(budget, 1)))
    turns = [int(hashlib.md5(file.digest.encode(), usedforsecurity=False).hexdigest(), 16) % days == day % days for file in files]
    return _where(files, turns), _where(files, [not turn for turn in turns])


def _where(files: Iterable[_File], wanted: Iterable[bool]) -> list[_File]:
    return [file for file, take in zip(files, wanted, strict=True) if take]
