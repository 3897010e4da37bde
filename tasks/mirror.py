"""While a training runs: a copy of each sealed checkpoint in the external storage, because DVC takes care of a stage only when it ends.

    <storage>/checkpoints/<experiment>/<config digest>/token_00000003/journal.jsonl
                                                                      step_00001000/…   its manifest last: without one it is not whole

Each holder of the lease (tasks/lease.py) writes into its own token's folder, and removes the older ones when it has a whole copy there: one
that was paused and taken over can spoil nothing. A machine on which the training has not come as far starts from the newest whole copy of
the highest token, and gets the older ones, too. Once DVC has pushed the finished run, the copies of what it pushed have served and go; the
note of the push (tasks/pushed.py) takes their place.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from model import disk
from model.checkpoint.store import MANIFEST, Checkpoint, CheckpointStore, NotWhole, open_checkpoint, step_of
from model.errors import Stopped, UserError
from model.run_config import RunConfig
from model.run_folder import RunFolder
from model.secrets import redacted
from model.training.resume import set_aside_other_configurations
from tasks import lease as leases
from tasks import pushed
from tasks.forwarder import trainer_lives
from tasks.lease import Holder, Lease, NotOurs, entries, open_place, place, read_holder, tidy
from tasks.project import Project

SECONDS_BETWEEN_LOOKS = 1.0
LONGEST_PAUSE_S = 30.0
"""Between two attempts while the storage does not answer."""
LAST_COPY_S = 10.0
"""How long a stage that stops waits for a copy in the making: a stop has to be quick."""
LAST_COPY_OF_ALL_S = 900.0
"""How long one that has trained to the end waits, and tries again: another machine may be waiting for it."""
_ASIDE = "aside_"
_TOKEN = re.compile(r"token_(\d{8})")
_STEP = re.compile(r"step_\d{8}")


@contextlib.contextmanager
def mirroring(
    project: Project, name: str, lease: Lease, finished: Callable[[], bool], stopping: Callable[[], bool] = lambda: False
) -> Iterator[None]:
    """Meanwhile, copy each checkpoint of the run as it is sealed. A storage that is slow or gone is told of and delays no step; once
    training has `finished`, it is waited until all is copied, unless somebody is `stopping` it."""
    mirror = Mirror.of(project, name, lease)
    done, given_up = threading.Event(), threading.Event()
    thread = threading.Thread(target=_keep_up, args=(mirror, done, given_up, finished), name="mirror", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended = time.monotonic()
        done.set()
        while thread.is_alive() and time.monotonic() < ended + (LAST_COPY_OF_ALL_S if finished() and not stopping() else LAST_COPY_S):
            thread.join(0.2)
        given_up.set()
        if thread.is_alive() and finished():
            _say(f"warning: not all of {name} is in {mirror.url}; when the storage takes it: gpt2 sync {name}")


def bring_back(project: Project, name: str) -> Checkpoint | None:
    """Where the training has not come as far as its copies, or as what DVC pushed of it: fetch the whole ones, the newest first, and the
    journal. Returns the newest that was fetched; None if there is nothing to do. Who comes while another fetches waits for it.

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


def is_complete(project: Project, name: str) -> bool:
    """Whether the storage is known to have every checkpoint that is sealed here: as a copy, whoever made it, or pushed."""
    try:
        return Mirror.of(project, name).is_complete()
    except Stopped:
        raise
    except Exception:  # it does not answer; who copies says so
        return False


def prune(project: Project, name: str) -> None:
    """Remove the copies of a run whose checkpoints DVC has pushed, and what is left of its lease; nothing if somebody trains it. What is
    not noted as pushed stays. Raises what the file system raises."""
    url = place(project, name)[0]
    fs, root = open_place(url)
    if not fs.exists(root):
        return
    try:
        with leases.holding(project, name) as held:
            if held.token is None:
                return  # the storage is away: said
            ours = held.token
            kept = Mirror.of(project, name, held).remove()
    except NotOurs as error:
        _say(f"the copies in {url} stay: {error}")
        return
    tidy(fs, root, ours + 1, keep=_tokens(fs, root))
    if kept:
        command = f"gpt2 {project.training_stage(name)} {name}"
        _say(f"warning: {', '.join(kept)} in {url} stay: they are not pushed; {command} fetches and pushes them")
    elif not entries(fs, root) and fs.exists(root):
        with contextlib.suppress(OSError):  # somebody else's by now
            fs.rmdir(root)


