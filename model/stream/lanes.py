"""Lanes: a fixed number of independent sub-streams, each with its own files, shuffle and packer.

What a lane yields is a function of (manifest, data config, seed, its number) alone; whoever owns it, and however often it was set aside
and taken up again, the windows are the same. All that is ever saved of it is the position of its next window's first token.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from model.config import DataConfig
from model.errors import UserError
from model.stream.manifest import DatasetManifest
from model.stream.packing import Packer, Position
from model.stream.reader import Reader, document
from model.stream.shuffle import Slice, epoch_blocks
from model.stream.source import changed


def plan_lanes(manifest: DatasetManifest, lanes: int) -> list[list[Slice]]:
    """Which training samples each lane owns.

    Whole files where there are at least as many files as lanes (each lane about as many samples as the next). Fewer files are one long row
    of samples, cut into `lanes` equal pieces.

    Raises:
        UserError: there are fewer training samples than lanes.
    """
    counts = [file.train_samples for file in manifest.files]
    total = sum(counts)
    if total < lanes:
        raise UserError(f"data.lanes: {lanes} lanes, but only {total} training samples; set data.lanes to at most {max(total, 1)}")
    files = [index for index, count in enumerate(counts) if count]
    if len(files) < lanes:
        return _cut(counts, lanes)
    plan: list[list[Slice]] = [[] for _ in range(lanes)]
    load = [0] * lanes
    for index in sorted(files, key=lambda index: -counts[index]):
        lane = load.index(min(load))
        plan[lane].append(Slice(index, 0, counts[index]))
        load[lane] += counts[index]
    return [sorted(slices, key=lambda part: part.file) for slices in plan]


def _cut(counts: list[int], lanes: int) -> list[list[Slice]]:
    total = sum(counts)
    plan: list[list[Slice]] = []
    for lane in range(lanes):
        begin, end = lane * total // lanes, (lane + 1) * total // lanes
        slices, before = [], 0
        for index, count in enumerate(counts):
            start, stop = max(begin - before, 0), min(end - before, count)
            if start < stop:
                slices.append(Slice(index, start, stop))
            before += count
        plan.append(slices)
    return plan


class Lane:
    """One sub-stream: windows, epoch after epoch."""

    def __init__(self, manifest: DatasetManifest, data: DataConfig, seed: int, number: int, slices: list[Slice], start: Position) -> None:
        self._manifest, self._seed, self._number, self._slices = manifest, seed, number, slices
        self._block_size = max(1, data.buffer_size // data.lanes)
        self._reader, self._columns = Reader(data, seed), data.text_columns
        self._packer = Packer(data.max_length)
        self._start = start
        self._epoch = start.epoch
        self._documents = self._read_epoch(start.epoch, start.sample, start.offset)

    @property
    def position(self) -> Position:
        """Where the next window's first token stands: a lane made with this as `start` goes on in the same way."""
        return self._packer.position or self._start

    def next_window(self, epoch: int) -> np.ndarray | None:
        """The next window, uint16 [max_length + 1], or None once the samples of all epochs up to `epoch` do not fill another one.

        What they leave over is the beginning of the next epoch's first window.
        """
        while (window := self._packer.window()) is None:
            found = next(self._documents, None)
            if found is not None:
                self._packer.add(*found)
            elif self._epoch < epoch:
                self._epoch += 1
                self._documents = self._read_epoch(self._epoch, 0, 0)
            else:
                return None
        return window

    def _read_epoch(self, epoch: int, first: int, offset: int) -> Iterator[tuple[Position, np.ndarray]]:
        """The lane's documents of an epoch from token `offset` of sample number `first` on."""
        texts = _FileTexts(self._reader, self._columns, self._manifest)
        try:
            for number, block in epoch_blocks(self._slices, self._block_size, self._seed, epoch, self._number, first):
                chunk = texts.read(block.file, block.start, len(block.order))
                skipped = max(0, first - number)
                for sample, place in enumerate(block.order[skipped:].tolist(), number + skipped):
                    tokens = document(chunk[place].as_py())
                    yield Position(epoch, sample, offset), tokens[offset:]
                    offset = 0
        finally:
            texts.close()


class _FileTexts:
    """Texts of one file after the other; within a file only forwards."""

    def __init__(self, reader: Reader, columns: list[str], manifest: DatasetManifest) -> None:
        self._reader, self._columns, self._manifest = reader, columns, manifest
        self._file = -1
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._next = 0
        """Number of the first training sample in `_rest`."""
        self._rest: pa.RecordBatch | None = None

    def read(self, file: int, start: int, length: int) -> pa.LargeBinaryArray:
        """Texts of the file's training samples `start` to `start + length - 1`."""
        if file != self._file:
            self.close()
            self._file, self._next, self._rest = file, 0, None
            self._batches = self._reader.samples(self._manifest.files[file], ["train"], self._columns)
        pieces = []
        while length:
            if self._rest is None or not self._rest.num_rows:
                self._rest = next(self._batches, None)
                if self._rest is None:
                    raise changed(self._manifest.files[file].name, f"{self._next:,} training samples, more were counted")
            skip = min(start - self._next, self._rest.num_rows)
            piece = self._rest.slice(skip, length)
            self._next += skip + piece.num_rows
            self._rest = self._rest.slice(skip + piece.num_rows)
            if piece.num_rows:
                pieces.append(self._reader.texts(piece))
                start += piece.num_rows
                length -= piece.num_rows
        return pa.concat_arrays(pieces)

    def close(self) -> None:
        """Close the open file."""
        if hasattr(self._batches, "close"):
            self._batches.close()
