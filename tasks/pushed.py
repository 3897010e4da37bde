"""What DVC has pushed of a run's checkpoints, and the notes that lead to it without DVC.

    <storage>/checkpoints/<experiment>/pushed/<checkpoint digest>.json     under which names DVC's remote holds its files
                                              run_<config digest>.json     the checkpoints and the journal that were pushed last

DVC names contents by their MD5, the registry names a checkpoint by its digest; the first note, written once after a push, leads from one to
the other, with any commit checked out. By the second a clone that has nothing of a finished training goes on with it (tasks/mirror.py).

Nothing that lies in the storage is believed: no name in it becomes a path here unless it can be one, and digests decide what is whole.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model import disk
from model.checkpoint.store import FILES, MANIFEST, Checkpoint, CheckpointStore, NotWhole, is_name, open_checkpoint, step_of
from model.params import read_long_yaml
from model.run_folder import RunFolder
from model.training.journal import read_all, read_current
from tasks import tracking
from tasks.lease import entries, open_place
from tasks.project import Project

DIGEST = re.compile(r"[0-9a-f]{64}")
_MD5 = re.compile(r"[0-9a-f]{32}")
_OURS = (*FILES, MANIFEST)
_LONGEST_NOTE, _LONGEST_RUN_NOTE = 10_000, 10_000_000
"""Bytes; they have 300, and 100 a checkpoint."""


class NotThere(Exception):
    """DVC takes something for pushed that the storage does not hold (any more); pushed again, it is sent. DVC's list of the files was taken
    away, so that it looks; whoever cannot push again has to `put_back` the list, without which nothing of it can be pulled."""

    def __init__(self, message: str, put_back: Callable[[], None]) -> None:
        super().__init__(message)
        self.put_back = put_back


@dataclass(frozen=True)
class Source:
    """Where a checkpoint's files lie in the storage."""

    place: str
    """For people."""
    paths: dict[str, str]
    """By the names of a checkpoint's files."""


@dataclass(frozen=True)
class PushedRun:
    """What was pushed last of a configuration's training."""

    config_digest: str
    step: int
    """Of its newest checkpoint."""
    journal: str | None
    """MD5; None if it was not pushed."""
    checkpoints: dict[str, str]
    """Digests by name, oldest first; at least one."""

    @property
    def newest(self) -> str:
        """The newest one's digest."""
        return list(self.checkpoints.values())[-1]


def storage_of(project: Project, name: str) -> str:
    """The experiment's `storage.base_folder`, without a slash at its end."""
    return project.storage(project.experiment(name)).rstrip("/\\")


def recorded(project: Project, name: str, out: Path) -> str | None:
    """The MD5 by which dvc.lock names an output of the stage that trains (of a folder: of the list of its files); None if it does not."""
    lock = project.root / "dvc.lock"
    stages = (read_long_yaml(lock) if lock.exists() else {}).get("stages", {})
    outs = stages.get(f"{project.training_stage(name)}@{name}", {}).get("outs", [])
    path = out.relative_to(project.root).as_posix()
    return next((out["md5"] for out in outs if out["path"] == path), None)


def object_path(root: str, md5: str) -> str:
    """Where DVC's remote below the storage's `root` keeps a content."""
    return f"{root}/dvc/files/md5/{md5[:2]}/{md5[2:]}"


def note_pushed(project: Project, name: str) -> list[str]:
    """After a push: write down in the storage under which names it holds the files of the run's checkpoints; the names of the new ones.

    Raises:
        NotThere: some of the files are missing there.
        ValueError, KeyError, TypeError: the list of files that was pushed is not one.
        Any exception of a file system: the storage cannot be reached.
    """
    folder = project.run_folder(name)
    listing = recorded(project, name, folder.checkpoints)
    if listing is None:
        return []
    fs, root = open_place(storage_of(project, name))
    content = fs.cat_file(object_path(root, listing))
    listed = json.loads(content)
    gone = [entry["relpath"] for entry in listed if not fs.exists(object_path(root, entry["md5"]))]
    if gone:
        fs.rm_file(object_path(root, listing))  # while the list is there, DVC takes all that it names for pushed

        def put_back() -> None:
            if not fs.exists(object_path(root, listing)):
                fs.pipe_file(object_path(root, listing), content)

        raise NotThere(f"the storage lacks {', '.join(gone[:3])}{', …' if gone[3:] else ''}", put_back)
    files: dict[str, dict[str, str]] = {}
    for entry in listed:
        checkpoint, _, file = entry["relpath"].partition("/")
        files.setdefault(checkpoint, {})[file] = entry["md5"]
    there = noted(fs, root, name)
    new, pushed = [], []
    for checkpoint in CheckpointStore(folder.checkpoints).checkpoints():
        md5 = files.get(checkpoint.name, {})
        if set(md5) != set(_OURS) or md5[MANIFEST] != _md5(checkpoint.path / MANIFEST):
            continue  # sealed or changed since DVC recorded the stage: the next push
        pushed.append(checkpoint)
        if checkpoint.digest not in there:
            _write(fs, root, name, f"{checkpoint.digest}.json", {"checkpoint": checkpoint.name, "md5": {file: md5[file] for file in _OURS}})
            new.append(checkpoint.name)
    _note_run(fs, root, project, name, pushed)
    return new


