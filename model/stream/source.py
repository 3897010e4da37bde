"""Where bytes come from: a local file, or any URL that fsspec can open. What is broken for a moment is tried again here, and nowhere else.

A remote file is read in byte ranges, exactly those that the parquet reader asks for. A range that fails is asked for again from a file
that is opened and compared anew, so a fault in the middle of a file costs that range and changes nothing above. Every request has a
deadline of ours, whatever the file system's library thinks of waiting.
"""

from __future__ import annotations

import email.utils
import functools
import io
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from model.background import wait_for
from model.digest import file_sha256
from model.errors import Stopped, UserError
from model.stream.manifest import DataFile

SILENCE_S = float(os.environ.get("GPT2_SILENCE_S", "60"))
"""A source that has not answered for so long ends the run, resumably. The environment variable sets it for a process."""
_ANSWER_S = SILENCE_S / 4
"""A request that has not answered for so long is given up and made again."""
_PATIENCE_S = 600.0
"""A server that says when to come back (`Retry-After`) is obeyed; for so long at most, then the run ends, resumably."""
_READ_BYTES = 1 << 20
"""Bytes the parquet reader asks for at a time, for each column; and bytes a request asks for at most."""
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, ValueError, TypeError, LookupError, AttributeError, AssertionError)

_unchanged: dict[str, int] = {}
"""Local files that were hashed again, and when they had last been written."""

if "jemalloc" in pa.supported_memory_backends() and "ARROW_DEFAULT_MEMORY_POOL" not in os.environ:
    pa.set_memory_pool(pa.jemalloc_memory_pool())  # keeps freed pages a while: half the system time of mimalloc here, and less memory

Result = TypeVar("Result")


@contextmanager
def open_parquet(file: DataFile) -> Iterator[pq.ParquetFile]:
    """The file, checked against the manifest's size and digest as far as that costs nothing.

    Raises:
        UserError: it is gone, changed, or not a whole parquet file; the message names it.
        Stopped: its source has not answered for `SILENCE_S`.
    """
    source: Any
    if is_url(file.url):
        source = pa.PythonFile(RemoteFile(file.url, file.name, file.size, file.digest), mode="r")
    else:
        try:
            source = pa.OSFile(file.url)
        except OSError as error:
            raise UserError(f"data.path: {file.name} cannot be opened: {error.strerror or error}") from None
        _check_local(file)
    with source:
        with named_faults(file.name):
            parquet = pq.ParquetFile(source, pre_buffer=False, buffer_size=_READ_BYTES)
        with parquet:
            yield parquet


def _check_local(file: DataFile) -> None:
    """A file that was written since its digest was taken is hashed again, once a process: a copy is welcome, a changed one is not."""
    status = os.stat(file.url)
    if status.st_size != file.size:
        raise changed(file.name, f"{status.st_size:,} bytes instead of {file.size:,}")
    if status.st_mtime_ns in (file.modified_ns, _unchanged.get(file.url)) or file.digest is None:
        return
    if (digest := file_sha256(Path(file.url))) != file.digest:
        raise changed(file.name, f"its SHA-256 is {digest[:16]}… instead of {file.digest[:16]}…")
    _unchanged[file.url] = status.st_mtime_ns


@contextmanager
def named_faults(name: str) -> Iterator[None]:
    """What pyarrow finds wrong in a file becomes a `DamagedFile`: one line with the file's name."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DamagedFile(
            f"data.path: {name} is damaged or not a parquet file ({describe(error)}); fetch it again and run build-config"
        ) from error


def changed(name: str, how: str) -> UserError:
    """The error for a file that is not the one the manifest describes."""
    return UserError(f"data.path: {name} changed since build-config ({how}); run build-config again, or put the old file back")


def is_url(path: str) -> bool:
    """Whether fsspec opens it. A Windows path such as C:\\\\data has no `://`."""
    return "://" in path


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it.

    Raises:
        UserError: no such protocol, or the package for it is not installed.
    """
    import fsspec

    options: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):
        import aiohttp

        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(sock_connect=_ANSWER_S, sock_read=_ANSWER_S)}
    try:
        fs, path = fsspec.core.url_to_fs(url, **options)
    except (ValueError, ImportError) as error:
        raise UserError(f"data.path: {url}: {error}") from None
    return fs, path


class DamagedFile(UserError):
    """A file cannot be decoded, or lacks a column. `data.quarantine` lets training go on without it."""


