"""While a training runs: a copy of each sealed checkpoint in the external storage, because DVC takes care of a stage only when it ends.

    <storage>/checkpoints/<experiment>/<config digest>/token_00000003/journal.jsonl
                                                                      step_00001000/…   its manifest last: without one it is not whole

Each holder of the lease (tasks/lease.py) writes into its own token's folder, and removes the older ones when it has a whole copy there: one
that was paused and taken over can spoil nothing. A machine on which the training has not come as far starts from the newest whole copy of
the highest token, and gets the older ones, too. Once DVC has pushed the finished run, the copies have served and go.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from model import disk
from model.checkpoint.store import MANIFEST, Checkpoint, CheckpointStore, NotWhole, open_checkpoint, step_of
from model.config import RunConfig
from model.errors import Stopped, UserError
from model.run_folder import RunFolder
from model.secrets import redacted
from model.training.lock import held
from model.training.resume import set_aside_other_configurations
from tasks.lease import Holder, Lease, NotOurs, entries, open_place, place, read_holder, tidy
from tasks.project import Project

SECONDS_BETWEEN_LOOKS = 1.0
LONGEST_PAUSE_S = 30.0
"""Between two attempts while the storage does not answer."""
LAST_COPY_S = 10.0
"""How long a stage that ends waits for a copy in the making: a stop has to be quick."""
_ASIDE = "aside_"
_TOKEN = re.compile(r"token_(\d{8})")
_STEP = re.compile(r"step_\d{8}")


@contextlib.contextmanager
def mirroring(project: Project, name: str, lease: Lease) -> Iterator[None]:
    """Meanwhile, copy each checkpoint of the run as it is sealed. A storage that is slow or gone is told of and delays nothing."""
    mirror = Mirror.of(project, name, lease)
    done = threading.Event()
    thread = threading.Thread(target=_keep_up, args=(mirror, done), name="mirror", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(LAST_COPY_S)


def bring_back(project: Project, name: str) -> Checkpoint | None:
    """Where the training has not come as far as its copies: fetch the whole ones, the newest first, and the journal. Returns the
    newest; None if there is nothing to do.

    A storage that cannot be read is told of on standard error and is no reason not to train.

    Raises:
        UserError: a trainer runs in the run's folder.
    """
    mirror = Mirror.of(project, name)
    try:
        return mirror.bring_back()
    except (UserError, Stopped):
        raise
    except Exception as error:  # every file system of fsspec has errors of its own
        _say(f"warning: {mirror.url} cannot be read: {error}")
        return None


def prune(project: Project, name: str) -> None:
    """Remove the copies of a run whose checkpoints DVC has pushed, and what is left of its lease."""
    Mirror.of(project, name).remove()


def set_aside(project: Project, name: str) -> None:
    """Begin anew: what lies in the storage is kept, but not gone on with. A storage that cannot be reached is told of."""
    mirror = Mirror.of(project, name)
    try:
        mirror.set_aside()
    except Exception as error:
        _say(f"warning: {mirror.url} cannot be reached: {error}; should it hold copies of this configuration, they are not set aside")


@dataclass
class Mirror:
    """The copies of one configuration's training, under one URL. Without a lease they can only be read and removed."""

    url: str
    folder: RunFolder
    config: RunConfig
    lease: Lease | None = None
    _copied: dict[str, str] = field(default_factory=dict)
    """Names by digest."""

    @classmethod
    def of(cls, project: Project, name: str, lease: Lease | None = None) -> Mirror:
        """The mirror of the configuration that `runs/<name>/config.yaml` holds."""
        url, config = place(project, name)
        return cls(url, project.run_folder(name), config, lease)

    def copy_new(self) -> list[str]:
        """Copy what is sealed here and not yet there, the newest first, and drop there what was dropped here; the names of the copied.

        Raises:
            NotOurs: another trainer has taken over.
            Any exception of a file system: the storage cannot be reached, or its lease could not be taken yet.
        """
        copied: list[str] = []
        while True:
            sealed = self._own_checkpoints()
            missing = [checkpoint for checkpoint in sealed if checkpoint.digest not in self._copied]
            if missing and not self._copy(missing[-1]):
                continue
            self._drop_all_but({checkpoint.name for checkpoint in sealed})  # not earlier: there always is a whole one
            if not missing:
                return copied
            copied.append(missing[-1].name)
            self._remove_older_tokens()

    def bring_back(self) -> Checkpoint | None:
        """See `bring_back` above; raises what the file system raises, too."""
        own = self._own_checkpoints()
        fs, root = open_place(self.url)
        for token in reversed(_tokens(fs, root)):
            newest = None
            holder = read_holder(fs, root, token)
            if own and holder is not None and self._is_this_folder(holder):
                return None  # what lies here is what it copied, or newer, or was gone back behind on purpose
            folder = f"{root}/{_token(token)}"
            for name in reversed(_names(fs, folder)):
                if own and step_of(name) <= own[-1].step:
                    return newest
                with held(self.folder.lock, f"the run {self.folder.experiment}"):
                    back = self._fetch(fs, folder, name, with_journal=newest is None)
                if back is not None:
                    print(redacted(f"brought {name} back from {self.url}/{_token(token)}"), flush=True)
                    newest = newest or back
            if newest is not None:
                return newest
        return None

    def set_aside(self) -> None:
        """Rename the folders of all tokens that hold copies; raises what the file system raises."""
        fs, root = open_place(self.url)
        when = time.strftime("%Y%m%d-%H%M%S")
        for token in _tokens(fs, root):
            fs.mv(f"{root}/{_token(token)}", f"{root}/{_ASIDE}{when}_{_token(token)}", recursive=True)

    def remove(self) -> None:
        """Remove all of it but what was set aside; nothing there is nothing to do."""
        fs, root = open_place(self.url)
        for token in _tokens(fs, root):
            _remove_token(fs, f"{root}/{_token(token)}")
        names = entries(fs, root)
        for name in names:
            if not name.startswith(_ASIDE):
                fs.rm(f"{root}/{name}", recursive=True)
        if fs.exists(root) and not any(name.startswith(_ASIDE) for name in names):
            fs.rm(root, recursive=True)

    def _own_checkpoints(self) -> list[Checkpoint]:
        """Those of this configuration that look whole, oldest first."""
        checkpoints = CheckpointStore(self.folder.checkpoints).checkpoints()
        return [checkpoint for checkpoint in checkpoints if checkpoint.digest in self._copied or self._is_ours(checkpoint)]

    def _is_ours(self, checkpoint: Checkpoint) -> bool:
        try:
            return bool(checkpoint.state()["config_digest"] == self.config.digest)
        except (OSError, ValueError, KeyError):
            return False

    def _is_this_folder(self, holder: Holder) -> bool:
        ourselves = Holder.ourselves(self.folder)
        return holder.same_machine(ourselves) and holder.folder == ourselves.folder

    def _open_own(self) -> tuple[Any, str]:
        """The file system and the folder of our token."""
        assert self.lease is not None
        if self.lease.token is None:
            raise ConnectionError("no lease yet")
        fs, root = open_place(self.url)
        return fs, f"{root}/{_token(self.lease.token)}"

    def _copy(self, checkpoint: Checkpoint) -> bool:
        """Copy one checkpoint; False if it was dropped meanwhile."""
        assert self.lease is not None
        fs, folder = self._open_own()
        self.lease.check()
        target = f"{folder}/{checkpoint.name}"
        fs.makedirs(target, exist_ok=True)
        if fs.exists(f"{target}/{MANIFEST}"):
            fs.rm_file(f"{target}/{MANIFEST}")  # of another checkpoint of this step
        try:
            for path in sorted(path for path in checkpoint.path.iterdir() if path.name != MANIFEST):
                fs.put_file(str(path), f"{target}/{path.name}")
            if self.folder.journal.exists():
                fs.put_file(str(self.folder.journal), f"{folder}/.{self.folder.journal.name}.partial")
                fs.mv(f"{folder}/.{self.folder.journal.name}.partial", f"{folder}/{self.folder.journal.name}")
            self.lease.check()  # now, not only before the long copy
            fs.put_file(str(checkpoint.path / MANIFEST), f"{target}/{MANIFEST}")
        except FileNotFoundError:
            if checkpoint.path.exists():
                raise
            _remove_copy(fs, target)
            return False
        self._copied = {digest: name for digest, name in self._copied.items() if name != checkpoint.name}
        self._copied[checkpoint.digest] = checkpoint.name
        return True

    def _drop_all_but(self, names: set[str]) -> None:
        for digest, name in list(self._copied.items()):
            if name not in names:
                fs, folder = self._open_own()
                _remove_copy(fs, f"{folder}/{name}")
                del self._copied[digest]

    def _remove_older_tokens(self) -> None:
        """Our newest is whole there: the older tokens' copies have served, unless another machine had come further."""
        assert self.lease is not None
        assert self.lease.token is not None
        self.lease.check()
        fs, root = open_place(self.url)
        older = [token for token in _tokens(fs, root) if token < self.lease.token]
        for token in older:
            holder, names = read_holder(fs, root, token), _names(fs, f"{root}/{_token(token)}")
            ours = holder is None or self._is_this_folder(holder)
            if not ours and names and names[-1] > max(self._copied.values()):
                return
            _remove_token(fs, f"{root}/{_token(token)}")
        tidy(fs, root, self.lease.token)

    def _fetch(self, fs: Any, folder: str, name: str, with_journal: bool) -> Checkpoint | None:
        """Bring one copy here, and the journal beside it; None if it is not whole."""
        if with_journal:
            set_aside_other_configurations(self.folder, self.config)  # or refuse, before anything is copied
        self.folder.checkpoints.mkdir(parents=True, exist_ok=True)
        partial = self.folder.checkpoints / f".{name}.{os.getpid()}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            for file in entries(fs, f"{folder}/{name}"):
                fs.get_file(f"{folder}/{name}/{file}", str(partial / file))
                disk.fsync(partial / file)
            open_checkpoint(partial).verify()
            disk.fsync(partial)
        except NotWhole as error:
            _say(f"warning: passed over {name} of {self.url}: {error}")
            shutil.rmtree(partial)
            return None
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        target = self.folder.checkpoints / name
        if target.exists():
            CheckpointStore.set_aside([target], self.folder.aside / "damaged")
        if with_journal:
            self._fetch_journal(fs, f"{folder}/{self.folder.journal.name}")
        disk.rename(partial, target)
        return open_checkpoint(target)

    def _fetch_journal(self, fs: Any, path: str) -> None:
        """The copy's journal in the place of ours, which tells of less and is set aside."""
        if not fs.exists(path):
            return
        journal = self.folder.journal
        partial = journal.with_name(f".{journal.name}.partial")
        fs.get_file(path, str(partial))
        if journal.exists():
            where = self.folder.aside / "before_bringing_back"
            where.mkdir(parents=True, exist_ok=True)
            os.rename(journal, where / f"{journal.stem}.{len(list(where.iterdir()))}.jsonl")
        os.replace(partial, journal)


