"""One trainer a run, and one a GPU. The operating system lets go of a dead holder's lock."""

from __future__ import annotations

import json
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from model.errors import UserError

Fence = Callable[[], None]
"""Asked before something is written: raises a UserError once somebody else has taken over."""


def no_fence() -> None:
    """The fence of a process that shares its run with nobody."""


@contextmanager
def held(path: Path, what: str) -> Iterator[Fence]:
    """Hold the lock file `path` meanwhile. Yields a fence: a holder that slept while its lock was lost (a network's file system forgets
    those of machines it does not hear of; people remove files) must not write beside its successor.

    Raises:
        UserError: somebody else holds it; says who, since when, and for `what`.
    """
    lock, holder = FileLock(path), path.with_suffix(".json")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{what} is in use by another trainer ({_who(holder)}); wait for it, or stop it") from None
    about = {"pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S"), "token": uuid.uuid4().hex}
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
        return f"process {about['pid']} since {about['since']}"
    except (ValueError, KeyError, TypeError):
        return "it is just starting"


def gpu_lock(index: int) -> Path:
    """The lock file of a GPU of this machine."""
    return Path(tempfile.gettempdir()) / f"gpt2-from-scratch-cuda-{index}.lock"