class RemoteFile(io.RawIOBase):
    """A file behind a URL, read in exactly the ranges that are asked for."""

    def __init__(self, url: str, name: str, size: int, digest: str | None) -> None:
        from model.stream import hub  # which imports this module

        self._name, self._size, self._digest, self._position = name, size, digest, 0
        self._fs: Any
        self._fs, self._path = (hub.PinnedFiles(), url) if hub.is_pinned(url) else filesystem(url)
        self._file: Any = patiently(name, self._open)

    def _open(self) -> Any:
        """The file, if it is still the one that the manifest describes."""
        if hasattr(self._fs, "invalidate_cache"):
            self._fs.invalidate_cache()
        info = self._fs.info(self._path)
        found = info.get("size")
        if found != self._size:
            raise changed(self._name, f"{found} bytes instead of {self._size:,}")
        if self._digest is not None and (now := digest_in(info)) is not None and now != self._digest:
            raise changed(self._name, f"its digest is {now[:16]}… instead of {self._digest[:16]}…")
        return self._fs.open(self._path, "rb", cache_type="none")

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """Bytes from the start."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; nothing is fetched."""
        self._position = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence] + offset
        return self._position

    def size(self) -> int:
        """Bytes."""
        return self._size

    def read(self, length: int = -1) -> bytes:
        """The next `length` bytes, fewer only at the end of the file."""
        stop = self._size if length < 0 else min(self._size, self._position + length)
        pieces = []
        while self._position < stop:
            start, end = self._position, min(stop, self._position + _READ_BYTES)
            pieces.append(patiently(self._name, functools.partial(self._fetch, start, end)))
            self._position = end
        return b"".join(pieces)

    def _fetch(self, start: int, end: int) -> bytes:
        """One request."""
        file, self._file = self._file or self._open(), None  # whoever is late has a file that nobody waits for
        file.seek(start)
        data: bytes = file.read(end - start)
        if len(data) != end - start:
            raise EOFError(f"{len(data):,} of {end - start:,} bytes came")
        self._file = file
        return data

    def close(self) -> None:
        """Let go of the connection."""
        if not self.closed and self._file is not None:
            self._file.close()
        super().close()


def digest_in(info: dict[str, Any]) -> str | None:
    """The digest that a file system reports: the Hub's SHA-256 of a large file, else an etag."""
    lfs = info.get("lfs")
    if lfs:
        return str(lfs["sha256"])
    etag = info.get("ETag") or info.get("etag") or info.get("blob_id")
    return str(etag).strip('"') if etag else None


def patiently(name: str, action: Callable[[], Result], patience_s: float | None = None) -> Result:
    """The result of `action`, tried again with growing pauses while it fails in a way that may pass; for `SILENCE_S` unless told otherwise.

    A server that says when to come back is asked again then, and the time that it asked for does not count.

    Raises:
        UserError: it failed for good (gone, forbidden, not a server that can do this).
        Stopped: it still failed when patience ended, or asked for more than `_PATIENCE_S`.
    """
    patience_s = SILENCE_S if patience_s is None else patience_s
    began = time.monotonic()
    deadline, pause = began + patience_s, 0.5
    while True:
        try:
            return in_time(action, min(_ANSWER_S, deadline - time.monotonic()))
        except (UserError, Stopped):
            raise
        except Exception as error:
            if _is_permanent(error):
                raise UserError(f"data.path: {name} cannot be read ({describe(error)})") from error
            now, wait = time.monotonic(), pause
            if (later := _retry_after(error)) is not None:
                wait = max(pause, later)
                deadline += later
            if now + wait > min(deadline, began + _PATIENCE_S):
                raise Stopped(
                    f"data.path: {name} could not be read for {now - began:.0f} s ({describe(error)}); the same command goes on from here"
                ) from error
        time.sleep(wait)
        pause = min(2 * pause, 8.0)


def in_time(action: Callable[[], Result], seconds: float) -> Result:
    """The result of `action`, or a TimeoutError."""
    began = time.monotonic()
    late = TimeoutError(f"no answer within {seconds:.0f} s")
    return wait_for(action, lambda: late if time.monotonic() - began > seconds else None)


def _retry_after(error: Exception) -> float | None:
    """Seconds after which a server wants to be asked again.

    By its `Retry-After` (RFC 9110, 10.2.3: seconds or a date), or, on the Hub, its `RateLimit`: nothing remains (r) for so long (t).
    """
    behind = _behind(error)
    headers = getattr(behind, "headers", None) or getattr(getattr(behind, "response", None), "headers", None)
    if headers is None:
        return None
    limit = re.search(r"\br=0;\s*t=(\d+)", headers.get("RateLimit", ""))
    value = limit[1] if limit else headers.get("Retry-After")
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


def describe(error: BaseException) -> str:
    """Kind and message of an error, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _is_permanent(error: Exception) -> bool:
    """Whether the same request would fail again: a refusal, or a mistake."""
    behind = _behind(error)
    status = getattr(behind, "status", None) or getattr(getattr(behind, "response", None), "status_code", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (408, 425, 429)
    return isinstance(behind, _PERMANENT)


def _behind(error: Exception) -> Exception:
    """What decides: fsspec calls any failure to look at a file "not found"."""
    return error.__cause__ if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception) else error
