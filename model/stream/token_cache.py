"""The token cache: documents of blocks that were tokenized once, so that the next epoch, or the next experiment, reads them as they are.

Each lane has two files: `lane_003.tokens`, one record a block, and `lane_003.index`, one JSON line a record with its place, size and
SHA-256. A record is

    uint32 [documents]   tokens of each document
    uint16 [tokens]      the documents in the file's order, each with its end-of-text
    uint8  [documents]   what was odd about each: bits in the order of `OddRows`

and is read only if its digest is right: what a kill, a full disk or a flipped bit left behind is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import filelock
import numpy as np

from model import disk
from model.config import DataConfig
from model.digest import checked_line, digest_of, parse_checked
from model.stream.manifest import DatasetManifest
from model.stream.packing import Documents, OddRows
from model.stream.shuffle import Block

_FORMAT = 2
_DECIDING = {"filter", "text_template", "id_column", "article_column", "split_by", "train_ratio", "buffer_size", "lanes"}
"""The fields of the data config on which a block's documents depend."""

_ODDITIES = [OddRows(*((bits >> place) & 1 for place in range(3))) for bits in range(8)]


def cache_folder(parent: Path, manifest: DatasetManifest, data: DataConfig, seed: int) -> Path:
    """Where the tokens of these samples lie under `parent`; the same for every experiment that trains on the same ones."""
    return parent / digest_of([_FORMAT, manifest.digest, data.model_dump(mode="json", include=_DECIDING), seed])[:32]


def _seal(block: Block, data: bytes | memoryview) -> str:
    """SHA-256 over which block it is and its record: a record that the index names wrongly is not whole, either."""
    digest = hashlib.sha256(f"{block.file} {block.start} {len(block.order)}\n".encode())
    digest.update(data)
    return digest.hexdigest()


class LaneCache:
    """The blocks of one lane. One process writes them; a second one reads what there was when it began.

    Args:
        folder: from `cache_folder`.
        lane: the lane's number.
        warn: is told if the cache cannot be written; training goes on without it.
    """

    def __init__(self, folder: Path, lane: int, warn: Callable[[str], None]) -> None:
        self._tokens, self._index = (folder / f"lane_{lane:03d}.{kind}" for kind in ("tokens", "index"))
        self._warn = warn
        self._lock = filelock.FileLock(folder / f"lane_{lane:03d}.lock")
        self._file: io.FileIO | None = None
        self._records: dict[tuple[int, int], dict[str, int | str]] = {}
        self._end = 0
        """Where the last whole record ends."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(filelock.Timeout):
                self._lock.acquire(blocking=False)
            whole = self._read_index()
            if self._lock.is_locked:  # else another process is writing: what is there by half will be whole
                self._file = self._tokens.open("ab", buffering=0)
                if not whole:
                    warn(f"data.cache: {self._tokens.name} or {self._index.name} was cut short or damaged; what is not whole is made again")
                    self._file.truncate(self._end)
                    disk.write_file(self._index, b"".join(map(checked_line, self._records.values())))
        except OSError as error:
            self._stop_writing(error)

    def _read_index(self) -> bool:
        """Whether both files end where they should, with nothing in them that is not as it was written, as far as the index tells."""
        size = self._tokens.stat().st_size if self._tokens.exists() else 0
        whole = True
        for line in self._index.read_bytes().splitlines(keepends=True) if self._index.exists() else []:
            record = parse_checked(line)
            if record is None or record["offset"] + record["bytes"] > size:
                whole = False
                continue
            self._records[record["file"], record["start"]] = record
            self._end = max(self._end, record["offset"] + record["bytes"])
        return whole and size == self._end

    def read(self, block: Block) -> CachedBlock | None:
        """The documents of a block, or None if they are not here, or not as they were written."""
        record = self._records.get((block.file, block.start))
        if record is None or record.get("documents") != len(block.order):
            return None
        data = np.empty(0, np.uint8)
        with contextlib.suppress(OSError, ValueError):
            data = np.asarray(np.memmap(self._tokens, np.uint8, "r", int(record["offset"]), (int(record["bytes"]),)))
        if _seal(block, data.data) != record.get("sha256"):
            del self._records[block.file, block.start]
            self._warn(f"data.cache: a record of {self._tokens.name} ({self._index.name}) is not as it was written; it is made again")
            return None
        return CachedBlock(data, len(block.order))

    def write(self, block: Block, found: Sequence[Documents]) -> None:
        """Keep the documents of a block, given in its shuffled order."""
        if self._file is None:
            return
        documents = [piece.tokens[start:stop] for piece in found for start, stop in itertools.pairwise(piece.starts.tolist())]
        oddities = [_ODDITIES.index(piece.odd[number]) if number in piece.odd else 0 for piece in found for number in range(len(piece))]
        in_file_order = np.argsort(block.order).tolist()
        data = b"".join(
            [
                np.array([len(documents[number]) for number in in_file_order], dtype=np.uint32).tobytes(),
                *(documents[number].tobytes() for number in in_file_order),
                bytes(oddities[number] for number in in_file_order),
            ]
        )
        data += bytes(-len(data) % 4)  # so that the next record's numbers are aligned
        record: dict[str, int | str] = {
            "file": block.file,
            "start": block.start,
            "documents": len(documents),
            "offset": self._end,
            "bytes": len(data),
            "sha256": _seal(block, data),
        }
        try:
            disk.write(self._file, data)
            with self._index.open("ab", buffering=0) as index:
                disk.write(index, checked_line(record))
        except OSError as error:
            self._stop_writing(error)
            return
        self._end += len(data)
        self._records[block.file, block.start] = record

    def _stop_writing(self, error: OSError) -> None:
        self.close()
        self._warn(f"data.cache: {self._tokens.name} cannot be written ({error}); training goes on without it")

    def close(self) -> None:
        """Let go of the files."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
        self._lock.release()


class CachedBlock:
    """A record's documents, in the file's order."""

    def __init__(self, data: np.ndarray, count: int) -> None:
        self._lengths = data[: 4 * count].view(np.uint32).astype(np.int64)
        ends = np.cumsum(self._lengths)
        self._starts, self._ends = (ends - self._lengths).tolist(), ends.tolist()
        self._tokens = data[4 * count : 4 * count + 2 * int(ends[-1])].view(np.uint16)
        self._oddities = data[4 * count + 2 * int(ends[-1]) :]

    def take(self, places: np.ndarray) -> Documents:
        """The documents with these numbers, in this order."""
        tokens = np.concatenate([self._tokens[self._starts[place] : self._ends[place]] for place in places.tolist()])
        bits = self._oddities[places]
        odd = {int(number): _ODDITIES[bits[number]] for number in np.flatnonzero(bits)}
        return Documents(tokens, np.concatenate([[0], np.cumsum(self._lengths[places])]), odd)
