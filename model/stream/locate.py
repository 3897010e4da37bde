"""Locating: which parquet files `data.path` means, and in which order. Sizes and digests are known here, rows are not yet counted."""

from __future__ import annotations

import functools
import glob
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock

from model.config import DataConfig
from model.digest import file_sha256
from model.errors import Stopped, UserError
from model.stream import hub, quickstart
from model.stream.manifest import DataFile
from model.stream.source import describe, digest_in, filesystem, is_url, patiently

_QUICKSTART_SEED = 0
"""The generated corpus is one thing, whatever the experiment's seed."""

_FIRST_ANSWER_S = 4.0


def locate(data: DataConfig, storage: Path) -> tuple[str | None, list[DataFile]]:
    """The pinned commit if the dataset lies on the Hub, and the dataset's files in order.

    What exists as a local path is local; `owner/name` is otherwise asked of the Hub.

    Raises:
        UserError: nothing there; the message starts with `data.path`.
    """
    path = data.path
    if path == "quickstart":
        return None, _local_files(str(_quickstart(storage)))
    if is_url(path):
        return None, _remote_files(path)
    if hub.is_dataset_id(path) and not Path(path).exists():
        return hub.find_files(path, data.revision)
    return None, _local_files(path)


def _quickstart(storage: Path) -> Path:
    """The generated corpus' folder, made if it is not there."""
    folder = storage / "datasets" / f"quickstart-{quickstart.CORPUS_VERSION}-{quickstart.DEFAULT_ROWS}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.parent / ".quickstart.lock"):
        if not folder.is_dir():
            quickstart.write_corpus(folder, _QUICKSTART_SEED, quickstart.DEFAULT_ROWS)
    return folder


def _local_files(path: str) -> list[DataFile]:
    """The parquet files of a folder (and its folders), of a glob, or the one file."""
    given = Path(path).expanduser()
    if given.is_dir():
        base, found = given, list(given.rglob("*.parquet"))
    else:
        found = [Path(name) for name in glob.glob(str(given), recursive=True)]  # noqa: PTH207 (a Path cannot glob an absolute pattern)
        base = _common_folder(found)
    names = {file.relative_to(base).as_posix(): file.absolute() for file in found if file.is_file()}
    visible = sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))
    if not visible:
        raise UserError(f"data.path: {path} names no parquet files; give a folder, file, glob, URL or dataset of the Hub (owner/name)")
    return [_local_file(name, names[name]) for name in visible]


def _local_file(name: str, path: Path) -> DataFile:
    status = path.stat()
    return _uncounted(str(path), name, status.st_size, file_sha256(path), status.st_mtime_ns)


def _common_folder(files: list[Path]) -> Path:
    shared = set.intersection(*(set(file.parents) for file in files)) if files else set()
    return max(shared, key=lambda folder: len(folder.parts), default=Path())


def _remote_files(url: str) -> list[DataFile]:
    """The parquet files under a URL, or that match it, or the one it names."""
    fs, path = filesystem(url)
    if glob.has_magic(path):
        found = _asked(url, lambda: fs.glob(path))
    elif path.endswith(".parquet"):
        found = [path]
    else:
        found = _asked(url, lambda: fs.glob(path.rstrip("/") + "/**/*.parquet"))
    if not found:
        raise UserError(f"data.path: {url} names no parquet files")
    files = []
    for place, name in _short_names(sorted(found)).items():
        info = _asked(name, functools.partial(fs.info, place))
        if not info.get("size"):
            raise UserError(f"data.path: {name}: its server does not say how large it is; copy it to a folder")
        files.append(_uncounted(fs.unstrip_protocol(place), name, info["size"], digest_in(info)))
    return files


def _asked(name: str, question: Callable[[], Any]) -> Any:
    """A source's first answer: who cannot be reached now is more likely misspelt than away for a minute."""
    try:
        return patiently(name, question, _FIRST_ANSWER_S)
    except Stopped as stopped:
        cause = stopped.__cause__ or stopped
        raise UserError(f"data.path: {name} cannot be reached ({describe(cause)}); check the address and the network") from cause


def _short_names(paths: list[str]) -> dict[str, str]:
    """Each path without the folders that all of them share."""
    parts = [path.split("/") for path in paths]
    shared = 0
    while all(len(part) > shared + 1 and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return {path: "/".join(part[shared:]) for path, part in zip(paths, parts, strict=True)}


def _uncounted(url: str, name: str, size: int, digest: str | None, modified_ns: int | None = None) -> DataFile:
    return DataFile(url, name, size, digest, rows=0, samples=0, train_samples=0, text_bytes=0, modified_ns=modified_ns)
