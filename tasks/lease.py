"""One trainer at a time: of all machines that share a storage, one holds the lease of a configuration's training.

    <storage>/checkpoints/<experiment>/<config digest>/
        lease_00000003.json       token 3 and its holder; created exclusively: of two that race for it, one wins
        heartbeat_00000003.json   rewritten by the holder while it lives; tells at the end that the lease was given back
        token_00000003/…          what this holder writes (tasks/mirror.py)

The highest token holds. A holder that was paused and wakes after it was taken over has a lower one: what it still writes lies where nobody
looks first, and as soon as it has been to the storage it is told so and ended. No clock is compared with another machine's: a holder counts
as gone if its heartbeat does not change for TTL_S by the watcher's own clock.

A storage that cannot be reached is no reason not to train: then nobody is kept out until it answers.

Beside the storage there is a local fence, `runs/<experiment>/.lease.json`: until when processes of this run may write to places that they
share with other machines. It expires by itself when the keeper is paused together with them; `may_write` reads it.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import psutil
from fsspec.implementations.local import LocalFileSystem

from model.errors import Stopped, UserError
from model.params import read_yaml, validated
from model.run_config import RunConfig
from model.run_folder import RunFolder
from model.secrets import redacted
from tasks.project import Project

TTL_S = float(os.environ.get("GPT2_LEASE_S", "60"))
"""How long a holder may be silent. GPT2_LEASE_S, the same on all machines, is for tests."""
BEATS_A_TTL = 4
GIVE_BACK_S = 5.0
"""How long a stage that ends waits for the storage to take the lease back."""
_LEASE = re.compile(r"lease_(\d{8})\.json")


class NotOurs(UserError):
    """Another process holds the lease; says who and since when."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease."""

    host: str
    """The machine's name; GPT2_HOST, if that is set, instead."""
    machine: str
    """Tells machines of one name apart: process ids mean something only where this is equal."""
    pid: int
    started: float
    folder: str
    since: str
    id: str

    @classmethod
    def ourselves(cls, folder: RunFolder) -> Holder:
        """This process, for a run in `folder`."""
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        pid, started = os.getpid(), psutil.Process().create_time()
        host = os.environ.get("GPT2_HOST") or platform.node()
        return cls(host, _machine(), pid, started, str(folder.path), since, uuid.uuid4().hex)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"

    def same_machine(self, other: Holder) -> bool:
        """Whether the two could see each other's processes."""
        return (self.host, self.machine) == (other.host, other.machine)

    def lives(self) -> bool:
        """Whether the process is there; for one of this machine."""
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