def _note_run(fs: Any, root: str, project: Project, name: str, pushed: list[Checkpoint]) -> None:
    """What was pushed of the present configuration is gone on with from now on, unless this clone is the one that is behind."""
    folder = project.run_folder(name)
    config = tracking.read_config(folder) if pushed and folder.config.exists() else None
    ours = [checkpoint for checkpoint in pushed if config is not None and _config_digest(checkpoint) == config.digest]
    if config is None or not ours:
        return
    before = pushed_run(fs, root, name, config.digest)
    if before is not None and ours[-1].step < before.step <= config.total_steps and before.newest not in gone_back_from(folder):
        return
    journal = recorded(project, name, folder.journal)
    if journal is not None and not fs.exists(object_path(root, journal)):
        journal = None
    now = PushedRun(config.digest, ours[-1].step, journal, {checkpoint.name: checkpoint.digest for checkpoint in ours})
    if now != before:
        _write(fs, root, name, _run_note(config.digest), asdict(now))


def gone_back_from(folder: RunFolder) -> set[str]:
    """The digests of the checkpoints of which the journal says that training went back behind them."""
    return _told(read_all(folder.journal)) - _told(read_current(folder.journal))


def told_of(folder: RunFolder) -> set[str]:
    """The digests of the checkpoints that, by the journal, are this training's."""
    return _told(read_current(folder.journal))


def _told(events: list[dict[str, Any]]) -> set[str]:
    return {str(event.get("digest")) for event in events if event["event"] == "checkpoint"}


def noted(fs: Any, root: str, name: str) -> set[str]:
    """The digests of the checkpoints that are noted as pushed. Raises what the file system raises."""
    return {file.removesuffix(".json") for file in entries(fs, _pushed(root, name)) if DIGEST.fullmatch(file.removesuffix(".json"))}


def pushed_run(fs: Any, root: str, name: str, config_digest: str) -> PushedRun | None:
    """What was pushed last of a configuration's training; None if nothing was, or the note is not one."""
    path = f"{_pushed(root, name)}/{_run_note(config_digest)}"
    if not fs.exists(path):
        return None
    try:
        told = json.loads(fs.cat_file(path, end=_LONGEST_RUN_NOTE))
        checkpoints, journal = dict(sorted(told["checkpoints"].items())), told["journal"]
        right = (
            told["config_digest"] == config_digest
            and all(is_name(checkpoint) and DIGEST.fullmatch(digest) for checkpoint, digest in checkpoints.items())
            and told["step"] == step_of(list(checkpoints)[-1])
            and (journal is None or _MD5.fullmatch(journal) is not None)
        )
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return None
    return PushedRun(config_digest, told["step"], journal, checkpoints) if right else None


def set_run_aside(fs: Any, root: str, name: str, config_digest: str) -> None:
    """From now on nobody goes on with what was pushed of this configuration; `gpt2 restore` still finds it."""
    path = f"{_pushed(root, name)}/{_run_note(config_digest)}"
    if fs.exists(path):
        fs.mv(path, f"{_pushed(root, name)}/aside_{time.strftime('%Y%m%d-%H%M%S')}_{_run_note(config_digest)}")


def among_pushed(fs: Any, root: str, name: str, digest: str) -> Iterator[Source]:
    """Where DVC pushed a checkpoint, if it did. Only names that can be one are believed, whoever wrote the note."""
    path = f"{_pushed(root, name)}/{digest}.json"
    if fs.exists(path):
        try:
            md5_of = json.loads(fs.cat_file(path, end=_LONGEST_NOTE))["md5"]
            names = {file: md5_of[file] for file in _OURS}
            right = all(map(_MD5.fullmatch, names.values()))
        except (ValueError, KeyError, TypeError, RecursionError):
            right = False
        if right:
            yield Source(path, {file: object_path(root, md5) for file, md5 in names.items()})


def in_folder(folder: str) -> Source:
    """A checkpoint that lies in the storage as it lies in a run."""
    return Source(folder, {file: f"{folder}/{file}" for file in _OURS})


def fetch(fs: Any, source: Source, digest: str, place: Path) -> Checkpoint:
    """Copy a checkpoint to the folder `place`, which is made anew, durably.

    Raises:
        NotWhole: it is not the one with this digest, byte for byte.
        FileNotFoundError: one of its files is not there.
        Any exception of a file system: the storage cannot be reached.
    """
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for file, path in source.paths.items():
        fs.get_file(path, str(place / file))
        disk.fsync(place / file)
    try:
        checkpoint = open_checkpoint(place)
        checkpoint.verify()
    except NotWhole as error:
        complaint = str(error).removeprefix(f"{place.name}/")
        bad = next((path for file, path in source.paths.items() if complaint.startswith(file)), source.place)
        raise NotWhole(f"{bad} is damaged: {complaint}") from None
    if checkpoint.digest != digest:
        raise NotWhole(f"{source.place} leads to another checkpoint ({checkpoint.digest[:12]})")
    disk.fsync(place)
    return checkpoint


def _config_digest(checkpoint: Checkpoint) -> Any:
    try:
        return checkpoint.state().get("config_digest")
    except NotWhole:
        return None


def _write(fs: Any, root: str, name: str, file: str, note: dict[str, Any]) -> None:
    fs.makedirs(_pushed(root, name), exist_ok=True)
    fs.pipe_file(f"{_pushed(root, name)}/.{file}.partial", json.dumps(note, indent=1).encode())
    fs.mv(f"{_pushed(root, name)}/.{file}.partial", f"{_pushed(root, name)}/{file}")


def _run_note(config_digest: str) -> str:
    return f"run_{config_digest}.json"


def _pushed(root: str, name: str) -> str:
    return f"{root}/checkpoints/{name}/pushed"


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