def set_aside(project: Project, name: str) -> None:
    """Begin anew: what lies in the storage is kept, but not gone on with. A storage that cannot be reached is told of."""
    mirror = Mirror.of(project, name)
    try:
        mirror.set_aside()
    except Exception as error:
        _say(f"warning: {mirror.url} cannot be reached: {error}; should it hold copies of this configuration, they are not set aside")


@dataclass(frozen=True)
class _Offer:
    """What one place in the storage has of the training."""

    url: str
    checkpoints: dict[str, str]
    """Digests by name, oldest first."""
    sources: Callable[[str, str], Iterable[pushed.Source]]
    """Where a checkpoint lies, by its name and digest."""
    journal: str | None
    """Its path."""
    journal_md5: str | None
    """None: nobody wrote it down."""
    ours: bool
    """Whether what it has was here: what lies here is that, or newer, or was gone back behind on purpose."""


@dataclass
class Mirror:
    """The copies of one configuration's training, under one URL. Without a lease they can only be read."""

    project: Project
    url: str
    folder: RunFolder
    config: RunConfig
    lease: Lease | None = None
    _copied: dict[str, str] = field(default_factory=dict)
    """Names by digest."""
    _seen: set[str] = field(default_factory=set)
    """Names of what was sealed here at any time: what of it is not here any more was dropped."""

    @classmethod
    def of(cls, project: Project, name: str, lease: Lease | None = None) -> Mirror:
        """The mirror of the configuration that `runs/<name>/config.yaml` holds."""
        url, config = place(project, name)
        return cls(project, url, project.run_folder(name), config, lease)

    def copy_new(self) -> list[str]:
        """Copy what is sealed here and not yet there, the newest first, and drop there what was dropped here; the names of the copied.

        Raises:
            NotOurs: another trainer has taken over.
            Any exception of a file system: the storage cannot be reached, or its lease could not be taken yet.
        """
        copied: list[str] = []
        while True:
            sealed = self._own_checkpoints()
            self._seen |= {checkpoint.name for checkpoint in sealed}
            missing = [checkpoint for checkpoint in sealed if checkpoint.digest not in self._copied]
            if missing and not self._copy(missing[-1]):
                continue
            self._drop_all_but({checkpoint.name for checkpoint in sealed})  # not earlier: there always is a whole one
            if not missing:
                return copied
            copied.append(missing[-1].name)
            self._remove_older_tokens()

    def is_complete(self) -> bool:
        """See `is_complete` above; raises what the file system raises."""
        fs, root = open_place(self.url)
        stored = {digest for token in _tokens(fs, root) for digest in _copies(fs, f"{root}/{_token(token)}").values()}
        stored |= pushed.noted(fs, open_place(self._storage)[1], self.folder.experiment)
        return all(checkpoint.digest in stored for checkpoint in self._own_checkpoints())

    def bring_back(self) -> Checkpoint | None:
        """See `bring_back` above; raises what the file system raises, too."""
        with FileLock(self.folder.path / ".fetch.lock"):
            return self._bring_back()

    def _bring_back(self) -> Checkpoint | None:
        """The highest token's copies count first. What lower ones, and what was pushed, have beside them is taken if the journal says that
        it is of the same training. A kill in between leaves the newest, and the next call fetches the others."""
        here = {checkpoint.digest: checkpoint.step for checkpoint in self._own_checkpoints()}
        own = max(here.values(), default=-1)
        newest: Checkpoint | None = None
        related = False
        for offer in self._offers():
            told = pushed.told_of(self.folder) if related else None
            if here and offer.ours:
                related = True
                continue
            all_of_it = told is None and own <= max(map(step_of, offer.checkpoints), default=-1)
            for name, digest in reversed(offer.checkpoints.items()):
                if digest in here:
                    related = True
                    continue
                if not related and step_of(name) <= own:
                    return None  # another training than ours, or the same and not as far
                if (told is not None and digest not in told) or not (all_of_it or self._is_missed(name, here.values())):
                    continue
                back = self._fetch(offer, name, digest, with_journal=not related)
                if back is not None:
                    print(redacted(f"brought {name} back from {offer.url}"), flush=True)
                    here[digest], newest, related = back.step, newest or back, True
        return newest

    def set_aside(self) -> None:
        """Rename the folders of all tokens that hold copies, and the note of what was pushed; raises what the file system raises."""
        fs, root = open_place(self.url)
        when = time.strftime("%Y%m%d-%H%M%S")
        for token in _tokens(fs, root):
            fs.mv(f"{root}/{_token(token)}", f"{root}/{_ASIDE}{when}_{_token(token)}", recursive=True)
        pushed.set_run_aside(fs, open_place(self._storage)[1], self.folder.experiment, self.config.digest)

    def remove(self) -> list[str]:
        """Remove the copies, but what was set aside and what is neither noted as pushed nor dropped by now; the names of the latter."""
        fs, root = open_place(self.url)
        noted = pushed.noted(fs, open_place(self._storage)[1], self.folder.experiment)
        own = {checkpoint.name: checkpoint for checkpoint in self._own_checkpoints()}
        steps = [checkpoint.step for checkpoint in own.values()]
        kept = set()
        for token in _tokens(fs, root):
            folder = f"{root}/{_token(token)}"
            if self.lease is not None:
                self.lease.check()
            for name, digest in _copies(fs, folder).items():
                replaced = name in own and own[name].digest != digest
                if digest in noted or replaced or not self._is_missed(name, steps):
                    _remove_copy(fs, f"{folder}/{name}")
                else:
                    kept.add(name)
            if not _copies(fs, folder):
                _remove_token(fs, folder)
        return sorted(kept)

    @property
    def _storage(self) -> str:
        return pushed.storage_of(self.project, self.folder.experiment)

    def _offers(self) -> Iterator[_Offer]:
        """What the storage has, the latest first."""
        fs, root = open_place(self.url)
        for token in reversed(_tokens(fs, root)):
            folder, holder = f"{root}/{_token(token)}", read_holder(fs, root, token)
            ours = holder is not None and self._is_this_folder(holder)

            def sources(name: str, _: str, folder: str = folder) -> Iterable[pushed.Source]:
                return [pushed.in_folder(f"{folder}/{name}")]

            yield _Offer(f"{self.url}/{_token(token)}", _copies(fs, folder), sources, f"{folder}/{self.folder.journal.name}", None, ours)
        root, name = open_place(self._storage)[1], self.folder.experiment
        run = pushed.pushed_run(fs, root, name, self.config.digest)
        if run is not None and run.step <= self.config.total_steps:  # else it went further than it is to go now
            journal = run.journal and pushed.object_path(root, run.journal)
            ours = run.newest in pushed.gone_back_from(self.folder)
            yield _Offer(
                self._storage, run.checkpoints, lambda _, digest: pushed.among_pushed(fs, root, name, digest), journal, run.journal, ours
            )

    def _is_missed(self, name: str, steps: Collection[int]) -> bool:
        """Whether a checkpoint that is not among these steps is not simply one that `checkpoint.keep_last` has let go."""
        keep = self.config.checkpoint.keep_last
        return keep is None or len(steps) < keep or step_of(name) > sorted(steps)[-keep]

    def _own_checkpoints(self) -> list[Checkpoint]:
        """Those of this configuration that look whole, oldest first."""
        checkpoints = CheckpointStore(self.folder.checkpoints).checkpoints()
        return [checkpoint for checkpoint in checkpoints if checkpoint.digest in self._copied or self._is_ours(checkpoint)]

    def _is_ours(self, checkpoint: Checkpoint) -> bool:
        try:
            return bool(checkpoint.state()["config_digest"] == self.config.digest)
        except (NotWhole, KeyError):
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
        """Our newest is whole there: the older tokens' copies have served, unless another machine had come further, or has what never was
        here. Half a copy, of a machine that died or was paused, counts for nothing."""
        assert self.lease is not None
        assert self.lease.token is not None
        self.lease.check()
        fs, root = open_place(self.url)
        older = [token for token in _tokens(fs, root) if token < self.lease.token]
        here = {checkpoint.name: checkpoint.step for checkpoint in self._own_checkpoints()}
        served = set(self._copied.values()) | (self._seen - set(here))
        kept = []
        for token in older:
            holder, names = read_holder(fs, root, token), _copies(fs, f"{root}/{_token(token)}")
            ours = holder is None or self._is_this_folder(holder)
            if ours or not any(name not in served and self._is_missed(name, here.values()) for name in names):
                _remove_token(fs, f"{root}/{_token(token)}")
            else:
                kept.append(token)
        tidy(fs, root, self.lease.token, keep=kept)

    def _fetch(self, offer: _Offer, name: str, digest: str, with_journal: bool) -> Checkpoint | None:
        """Bring one checkpoint here, and the journal beside it; None if it is not whole there.

        Raises:
            UserError: a trainer runs here.
        """
        self._refuse_beside_a_trainer()
        if with_journal:
            set_aside_other_configurations(self.folder, self.config)  # or refuse, before anything is copied
        fs = open_place(offer.url)[0]
        checkpoints = self.folder.checkpoints
        checkpoints.mkdir(parents=True, exist_ok=True)
        disk.sweep(checkpoints, f".{name}.")
        partial = checkpoints / f".{name}.{os.getpid()}.partial"
        try:
            self._fetch_from_any(fs, offer, name, digest, partial)
            self._refuse_beside_a_trainer()
            if with_journal:
                self._fetch_journal(fs, offer)
            target = checkpoints / name
            if target.exists():
                CheckpointStore.set_aside([target], self.folder.aside / ("replaced" if _looks_whole(target) else "damaged"))
            disk.rename(partial, target)
            disk.fsync(checkpoints)
        except (NotWhole, FileNotFoundError) as error:
            _say(f"warning: passed over {name} of {offer.url}: {error}")
            return None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return open_checkpoint(target)

    def _fetch_from_any(self, fs: Any, offer: _Offer, name: str, digest: str, partial: Path) -> None:
        """Raises NotWhole if no source has it."""
        problem: Exception = NotWhole("it is not there")
        for source in offer.sources(name, digest):
            try:
                state = pushed.fetch(fs, source, digest, partial).state()
                if (state.get("config_digest"), state.get("step")) != (self.config.digest, step_of(name)):
                    raise NotWhole(f"{source.place} is of another training")
                return
            except (NotWhole, FileNotFoundError) as error:
                problem = error
        raise problem

    def _fetch_journal(self, fs: Any, offer: _Offer) -> None:
        """The journal that belongs to what is offered in the place of ours. If ours is not its beginning, that is set aside."""
        if offer.journal is None or not fs.exists(offer.journal):
            return
        journal = self.folder.journal
        partial = journal.with_name(f".{journal.name}.partial")
        fs.get_file(offer.journal, str(partial))
        theirs = partial.read_bytes()
        if offer.journal_md5 not in (None, hashlib.md5(theirs, usedforsecurity=False).hexdigest()):
            partial.unlink()
            _say(f"warning: passed over the journal of {offer.url}: {offer.journal} is damaged")
            return
        if journal.exists() and not theirs.startswith(journal.read_bytes()):
            where = self.folder.aside / "before_bringing_back"
            where.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(journal, where / f"{journal.stem}.{len(list(where.iterdir()))}.jsonl")
        disk.fsync(partial)
        disk.rename(partial, journal)

    def _refuse_beside_a_trainer(self) -> None:
        """Raises a UserError if one runs in the run's folder. Its lock is only tried where there are signs of one, lest one that starts
        now finds it taken."""
        name = self.folder.experiment
        if not trainer_lives(self.project, name):
            return
        try:
            with FileLock(self.folder.lock, timeout=0):
                pass  # what was left behind by one that was killed
        except Timeout:
            raise UserError(f"the run {name} is in use by another trainer; wait for it, or stop it") from None


