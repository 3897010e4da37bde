"""Lanes: a fixed number of independent sub-streams, each with its own files, shuffle and packer.

What a lane yields is a function of (manifest, data config, seed, its number) alone; whoever owns it, and however often it was set aside
and taken up again, the windows are the same. All that is ever saved of it is the position of its next window's first token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from model.errors import UserError
from model.stream.manifest import DatasetManifest
from model.stream.packing import Documents, OddRows, Packer, Place, Position
from model.stream.reader import DOCUMENTS_AT_ONCE, Reader, Texts
from model.stream.row_packing import GROUP, Row, packed, rows_of
from model.stream.shuffle import Block, Slice, epoch_blocks
from model.stream.source import DamagedFile, changed
from model.stream.token_cache import LaneCache


def plan_lanes(manifest: DatasetManifest, lanes: int) -> list[list[Slice]]:
    """Which training samples each lane owns: whole files, largest first to the lightest lane, then levelled.

    A sample weighs what the footer says of its file (bytes of text a row). A lane that is too heavy gives the first samples of its
    lightest file away: to read the beginning of a file costs its new owner nothing more, and the old one skips it. So all lanes come to
    the end of an epoch at about the same time, however many files there are, and no rank waits for another.

    Raises:
        UserError: there are fewer training samples than lanes.
    """
    counts = [file.train_samples for file in manifest.files]
    total = sum(counts)
    if total < lanes:
        raise UserError(f"data.lanes: {lanes} lanes, but only {total} training samples; set data.lanes to at most {max(total, 1)}")
    weights = [max(1, 16 * file.text_bytes // max(1, file.rows)) for file in manifest.files]
    plan: list[list[Slice]] = [[] for _ in range(lanes)]
    loads = [0] * lanes
    for index in sorted(range(len(counts)), key=lambda index: -counts[index] * weights[index]):
        if counts[index]:
            lane = loads.index(min(loads))
            plan[lane].append(Slice(index, 0, counts[index]))
            loads[lane] += counts[index] * weights[index]
    _level(plan, loads, weights)
    for empty in (lane for lane in plan if not lane):
        _give(max(plan, key=lambda lane: sum(map(len, lane))), empty, 1)
    return [sorted(slices, key=lambda part: (part.file, part.start)) for slices in plan]


def _level(plan: list[list[Slice]], loads: list[int], weights: list[int]) -> None:
    """Move samples from lanes above the mean load to lanes below it, as far as whole samples go."""
    mean = sum(loads) // len(loads)
    takers = [lane for lane, load in enumerate(loads) if load < mean]
    for giver, load in enumerate(loads):
        while load > mean and takers:
            taker, last = takers[0], plan[giver][-1]
            weight = weights[last.file]
            count = min((load - mean) // weight, (mean - loads[taker]) // weight, len(last))
            if count:
                _give(plan[giver], plan[taker], count)
                load -= count * weight
                loads[taker] += count * weight
            elif mean - loads[taker] < weight:
                takers.pop(0)
            else:
                break


def _give(giver: list[Slice], taker: list[Slice], count: int) -> None:
    """Move the first `count` samples of the giver's last slice to the taker."""
    last = giver.pop()
    taker.append(Slice(last.file, last.start, last.start + count))
    if count < len(last):
        giver.append(Slice(last.file, last.start + count, last.stop))