@dataclass
class Lease:
    """The lease of one configuration's training, held by this process or not (yet)."""

    url: str
    folder: RunFolder
    holder: Holder
    token: int | None = None
    """None: not held, because the storage has not been reached yet."""
    lost: NotOurs | None = None
    """Set once another process has taken over."""
    when_lost: Callable[[], None] = field(default=lambda: None)
    """Called at once by the keeper's thread when that happens."""
    _beats: int = 0

    @classmethod
    def of(cls, project: Project, name: str) -> Lease:
        """The lease for the configuration that `runs/<name>/config.yaml` holds."""
        folder = project.run_folder(name)
        return cls(place(project, name)[0], folder, Holder.ourselves(folder))

    def take(self, stopping: Callable[[], bool] = lambda: False) -> None:
        """Take the lease: at once if nobody holds it, from a holder of this machine that is dead, or from one that is silent for TTL_S.

        Raises:
            NotOurs: its holder lives.
            Stopped: `stopping` said so.
            Any exception of a file system: the storage cannot be reached.
        """
        while True:
            fs, root = open_place(self.url)
            newest = max(tokens(fs, root), default=0)
            if newest:
                self._await_silence(fs, root, newest, stopping)
            if self._create(fs, root, newest + 1):
                return

    def check(self) -> None:
        """Ask the storage whether the lease is still this process's.

        Raises:
            NotOurs: another has taken over.
            Any exception of a file system: the storage cannot be reached, or the lease is not there.
        """
        fs, root = open_place(self.url)
        newest = max(tokens(fs, root), default=0)
        if self.token is None or newest < self.token:
            raise FileNotFoundError(f"the lease is not in {self.url}")
        holder = read_holder(fs, root, newest)
        if newest > self.token or (holder is not None and holder.id != self.holder.id):
            raise NotOurs(f"{self.folder.experiment} was taken over by {holder or 'another trainer that just starts'}; it goes on there")

    def renew(self) -> None:
        """Tell the others that this holder lives; raises as `check` does."""
        began = time.time()
        self.check()
        self._beat()
        self._open_fence(began + TTL_S)

    def give_back(self) -> None:
        """Let the next one have it without waiting. Raises what the file system raises."""
        if self.token is not None:
            self._beat(released=True)
            self.token = None

    def keep(self, done: threading.Event) -> None:
        """Renew until `done`, then give back. Whatever the storage does: it is told of once, and tried again."""
        told = self.token is None
        while not done.wait(TTL_S / BEATS_A_TTL):
            try:
                if self.token is None:
                    self.take(done.is_set)
                else:
                    self.renew()
                told = False
            except NotOurs as error:
                self.lost = error
                self.when_lost()
                with contextlib.suppress(OSError):
                    self._open_fence(0)
                return
            except Stopped:
                break
            except Exception as error:  # every file system of fsspec has errors of its own
                if not told:
                    told = True
                    _say(f"warning: the lease in {self.url} is not renewed now: {error}; training goes on")
                if fence(self.folder).exists() and may_write(self.folder):  # one that expired only the storage can renew
                    with contextlib.suppress(OSError):
                        self._open_fence(time.time() + TTL_S)
        try:
            self.give_back()
        except Exception as error:
            _say(f"warning: the lease was not given back: {error}; other machines wait {TTL_S:g} s")

    def _await_silence(self, fs: Any, root: str, token: int, stopping: Callable[[], bool]) -> None:
        """Return when the token's holder is gone, or when another has taken over from it."""
        holder = read_holder(fs, root, token)
        if holder is not None and holder.same_machine(self.holder) and not holder.lives():
            return
        who = holder or "a trainer that just starts"
        before = _read(fs, _heartbeat(root, token))
        if _given_back(before):
            return
        _say(f"{self.folder.experiment} is held by {who}; waiting up to {TTL_S:g} s for a sign of life")
        deadline = time.monotonic() + TTL_S
        while time.monotonic() < deadline:
            if stopping():
                raise Stopped("asked to")
            time.sleep(min(0.5, TTL_S / 8))
            fs.invalidate_cache()
            now = _read(fs, _heartbeat(root, token))
            if _given_back(now) or max(tokens(fs, root), default=0) != token:
                return
            if now != before:
                raise NotOurs(f"{self.folder.experiment} is in use by {who}; wait for it, or stop it there")
        _say(f"{self.folder.experiment}: {who} has been silent for {TTL_S:g} s; taken over")

    def _create(self, fs: Any, root: str, token: int) -> bool:
        """Create the token's lease; False if another was quicker."""
        began = time.time()
        fs.makedirs(root, exist_ok=True)
        path, content = lease_file(root, token), json.dumps({**asdict(self.holder), "token": token}, indent=1).encode()
        try:
            if isinstance(fs, LocalFileSystem):
                with Path(path).open("xb") as file:  # fsspec would look first and write then
                    file.write(content)
            else:
                _create_exclusively(fs, path, content)
        except Stopped:
            raise
        except Exception:
            if not fs.exists(path):
                raise
        fs.invalidate_cache()
        holder = read_holder(fs, root, token)  # says so, too, if our own request went through and its answer was lost
        if holder is None or holder.id != self.holder.id or max(tokens(fs, root), default=0) != token:
            return False
        self.token = token
        self._beat()
        self._open_fence(began + TTL_S)
        return True

    def _beat(self, released: bool = False) -> None:
        assert self.token is not None
        fs, root = open_place(self.url)
        self._beats += 1
        fs.pipe_file(_heartbeat(root, self.token), json.dumps({"beats": self._beats, "released": released}).encode())

    def _open_fence(self, until: float) -> None:
        path = fence(self.folder)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"valid_until": until, "token": self.token}), encoding="utf-8")
        os.replace(partial, path)


