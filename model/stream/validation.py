"""Held-out data: windows to measure the loss on, and rows to score checkpoints on."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from model import disk
from model.config import DataConfig
from model.digest import digest_of
from model.errors import UserError
from model.run_config import Windows
from model.stream.manifest import DatasetManifest
from model.stream.packing import Documents, Packer
from model.stream.reader import Reader
from model.stream.row_packing import GROUP, packed, rows_of
from model.stream.split import as_bytes, names_of

Half = Literal["choose", "report"]

_CACHE_FORMAT = 2
_CANDIDATES = 16
"""Held-out rows are chosen among so many times as many, …"""
_FILES = 16
"""… taken from the beginnings of so many files."""


def validation_windows(manifest: DatasetManifest, data: DataConfig, seed: int, count: int, kind: Windows = "text") -> np.ndarray:
    """The first `count` windows of the validation half for choosing, in the dataset's order: uint16 [<= count, max_length + 1], or of rows
    [<= count, 2, max_length].

    Raises:
        UserError: that half does not fill one window.
    """
    found = _text_windows if kind == "text" else functools.partial(_row_windows, one_each=kind == "row")
    windows = list(itertools.islice(found(manifest, Reader(data, seed, rows=kind != "text")), count))
    if not windows:
        fill = f"fill one window of {data.max_length + 1} tokens"
        fill = fill if kind == "text" else f"hold a sample with an answer that fits {data.max_length} tokens (data.max_length)"
        raise UserError(f"data.train_ratio: what is left for validation does not {fill}; lower data.train_ratio, or use more samples")
    return np.stack(windows)


def _documents(manifest: DatasetManifest, reader: Reader) -> Iterator[Documents]:
    for file in manifest.files:
        for rows in reader.readable_samples(file, ["choose"], reader.data.text_columns):
            yield from reader.texts(rows).documents()


def _text_windows(manifest: DatasetManifest, reader: Reader) -> Iterator[np.ndarray]:
    packer = Packer(reader.data.max_length)
    for documents in _documents(manifest, reader):
        packer.add(documents)
        while (found := packer.window()) is not None:
            yield found[0]


def _row_windows(manifest: DatasetManifest, reader: Reader, one_each: bool) -> Iterator[np.ndarray]:
    rows = (row for documents in _documents(manifest, reader) for row in rows_of(documents) if row is not None)
    while group := list(itertools.islice(rows, GROUP)):
        yield from packed(group, reader.data.max_length, one_each)


def cached_validation_windows(
    path: Path,
    manifest: DatasetManifest,
    data: DataConfig,
    seed: int,
    count: int,
    warn: Callable[[str], None] = lambda message: None,
    kind: Windows = "text",
) -> np.ndarray:
    """`validation_windows`, read from `path` if they lie there whole and are these, else written there. `warn` is told of damage."""
    deciding = [_CACHE_FORMAT, manifest.digest, data.model_dump(mode="json", exclude={"path", "revision", "cache"}), seed, count]
    key = digest_of(deciding if kind == "text" else [*deciding, kind])
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
    windows = validation_windows(manifest, data, seed, count, kind)
    with contextlib.suppress(OSError):  # they are made again next time
        disk.write_file(path, save({"windows": windows}, {"key": key, "sha256": _seal(key, windows)}))
    return windows


def _seal(key: str, windows: np.ndarray) -> str:
    return hashlib.sha256(key.encode() + windows.tobytes()).hexdigest()


@dataclass(frozen=True)
class HeldOutRow:
    """A sample that no training sees."""

    id: str
    article: str
    """The article it was made from; its own id if it has none."""
    kind: str
    """The value of the column that strata go by; empty where that is null, or there is no such column."""
    texts: dict[str, str]
    """The template's columns, as the reader puts them into a text: a null is empty, bytes that are not UTF-8 are replaced."""


class _Candidate(NamedTuple):
    """A row that may be chosen: all that deciding takes, without its texts."""

    rank: bytes
    """Keyed hash of its id."""
    file: int
    place: int
    """Its number among the half's rows of the file."""
    id: str
    article: str
    kind: str


