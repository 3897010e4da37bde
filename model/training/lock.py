"""One trainer a run, and one a GPU. The operating system lets go of a dead holder's lock."""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from model.errors import UserError

Fence = Callable[[], None]
"""Asked before something is written: raises a UserError once somebody else has taken over."""

SECONDS_TO_DIE = 1.0
"""How long one waits for a lock: of a holder that was just killed, a process that it was starting has it for a moment longer."""


def no_fence() -> None:
    """The fence of a process that shares its run with nobody."""


@contextmanager
def held(path: Path, what: str, by: str = "", patience: float = SECONDS_TO_DIE) -> Iterator[Fence]:
    """Hold the lock file `path` meanwhile. Yields a fence: a holder that slept while its lock was lost (a network's file system forgets
    those of machines it does not hear of; people remove files) must not write beside its successor.

    `by`: what the holder does with it, for those who wait. `patience`: seconds to wait for it.

    Raises:
        UserError: somebody else holds it; says who, since when, and for `what`.
    """
    lock, holder = FileLock(path, mode=0o666), path.with_suffix(".json")
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        raise UserError(f"{what} is in use by another trainer ({_who(holder)}); wait for it, or stop it") from None
    about = {"by": by, "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S"), "token": uuid.uuid4().hex}
    text = json.dumps(about)

    def fence() -> None:
        if _read(holder) != text:
            raise UserError(f"{what} was taken over by another trainer ({_who(holder)}); this one writes no more")

    try:
        holder.write_text(text, encoding="utf-8")
        yield fence
    finally:
        if _read(holder) == text:
            holder.unlink(missing_ok=True)
        lock.release()


def _read(holder: Path) -> str | None:
    try:
        return holder.read_text(encoding="utf-8")
    except OSError:
        return None


def _who(holder: Path) -> str:
    try:
        about = json.loads(_read(holder) or "")
        doing = f"{about['by']}, " if about.get("by") else ""
        return f"{doing}process {about['pid']} since {about['since']}"
    except (ValueError, KeyError, TypeError):
        return "it is just starting"


@contextmanager
def held_gpus(gpus: Sequence[str], count: int, by: str, wait: Callable[[str], None]) -> Iterator[list[int]]:
    """Hold `count` of the machine's GPUs meanwhile; yields their places in `gpus`.

    Args:
        gpus: their identities, the same for every process of this machine.
        count: how many; at most as many as there are.
        by: the run that they are for.
        wait: called again and again while too few are free, with who holds the others; returns after a moment, or raises.
    """
    with ExitStack() as locks:
        found: list[int] = []
        while len(found) < count:
            busy = []
            for place in [each for each in range(len(gpus)) if each not in found]:
                if len(found) == count:
                    break
                try:
                    locks.enter_context(held(gpu_lock(gpus[place]), f"GPU {place}", by, patience=0))
                    found.append(place)
                except UserError:
                    busy.append(f"GPU {place} is in use by {_who(gpu_lock(gpus[place]).with_suffix('.json'))}")
                except PermissionError as error:
                    busy.append(f"GPU {place} has a lock of another account ({error.filename})")
            if len(found) < count:
                locks.close()  # all or none: two that hold a half each would wait for ever
                found = []
                wait(f"{by} waits for {count} free GPU{'s' if count > 1 else ''}: {'; '.join(busy)}")
        yield sorted(found)


def gpus_in_use() -> bool:
    """Whether a training of this machine holds a GPU now."""
    for path in _gpu_locks().glob("*.lock"):
        lock = FileLock(path, mode=0o666)
        try:
            lock.acquire(timeout=0)
            lock.release()
        except (Timeout, OSError):
            return True
    return False


def gpu_lock(identity: str) -> Path:
    """The lock file of a GPU of this machine."""
    return _gpu_locks() / f"{re.sub('[^A-Za-z0-9-]', '', identity)}.lock"


def _gpu_locks() -> Path:
    """A folder for all accounts of this machine."""
    folder = Path(tempfile.gettempdir()) / "gpt2-from-scratch-gpus"
    folder.mkdir(exist_ok=True)
    with suppress(OSError):
        folder.chmod(0o777)  # in a sticky one, as that above, nobody may open another account's files
    return folder