def _token(token: int) -> str:
    return f"token_{token:08d}"


def _tokens(fs: Any, root: str) -> list[int]:
    """The tokens that have a folder, lowest first."""
    return [int(match[1]) for name in entries(fs, root) if (match := _TOKEN.fullmatch(name))]


def _names(fs: Any, folder: str) -> list[str]:
    return [name for name in entries(fs, folder) if _STEP.fullmatch(name)]


def _remove_copy(fs: Any, target: str) -> None:
    if fs.exists(f"{target}/{MANIFEST}"):
        fs.rm_file(f"{target}/{MANIFEST}")  # first: half of a checkpoint is none
    if fs.exists(target):
        fs.rm(target, recursive=True)


def _remove_token(fs: Any, folder: str) -> None:
    for name in _names(fs, folder):
        _remove_copy(fs, f"{folder}/{name}")
    if fs.exists(folder):
        fs.rm(folder, recursive=True)


def _say(message: str) -> None:
    print(redacted(message), file=sys.stderr, flush=True)


def _keep_up(mirror: Mirror, done: threading.Event) -> None:
    complained = ""
    pause = SECONDS_BETWEEN_LOOKS
    while True:
        last = done.wait(pause)
        try:
            mirror.copy_new()
            pause = SECONDS_BETWEEN_LOOKS
        except NotOurs:
            return  # the lease's keeper tells of it
        except Exception as error:  # the storage's trouble, whatever it is, is not the training's
            if str(error) != complained:
                complained = str(error)
                _say(f"warning: no copy to {mirror.url} now: {error}; training goes on")
            pause = min(2 * pause, LONGEST_PAUSE_S)
        if last:
            return
