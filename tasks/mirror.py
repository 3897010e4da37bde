"""While a training runs: a copy of each sealed checkpoint in the external storage, because DVC takes care of a stage only when it ends.

    <storage>/checkpoints/<experiment>/<config digest>/journal.jsonl
                                                      step_00001000/…   its manifest last: without one it is not whole

A machine that has no checkpoint of the configuration starts from the newest whole copy. Once DVC has pushed the finished run, the
copies have served and go.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import fsspec

from model.checkpoint.store import MANIFEST, Checkpoint, CheckpointStore, NotWhole, open_checkpoint
from model.config import RunConfig
from model.params import read_yaml, validated
from model.run_folder import RunFolder
from tasks.project import Project

SECONDS_BETWEEN_LOOKS = 3.0
SECONDS_AFTER_A_FAULT = 30.0
LAST_COPY_S = 10.0
"""How long a stage that ends waits for a copy in the making: a stop has to be quick."""


@contextmanager
def mirroring(project: Project, name: str) -> Iterator[None]:
    """Meanwhile, copy each checkpoint of the run as it is sealed. A storage that is slow or gone is told of and delays nothing."""
    mirror = Mirror.of(project, name)
    done = threading.Event()
    thread = threading.Thread(target=_keep_up, args=(mirror, done), name="mirror", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(LAST_COPY_S)


def bring_back(project: Project, name: str) -> Checkpoint | None:
    """On a machine that has no checkpoint of this configuration: the newest whole copy and the journal. None if there is nothing to do.

    A storage that cannot be read is told of on standard error and is no reason not to train.
    """
    mirror = Mirror.of(project, name)
    try:
        return mirror.bring_back()
    except Exception as error:  # every file system of fsspec has errors of its own
        print(f"warning: {mirror.url} cannot be read: {error}", file=sys.stderr, flush=True)
        return None


def prune(project: Project, name: str) -> None:
    """Remove the copies of a run whose checkpoints DVC has pushed."""
    Mirror.of(project, name).remove()


@dataclass
class Mirror:
    """The copies of one run, under one URL."""

    url: str
    folder: RunFolder
    config_digest: str
    _copied: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, project: Project, name: str) -> Mirror:
        """The mirror of the configuration that `runs/<name>/config.yaml` holds."""
        folder = project.run_folder(name)
        digest = validated(RunConfig, read_yaml(folder.config), folder.config.name).digest
        storage = project.storage(project.experiment(name)).rstrip("/\\")
        return cls(f"{storage}/checkpoints/{name}/{digest}", folder, digest)

    def copy_new(self) -> list[str]:
        """Copy what is sealed here and not yet there, and drop there what was dropped here; the names of the copied."""
        fs, root = self._open()
        copied = []
        sealed = [checkpoint for checkpoint in CheckpointStore(self.folder.checkpoints).checkpoints() if self._is_ours(checkpoint)]
        for checkpoint in sealed:
            if checkpoint.digest in self._copied:
                continue
            target = f"{root}/{checkpoint.name}"
            if not _same_manifest(fs, target, checkpoint):
                try:
                    _copy_up(fs, target, checkpoint)
                except FileNotFoundError:
                    continue  # dropped meanwhile
                copied.append(checkpoint.name)
            self._copied.add(checkpoint.digest)
        if copied:
            fs.put_file(str(self.folder.journal), f"{root}/{self.folder.journal.name}")
            self._drop_others(fs, root, {checkpoint.name for checkpoint in sealed})
        return copied

    def bring_back(self) -> Checkpoint | None:
        """See `bring_back` above; raises what the file system raises."""
        store = CheckpointStore(self.folder.checkpoints)
        if any(self._is_ours(checkpoint) for checkpoint in store.checkpoints()):
            return None
        fs, root = self._open()
        for name in reversed(self._names(fs, root)):
            place = self.folder.checkpoints / name
            if place.exists():
                continue
            partial = place.with_name(f".{name}.{os.getpid()}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            try:
                for path in fs.ls(f"{root}/{name}", detail=False):
                    fs.get_file(path, str(partial / path.rsplit("/", 1)[1]))
                open_checkpoint(partial).verify()
            except NotWhole as error:
                print(f"warning: passed over {self.url}/{name}: {error}", file=sys.stderr, flush=True)
                shutil.rmtree(partial)
                continue
            if not self.folder.journal.exists() and fs.exists(f"{root}/{self.folder.journal.name}"):
                fs.get_file(f"{root}/{self.folder.journal.name}", str(self.folder.journal))
            os.rename(partial, place)
            print(f"brought {name} back from {self.url}", flush=True)
            return open_checkpoint(place)
        return None

    def remove(self) -> None:
        """Remove all of it; nothing there is nothing to do."""
        fs, root = self._open()
        if fs.exists(root):
            self._drop_others(fs, root, set())
            fs.rm(root, recursive=True)

    def _open(self) -> tuple[Any, str]:
        fs, root = fsspec.url_to_fs(self.url)
        fs.invalidate_cache()
        return fs, root.rstrip("/")

    def _is_ours(self, checkpoint: Checkpoint) -> bool:
        try:
            return bool(checkpoint.state()["config_digest"] == self.config_digest)
        except (OSError, ValueError, KeyError):
            return False

    def _names(self, fs: Any, root: str) -> list[str]:
        paths = fs.ls(root, detail=False) if fs.exists(root) else []
        return sorted(name for path in paths if (name := path.rstrip("/").rsplit("/", 1)[1]).startswith("step_"))

    def _drop_others(self, fs: Any, root: str, keep: set[str]) -> None:
        for name in set(self._names(fs, root)) - keep:
            if fs.exists(f"{root}/{name}/{MANIFEST}"):
                fs.rm_file(f"{root}/{name}/{MANIFEST}")  # first: half of a checkpoint is none
            fs.rm(f"{root}/{name}", recursive=True)


def _same_manifest(fs: Any, target: str, checkpoint: Checkpoint) -> bool:
    path = f"{target}/{MANIFEST}"
    return bool(fs.exists(path) and fs.cat_file(path) == (checkpoint.path / MANIFEST).read_bytes())


def _copy_up(fs: Any, target: str, checkpoint: Checkpoint) -> None:
    fs.makedirs(target, exist_ok=True)
    files = sorted(path for path in checkpoint.path.iterdir() if path.name != MANIFEST)
    for path in [*files, checkpoint.path / MANIFEST]:
        fs.put_file(str(path), f"{target}/{path.name}")


def _keep_up(mirror: Mirror, done: threading.Event) -> None:
    complained = ""
    pause = SECONDS_BETWEEN_LOOKS
    while True:
        last = done.wait(pause)
        pause = SECONDS_BETWEEN_LOOKS
        try:
            mirror.copy_new()
        except Exception as error:  # the storage's trouble, whatever it is, is not the training's
            if str(error) != complained:
                complained = str(error)
                print(f"warning: no copy to {mirror.url} now: {error}; training goes on", file=sys.stderr, flush=True)
            pause = SECONDS_AFTER_A_FAULT
        if last:
            return
