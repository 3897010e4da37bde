"""Where bytes come from: a local file, or any URL that fsspec can open. What is broken for a moment is tried again here, and nowhere else.

A remote file is read in byte ranges, exactly those that the parquet reader asks for. A range that fails is asked for again, so a fault in
the middle of a file costs that range and changes nothing above.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from model.errors import Stopped, UserError
from model.stream.manifest import DataFile

SILENCE_S = 60.0
"""A source that has not answered for so long ends the run, resumably."""
_ANSWER_S = 15.0
"""A request that has not answered for so long is given up and made again."""
_READ_BYTES = 1 << 20
"""Bytes the parquet reader asks for at a time, for each column."""
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, ValueError, TypeError, LookupError, AttributeError, AssertionError)

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
        if source.size() != file.size:
            raise changed(file.name, f"{source.size():,} bytes instead of {file.size:,}")
    with source:
        with named_faults(file.name):
            parquet = pq.ParquetFile(source, pre_buffer=False, buffer_size=_READ_BYTES)
        with parquet:
            yield parquet


@contextmanager
def named_faults(name: str) -> Iterator[None]:
    """What pyarrow finds wrong in a file becomes one line with the file's name."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise UserError(
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


class RemoteFile(io.RawIOBase):
    """A file behind a URL, read in exactly the ranges that are asked for."""

    def __init__(self, url: str, name: str, size: int, digest: str | None) -> None:
        self._name, self._size, self._position = name, size, 0
        fs, path = filesystem(url)
        info = patiently(name, lambda: fs.info(path))
        found = info.get("size")
        if found != size:
            raise changed(name, f"{found} bytes instead of {size:,}")
        if digest is not None and (now := digest_in(info)) is not None and now != digest:
            raise changed(name, f"its digest is {now[:16]}… instead of {digest[:16]}…")
        self._file = patiently(name, lambda: fs.open(path, "rb", cache_type="none"))

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
        start = self._position
        stop = self._size if length < 0 else min(self._size, start + length)

        def fetch() -> bytes:
            self._file.seek(start)
            data: bytes = self._file.read(stop - start)
            if len(data) != stop - start:
                raise EOFError(f"{len(data):,} of {stop - start:,} bytes came")
            return data

        data = patiently(self._name, fetch) if stop > start else b""
        self._position = stop
        return data

    def close(self) -> None:
        """Let go of the connection."""
        if not self.closed:
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

    Raises:
        UserError: it failed for good (gone, forbidden, not a server that can do this).
        Stopped: it still failed when patience ended.
    """
    patience_s = SILENCE_S if patience_s is None else patience_s
    deadline, pause = time.monotonic() + patience_s, 0.5
    while True:
        try:
            return action()
        except (UserError, Stopped):
            raise
        except Exception as error:
            if _is_permanent(error):
                raise UserError(f"data.path: {name} cannot be read ({describe(error)})") from error
            if time.monotonic() + pause > deadline:
                raise Stopped(
                    f"data.path: {name} could not be read for {patience_s:.0f} s ({describe(error)}); the same command goes on from here"
                ) from error
        time.sleep(pause)
        pause = min(2 * pause, 8.0)


def describe(error: BaseException) -> str:
    """Kind and message of an error, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _is_permanent(error: Exception) -> bool:
    """Whether the same request would fail again: a refusal, or a mistake.

    fsspec calls any failure to look at a file "not found", so what is behind that decides.
    """
    behind = error.__cause__ if isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception) else error
    status = getattr(behind, "status", None) or getattr(getattr(behind, "response", None), "status_code", None)
    if isinstance(status, int):
        return 400 <= status < 500 and status not in (408, 425, 429)
    return isinstance(behind, _PERMANENT)