def _token(token: int) -> str:
    return f"token_{token:08d}"


def _tokens(fs: Any, root: str) -> list[int]:
    """The tokens that have a folder, lowest first."""
    return [int(match[1]) for name in entries(fs, root) if (match := _TOKEN.fullmatch(name))]


def _names(fs: Any, folder: str) -> list[str]:
    return [name for name in entries(fs, folder) if _STEP.fullmatch(name)]


def _copies(fs: Any, folder: str) -> dict[str, str]:
    """The digests of a token's copies that have a manifest, by their names, oldest first."""
    found = {}
    for name in _names(fs, folder):
        with contextlib.suppress(FileNotFoundError):  # in the making, or going
            found[name] = hashlib.sha256(fs.cat_file(f"{folder}/{name}/{MANIFEST}")).hexdigest()
    return found


def _looks_whole(folder: Path) -> bool:
    try:
        open_checkpoint(folder)
    except NotWhole:
        return False
    return True


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


def _keep_up(mirror: Mirror, done: threading.Event, given_up: threading.Event, finished: Callable[[], bool]) -> None:
    """Copy what is new until `done`, and once more. A storage that has answered is tried again then, if training has `finished`."""
    assert mirror.lease is not None
    complained = ""
    pause = SECONDS_BETWEEN_LOOKS
    while True:
        (given_up if done.is_set() else done).wait(pause)
        if given_up.is_set():
            return
        last = done.is_set()
        try:
            mirror.copy_new()
            pause = SECONDS_BETWEEN_LOOKS
        except NotOurs:
            return  # the lease's keeper tells of it
        except Exception as error:  # the storage's trouble, whatever it is, is not the training's
            waits = last and finished() and mirror.lease.token is not None
            if str(error) != complained:
                complained = str(error)
                how = f"it is tried again for up to {LAST_COPY_OF_ALL_S:g} s" if waits else "training goes on"
                _say(f"warning: no copy to {mirror.url} now: {error}; {how}")
            pause = min(2 * pause, LONGEST_PAUSE_S)
            if waits:
                continue
        if last:
            return
