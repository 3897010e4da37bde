"""Held-out data: windows to measure the loss on, and rows to ask questions about."""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from model import disk
from model.config import DataConfig
from model.digest import digest_of
from model.errors import UserError
from model.stream.manifest import DataFile, DatasetManifest
from model.stream.packing import Packer
from model.stream.reader import Reader
from model.stream.split import as_bytes, names_of

_CACHE_FORMAT = 2
_CANDIDATES = 16
"""Held-out rows are chosen among so many times as many, …"""
_FILES = 16
"""… taken from the beginnings of so many files."""


def validation_windows(manifest: DatasetManifest, data: DataConfig, seed: int, count: int) -> np.ndarray:
    """The first `count` windows of the validation half for choosing, in the dataset's order: uint16 [<= count, max_length + 1].

    Raises:
        UserError: that half does not fill one window.
    """
    reader, packer = Reader(data, seed), Packer(data.max_length)
    windows: list[np.ndarray] = []
    for file in manifest.files:
        for rows in reader.readable_samples(file, ["choose"], data.text_columns):
            for documents in reader.texts(rows).documents():
                packer.add(documents)
                while (found := packer.window()) is not None:
                    windows.append(found[0])
                    if len(windows) == count:
                        return np.stack(windows)
    if not windows:
        raise UserError(
            f"data.train_ratio: what is left for validation does not fill one window of {data.max_length + 1} tokens; "
            "lower data.train_ratio, or use more samples"
        )
    return np.stack(windows)


def cached_validation_windows(
    path: Path, manifest: DatasetManifest, data: DataConfig, seed: int, count: int, warn: Callable[[str], None] = lambda message: None
) -> np.ndarray:
    """`validation_windows`, read from `path` if they lie there whole and are these, else written there. `warn` is told of damage."""
    key = digest_of([_CACHE_FORMAT, manifest.digest, data.model_dump(mode="json", exclude={"path", "revision", "cache"}), seed, count])
    if path.exists():
        found, whole = None, False
        with contextlib.suppress(OSError, SafetensorError, KeyError), safe_open(path, "numpy") as file:
            windows: np.ndarray = file.get_tensor("windows")
            found = file.metadata() or {}
            whole = found.get("sha256") == _seal(str(found.get("key")), windows)
            if whole and found.get("key") == key:
                return windows
        if not whole:
            warn(f"{path.name} is not as it was written; it is made again")
    windows = validation_windows(manifest, data, seed, count)
    with contextlib.suppress(OSError):  # they are made again next time
        disk.write_file(path, save({"windows": windows}, {"key": key, "sha256": _seal(key, windows)}))
    return windows


def _seal(key: str, windows: np.ndarray) -> str:
    return hashlib.sha256(key.encode() + windows.tobytes()).hexdigest()


def held_out_rows(
    manifest: DatasetManifest, data: DataConfig, seed: int, count: int, half: Literal["choose", "report"], columns: Sequence[str]
) -> list[dict[str, Any]]:
    """`count` rows of a validation half (all of it if it is smaller), in the order of a keyed hash of their ids: what lies together in the
    files, a kind of exercise for example, is mixed.

    They are chosen among the beginnings of several files; memory is bounded by `count` rows. Each row has `id`, `article` (its own id if it
    has none) and the asked `columns`.
    """
    reader = Reader(data, seed)
    step = max(1, len(manifest.files) // _FILES)
    some = manifest.files[::step]
    quota = max(1, math.ceil(_CANDIDATES * count / len(some)))
    chosen = _smallest(reader, some, half, columns, count, quota)
    if len(chosen) < count:
        chosen = _smallest(reader, manifest.files, half, columns, count, None)
    return chosen


def _smallest(
    reader: Reader, files: list[DataFile], half: Literal["choose", "report"], columns: Sequence[str], count: int, quota: int | None
) -> list[dict[str, Any]]:
    """The `count` rows of smallest hash among the first `quota` rows of the half in each file (None: among all)."""
    data = reader.data
    article = [data.article_column] if data.article_column is not None else []
    needed = list(dict.fromkeys([data.id_column, *article, *columns]))
    heap: list[tuple[int, int, dict[str, Any]]] = []
    seen = 0
    for file in files:
        left = quota
        for rows in reader.readable_samples(file, [half], needed):
            if left is not None:
                rows = rows.slice(0, left)
                left -= rows.num_rows
            numbers = np.arange(seen, seen + rows.num_rows)
            ids = names_of(rows, [data.id_column], file.name, numbers).to_pylist()
            articles = names_of(rows, [*article, data.id_column], file.name, numbers).to_pylist()
            for place, name in enumerate(ids):
                rank = -int.from_bytes(hashlib.blake2b(name, digest_size=8, key=reader.splitter.key).digest(), "little")
                if len(heap) < count or rank > heap[0][0]:
                    row = {
                        "id": _text(name),
                        "article": _text(articles[place]),
                        **{column: _cell(rows, column, place) for column in columns},
                    }
                    entry = (rank, -(seen + place), row)
                    if len(heap) < count:
                        heapq.heappush(heap, entry)
                    else:
                        heapq.heapreplace(heap, entry)
            seen += rows.num_rows
            if left == 0:
                break
    return [row for _, _, row in sorted(heap, key=lambda entry: entry[:2], reverse=True)]


def _text(value: bytes) -> str:
    return value.decode("utf-8", errors="replace")


def _cell(rows: pa.RecordBatch, column: str, place: int) -> Any:
    """A row's value; a text, even one that is not UTF-8, as str."""
    cell = rows.column(column).slice(place, 1)
    if pa.types.is_string(cell.type) or pa.types.is_large_string(cell.type) or pa.types.is_binary(cell.type):
        value = as_bytes(cell)[0].as_py()
        return None if value is None else _text(value)
    return cell[0].as_py()
