"""One trainer a run, and one a GPU. The operating system lets go of a dead holder's lock."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from model.errors import UserError


@contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` meanwhile.

    Raises:
        UserError: somebody else holds it; says who, since when, and for `what`.
    """
    lock, holder = FileLock(path), path.with_suffix(".json")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{what} is in use by another trainer ({_who(holder)}); wait for it, or stop it") from None
    try:
        holder.write_text(json.dumps({"pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}), encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _who(holder: Path) -> str:
    try:
        about = json.loads(holder.read_text(encoding="utf-8"))
        return f"process {about['pid']} since {about['since']}"
    except (OSError, ValueError, KeyError):
        return "it is just starting"


def gpu_lock(index: int) -> Path:
    """The lock file of a GPU of this machine."""
    return Path(tempfile.gettempdir()) / f"gpt2-from-scratch-cuda-{index}.lock"