class Lane:
    """One sub-stream: windows, epoch after epoch, without a pause between epochs.

    Args:
        reader: how samples become documents.
        manifest: the dataset's files.
        seed: decides the order.
        number: which lane it is.
        slices: the samples it owns.
        start: where its next window's first token stands.
        cache: the tokens of blocks that were read before, if they are kept.
        warn: is told of damaged files, where `data.quarantine` lets them pass.
    """

    def __init__(
        self,
        reader: Reader,
        manifest: DatasetManifest,
        seed: int,
        number: int,
        slices: list[Slice],
        start: Position,
        cache: LaneCache | None,
        warn: Callable[[str], None],
    ) -> None:
        self._reader, self._manifest, self._seed, self._number, self._slices = reader, manifest, seed, number, slices
        self._block_size = max(1, reader.data.buffer_size // reader.data.lanes)
        self._start, self._cache, self._warn = start, cache, warn
        self._odd = start.odd
        """Of the samples that were read."""

    def text_windows(self, num_epochs: int) -> Generator[tuple[np.ndarray, Place | Position], None, None]:
        """Windows, uint16 [max_length + 1], each with the place of the next one's first token, to the end of epoch `num_epochs - 1`.

        What the last epoch leaves over, less than a window, is left out: the last window comes with the end of the lane.

        Raises:
            UserError: a file is damaged or changed.
            Stopped: a source does not answer.
        """
        packer, skipped = Packer(self._reader.data.max_length), self._start.offset
        last: tuple[np.ndarray, Place] | None = None
        for documents in self._documents(num_epochs):
            packer.add(documents, skipped)
            skipped = 0
            while (found := packer.window()) is not None:
                if last is not None:
                    yield last
                last = found
        if last is not None:
            yield last[0], Position(num_epochs, 0, 0, self._odd)

    def row_windows(self, num_epochs: int, one_each: bool) -> Generator[tuple[np.ndarray, Place | Position], None, None]:
        """Windows of whole rows, uint16 [2, max_length], each with the position of the next one, to the end of epoch `num_epochs - 1`.

        The rows of a group are packed together, so the next window's position is its group's, and its number there. `one_each`: a window
        for each row.

        Raises:
            UserError: a file is damaged or changed.
            Stopped: a source does not answer.
        """
        done = self._start.offset
        last: np.ndarray | None = None
        for group in _groups(self._documents(num_epochs)):
            windows = packed(group.rows, self._reader.data.max_length, one_each)
            for number, window in enumerate(windows[done:], done):
                if last is not None:
                    yield last, group.position._replace(offset=number)
                last = window
            done = 0
        if last is not None:
            yield last, Position(num_epochs, 0, 0, self._odd)

    def _documents(self, num_epochs: int) -> Iterator[Documents]:
        """The lane's documents from the one that holds its start on."""
        first = self._start.sample
        for epoch in range(self._start.epoch, num_epochs):
            with contextlib.closing(_FileRows(self._reader, self._manifest)) as rows:
                for number, block in epoch_blocks(self._slices, self._block_size, self._seed, epoch, self._number, first):
                    skipped = max(0, first - number)
                    try:
                        found = self._block(block, skipped, rows)
                    except DamagedFile as fault:
                        if not self._reader.data.quarantine:
                            raise
                        rows.give_up(block, fault, self._warn)
                        self._odd = self._odd.plus(OddRows(lost=len(block.order) - skipped))
                        continue
                    sample = number + skipped
                    for documents in found:
                        yield replace(documents, first=Position(epoch, sample, 0, self._odd))
                        sample += len(documents)
                        self._odd = self._odd.plus(*documents.odd.values())
            first = 0

    def _block(self, block: Block, skipped: int, rows: _FileRows) -> Iterator[Documents]:
        """The documents of a block in their shuffled order, without the first `skipped`. Everything is read before this returns."""
        cached = self._cache.read(block) if self._cache is not None else None
        if cached is not None:
            return (cached.take(places) for places in _pieces(block.order[skipped:]))
        texts = rows.read(block.file, block.start, len(block.order)).take(block.order[skipped:])
        if self._cache is None or skipped:
            return texts.documents()
        return _kept(texts.documents(), block, self._cache)


def _pieces(places: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, len(places), DOCUMENTS_AT_ONCE):
        yield places[first : first + DOCUMENTS_AT_ONCE]


def _kept(found: Iterator[Documents], block: Block, cache: LaneCache) -> Iterator[Documents]:
    """The same documents, put into the cache when all of the block was asked for."""
    everything = []
    for documents in found:
        everything.append(documents)
        yield documents
    cache.write(block, everything)


class _Group(NamedTuple):
    """Rows that are packed together."""

    position: Position
    """Where the first of its samples stands."""
    rows: list[Row]


def _groups(found: Iterator[Documents]) -> Iterator[_Group]:
    """The rows of documents, group by group: samples of one epoch whose numbers, divided by `GROUP`, are the same whole number. What no
    window holds is left out."""
    group: _Group | None = None
    for documents in found:
        for number, row in enumerate(rows_of(documents)):
            key = documents.first.epoch, (documents.first.sample + number) // GROUP
            if group is None or (group.position.epoch, group.position.sample // GROUP) != key:
                if group is not None:
                    yield group
                group = _Group(documents.position(int(documents.starts[number])), [])
            if row is not None:
                group.rows.append(row)
    if group is not None:
        yield group


class _FileRows:
    """Training samples of one file after the other; within a file only forwards."""

    def __init__(self, reader: Reader, manifest: DatasetManifest) -> None:
        self._reader, self._manifest = reader, manifest
        self._columns = reader.data.text_columns
        self._file = -1
        self._batches: Generator[pa.RecordBatch, None, None] | None = None
        self._next = 0
        """Number of the first training sample in `_rest`."""
        self._rest: pa.RecordBatch | None = None
        self._given_up: dict[int, tuple[int, DamagedFile]] = {}
        """Files that are damaged, and from which training sample on."""

    def read(self, file: int, start: int, length: int) -> Texts:
        """The file's training samples `start` to `start + length - 1`.

        Raises:
            DamagedFile: they cannot be read.
        """
        if file in self._given_up:
            damaged_from, fault = self._given_up[file]
            if start >= damaged_from:
                raise fault
        if file != self._file or start < self._next:
            self.close()
            self._file, self._next, self._rest = file, 0, None
            self._batches = self._reader.samples(self._manifest.files[file], ["train"], self._columns)
        pieces = []
        while length:
            if self._rest is None or not self._rest.num_rows:
                assert self._batches is not None
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
        return Texts.joined(pieces)

    def give_up(self, block: Block, fault: DamagedFile, warn: Callable[[str], None]) -> None:
        """Read no more of a file from a block on in this epoch; say so once."""
        if block.file not in self._given_up:
            self._given_up[block.file] = block.start, fault
            self._file = -1
            warn(f"{fault}; its training samples from number {block.start:,} on are left out (data.quarantine)")

    def close(self) -> None:
        """Close the open file."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None