@contextlib.contextmanager
def holding(project: Project, name: str) -> Iterator[Lease]:
    """Hold the lease meanwhile, as far as the storage can be reached; look at its `lost` now and then.

    Raises:
        NotOurs: another trainer holds it.
    """
    lease = Lease.of(project, name)
    done = threading.Event()
    keeper = threading.Thread(target=lease.keep, args=(done,), name="lease", daemon=True)
    try:
        try:
            lease.take()
        except (UserError, Stopped):
            raise
        except Exception as error:
            _say(f"warning: no lease, {lease.url} cannot be reached: {error}; training goes on")
            if not may_write(lease.folder):
                fence(lease.folder).unlink()  # a killed stage left it
        keeper.start()
        yield lease
    finally:
        done.set()
        if keeper.ident is None and lease.token is not None:
            keeper.start()  # stopped in between: it gives back and ends
        if keeper.ident is not None:
            keeper.join(GIVE_BACK_S)
            if lease.lost is None:
                fence(lease.folder).unlink(missing_ok=True)


def may_write(folder: RunFolder) -> bool:
    """Whether processes of this run may write to what they share with other machines. Where nobody keeps a lease, they may."""
    try:
        return bool(time.time() < json.loads(fence(folder).read_text(encoding="utf-8"))["valid_until"])
    except FileNotFoundError:
        return True
    except (OSError, ValueError, KeyError, TypeError):
        return False


def fence(folder: RunFolder) -> Path:
    """The local fence's file."""
    return folder.path / ".lease.json"


def place(project: Project, name: str) -> tuple[str, RunConfig]:
    """The URL under which lease and copies of the experiment's present configuration lie, and that configuration."""
    folder = project.run_folder(name)
    config = validated(RunConfig, read_yaml(folder.config), folder.config.name)
    storage = project.storage(project.experiment(name)).rstrip("/\\")
    return f"{storage}/checkpoints/{name}/{config.digest}", config


def open_place(url: str) -> tuple[Any, str]:
    """The file system of a URL, with nothing remembered of earlier listings, and the path in it."""
    fs, root = fsspec.url_to_fs(url)
    fs.invalidate_cache()
    return fs, root.rstrip("/")


def tokens(fs: Any, root: str) -> list[int]:
    """The tokens that were taken and not tidied away."""
    return [int(match[1]) for name in entries(fs, root) if (match := _LEASE.fullmatch(name))]


def entries(fs: Any, folder: str) -> list[str]:
    """The names in a folder, in order; none if it is not there."""
    paths = fs.ls(folder, detail=False) if fs.exists(folder) else []
    return sorted(path.rstrip("/").rsplit("/", 1)[1] for path in paths)


def lease_file(root: str, token: int) -> str:
    """The path of a token's lease."""
    return f"{root}/lease_{token:08d}.json"


def read_holder(fs: Any, root: str, token: int) -> Holder | None:
    """Who holds a token; None if the lease is not (wholly) written."""
    about = _read(fs, lease_file(root, token))
    try:
        return Holder(**{key: about[key] for key in Holder.__dataclass_fields__}) if isinstance(about, dict) else None
    except KeyError:
        return None


def tidy(fs: Any, root: str, token: int, keep: Collection[int] = ()) -> None:
    """Remove the leases of tokens below `token`, but those to `keep`."""
    for older in tokens(fs, root):
        if older < token and older not in keep:
            for path in (_heartbeat(root, older), lease_file(root, older)):
                if fs.exists(path):
                    fs.rm_file(path)


def _create_exclusively(fs: Any, path: str, content: bytes) -> None:
    try:
        fs.pipe_file(path, content, mode="create")
    except (TypeError, NotImplementedError):  # this file system cannot; of two, the one that is overwritten learns it from `check`
        if not fs.exists(path):
            fs.pipe_file(path, content)


def _heartbeat(root: str, token: int) -> str:
    return f"{root}/heartbeat_{token:08d}.json"


def _given_back(heartbeat: Any) -> bool:
    return isinstance(heartbeat, dict) and bool(heartbeat.get("released"))


def _read(fs: Any, path: str) -> Any:
    """A JSON file's value; None if it is not there or not (yet) whole."""
    try:
        return json.loads(fs.cat_file(path))
    except (FileNotFoundError, ValueError):
        return None


def _say(message: str) -> None:
    print(redacted(message), file=sys.stderr, flush=True)


def _machine() -> str:
    """This boot of this kernel, and this namespace of process ids: containers and cloned machines often share a host's name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return str(uuid.getnode())
