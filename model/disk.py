"""The disk operations that durability hangs on, in one place: what a power cut must not undo goes through here.

They are also where a test can kill the process. In a checkout (where `tests/` lies beside `model/`), `CRASH_AT=n` in the environment ends
the process with SIGKILL at its n-th operation: a write is done by half, an fsync or a rename not at all. With `CRASH_COUNT=file` the number
of operations is written to that file as they are counted, so that a test knows how many there are.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
from pathlib import Path
from typing import Protocol

Bytes = bytes | bytearray | memoryview


class Writable(Protocol):
    """A file open for writing bytes, without a buffer of Python's."""

    def write(self, data: Bytes, /) -> int | None:
        """Write; returns how many bytes were taken."""


def write(file: Writable, data: Bytes) -> None:
    """Write all of `data` to an unbuffered file (`open(…, buffering=0)`).

    Raises:
        OSError: the disk did not take all of it; some may be written.
    """
    view = memoryview(data).cast("B")
    if _counting and _is_last():
        file.write(view[: len(view) // 2])
        _die()
    while len(view):
        view = view[file.write(view) or 0 :]


def fsync(path: Path) -> None:
    """Make a file, or the names in a folder, durable. (A folder cannot be opened on Windows, where a rename is durable itself.)"""
    if _counting and _is_last():
        _die()
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename(source: Path, target: Path) -> None:
    """Give a file or folder its name; a folder must not be there yet, a file takes the old one's place."""
    if _counting and _is_last():
        _die()
    if source.is_dir():
        os.rename(source, target)
    else:
        os.replace(source, target)


def write_file(path: Path, data: Bytes) -> None:
    """Put a whole file in its place, durably: a reader, and a machine after a power cut, find the old one or the new one."""
    sweep(path.parent, f".{path.name}.")
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    try:
        with partial.open("wb", buffering=0) as file:
            write(file, data)
        fsync(partial)
        rename(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def sweep(folder: Path, prefix: str) -> None:
    """Remove what dead processes left half-written: names that begin so, go on with a process's id, and end in `.partial`."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if path.name.startswith(prefix) and path.name.endswith(".partial"):
            import psutil

            pid = path.name.removeprefix(prefix).split(".")[0]
            if pid.isdigit() and (int(pid) == os.getpid() or not psutil.pid_exists(int(pid))) and path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif pid.isdigit() and not psutil.pid_exists(int(pid)):
                path.unlink(missing_ok=True)


def sweep_files(folder: Path) -> None:
    """Remove what dead processes left of any file that they were writing with `write_file`."""
    for path in folder.iterdir():
        if match := _PARTIAL_FILE.search(path.name):
            sweep(folder, path.name[: match.start(1)])


_PARTIAL_FILE = re.compile(r"^\..+\.(\d+)\.\d+\.partial$")
_counting = bool(os.environ.get("CRASH_AT") or os.environ.get("CRASH_COUNT")) and (Path(__file__).parents[1] / "tests").is_dir()
_count = 0
_lock = threading.Lock()


def _is_last() -> bool:
    """Count one operation; whether it is the one to die at."""
    global _count
    with _lock:
        _count += 1
        if told := os.environ.get("CRASH_COUNT"):
            Path(told).write_text(str(_count), encoding="utf-8")
        return _count == int(os.environ.get("CRASH_AT") or -1)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
    threading.Event().wait()