def held_out_rows(
    manifest: DatasetManifest, data: DataConfig, seed: int, count: int, half: Half, kind_column: str | None = None
) -> list[HeldOutRow]:
    """`count` rows of a validation half (all of it if it is smaller): a function of the samples and the split alone.

    Strata: each value of `kind_column` has its proportional share, and one row at least, so the mean over the rows estimates the mean over
    the dataset and no kind is missing. (Equal shares would let a kind that hardly occurs weigh as much as the commonest.) Beyond `count`
    kinds the commonest are taken. Within a stratum the order is that of a keyed hash of the ids, rows of articles not chosen yet first: a
    second row of an article tells less than the first of another. The order of all mixes the strata, so that the first n rows have the
    strata's shares, too.

    No article is in two halves or in training if `data.split_by` is `article`; with `sample` that holds for rows alone, and rows of one
    article may be in both halves and in training.

    Reading is bounded: candidates come from the beginnings of several files, and texts are read of the chosen alone. Only where those
    beginnings hold fewer than `count` rows, all files are read.

    Raises:
        UserError, Stopped: as `Reader.samples`.
    """
    reader = Reader(data, seed)
    step = max(1, len(manifest.files) // _FILES)
    some = range(0, len(manifest.files), step)
    found = _candidates(reader, manifest, some, half, kind_column, max(1, math.ceil(_CANDIDATES * count / max(1, len(some)))))
    if len(found) < count:
        found = _candidates(reader, manifest, range(len(manifest.files)), half, kind_column, None)
    chosen = _chosen(found, count)
    texts = _texts(reader, manifest, half, chosen)
    return [
        HeldOutRow(row.id, row.article, row.kind, texts[row.file, row.place]) for row in chosen if (row.file, row.place) in texts
    ]  # under data.quarantine a file's texts may end before its ids do


def _candidates(
    reader: Reader, manifest: DatasetManifest, files: range, half: Half, kind_column: str | None, quota: int | None
) -> list[_Candidate]:
    """The first `quota` rows of the half in each of `files` (None: all)."""
    data = reader.data
    article = [data.article_column] if data.article_column is not None else []
    kind = [kind_column] if kind_column is not None else []
    needed = list(dict.fromkeys([data.id_column, *article, *kind]))
    found: list[_Candidate] = []
    for number in files:
        file, seen = manifest.files[number], 0
        for rows in reader.readable_samples(file, [half], needed):
            rows = rows if quota is None else rows.slice(0, quota - seen)
            places = np.arange(seen, seen + rows.num_rows)
            ids = names_of(rows, [data.id_column], f"{file.name}#{half}", places).to_pylist()
            articles = names_of(rows, [*article, data.id_column], f"{file.name}#{half}", places).to_pylist()
            kinds = as_bytes(rows.column(kind_column)).to_pylist() if kind_column is not None else [None] * len(ids)
            for place, name, of, sort in zip(places.tolist(), ids, articles, kinds, strict=True):
                rank = hashlib.blake2b(name, digest_size=8, key=reader.splitter.key).digest()
                found.append(_Candidate(rank, number, place, _text(name), _text(of), _text(sort or b"")))
            seen += rows.num_rows
            if seen == quota:
                break
    return found


def _chosen(candidates: list[_Candidate], count: int) -> list[_Candidate]:
    """`count` of the candidates (all, if there are fewer), as `held_out_rows` says."""
    strata: dict[str, list[_Candidate]] = {}
    for candidate in sorted(candidates):
        strata.setdefault(candidate.kind, []).append(candidate)
    shares = _shares({kind: len(rows) for kind, rows in strata.items()}, count)
    used: Counter[str] = Counter()
    placed: list[tuple[float, _Candidate]] = []
    for kind in sorted(
        shares, key=lambda kind: (len(strata[kind]), kind)
    ):  # the rarest first: they have the fewest articles to choose among
        before, rounds = used.copy(), []
        for candidate in strata[kind]:
            rounds.append((before[candidate.article], candidate))
            before[candidate.article] += 1
        taken = [candidate for _, candidate in sorted(rounds)[: shares[kind]]]
        used.update(candidate.article for candidate in taken)
        placed += [((number + 0.5) / len(taken), candidate) for number, candidate in enumerate(taken)]
    return [candidate for _, candidate in sorted(placed)]


def _shares(sizes: dict[str, int], count: int) -> dict[str, int]:
    """How many rows each stratum gives: proportional (largest remainders), and one at least; no more than it has."""
    count = min(count, sum(sizes.values()))
    sizes = dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:count])
    exact = {kind: size * count / sum(sizes.values()) for kind, size in sizes.items()}
    shares = {kind: max(1, math.floor(share)) for kind, share in exact.items()}
    for kind in sorted(sizes, key=lambda kind: shares[kind] - exact[kind])[: max(0, count - sum(shares.values()))]:
        shares[kind] += 1
    while sum(shares.values()) > count:
        shares[max((kind for kind in sizes if shares[kind] > 1), key=lambda kind: shares[kind] - exact[kind])] -= 1
    return shares


def _texts(reader: Reader, manifest: DatasetManifest, half: Half, chosen: list[_Candidate]) -> dict[tuple[int, int], dict[str, str]]:
    """The template's columns of the chosen rows, by file and place."""
    columns, texts = reader.data.text_columns, {}
    for number in sorted({row.file for row in chosen}):
        wanted, seen = sorted(row.place for row in chosen if row.file == number), 0
        for rows in reader.readable_samples(manifest.files[number], [half], columns):
            here = [place for place in wanted if seen <= place < seen + rows.num_rows]
            cells = {
                column: as_bytes(rows.column(column).take(pa.array([place - seen for place in here], pa.int64()))).to_pylist()
                for column in columns
            }
            for i, place in enumerate(here):
                texts[number, place] = {column: _text(cells[column][i] or b"") for column in columns}
            seen += rows.num_rows
            if seen > wanted[-1]:
                break
    return texts


def _text(value: bytes) -> str:
    return value.decode("utf-8", errors="replace")
