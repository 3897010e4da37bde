"""The reader: samples of one part of one file, in the file's order, in bounded memory.

Policy for odd input: a null is an empty text; bytes that are not UTF-8 become U+FFFD; `<|endoftext|>` in a text is ordinary text, the
token of that name stands only between documents; a text of any length is one document (while it is tokenized it is in memory about
twenty times). No row is skipped. `OddRows` counts them.
"""

from __future__ import annotations

import functools
import itertools
import string
from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from model.config import DataConfig
from model.errors import UserError
from model.stream.filter import Filter, parse_filter
from model.stream.manifest import DataFile
from model.stream.packing import Documents, OddRows
from model.stream.source import DamagedFile, changed, named_faults, open_parquet
from model.stream.split import PARTS, Part, Splitter, as_bytes
from model.tokenizer import END_OF_TEXT, END_OF_TEXT_NAME, encode_to_numpy, first_token_after

_BATCH_ROWS = 1000
"""Rows decoded at a time: a file's one row group is never in memory as a whole."""

DOCUMENTS_AT_ONCE = 32
"""Documents that are tokenized in one call."""
_END_OF_TEXT_NAMES = frozenset([END_OF_TEXT_NAME])


class Reader:
    """Reads samples as one data config and seed define them. `rows`: each is a question and its completion, for post-training."""

    def __init__(self, data: DataConfig, seed: int, rows: bool = False) -> None:
        self.data, self.rows = data, rows
        self.filter: Filter | None = parse_filter(data.filter) if data.filter is not None else None
        self.splitter = Splitter(data, seed)
        self._template = _pieces(data.text_template)

    def samples(self, file: DataFile, parts: Sequence[Part], columns: Sequence[str]) -> Generator[pa.RecordBatch, None, None]:
        """The file's samples that belong to one of `parts`, as batches of `columns` (a batch may be empty).

        Raises:
            DamagedFile: it cannot be decoded, or lacks a column; the message names it.
            UserError: it is gone or changed.
            Stopped: its source does not answer.
        """
        wanted = [PARTS.index(part) for part in parts]
        seen = 0
        with open_parquet(file) as parquet:
            if parquet.metadata.num_rows != file.rows:
                raise changed(file.name, f"{parquet.metadata.num_rows:,} rows instead of {file.rows:,}")
            for batch, rows, found in self.split(parquet, file, columns, file.samples):
                yield batch.select(columns).take(pa.array(rows[np.isin(found, wanted)]))
                seen += len(rows)
        if seen != file.samples:
            raise changed(file.name, f"{seen:,} rows pass the filter instead of {file.samples:,}")

    def readable_samples(self, file: DataFile, parts: Sequence[Part], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The same; with `data.quarantine` up to where the file is damaged."""
        try:
            yield from self.samples(file, parts, columns)
        except DamagedFile:
            if not self.data.quarantine:
                raise

    def split(
        self, parquet: pq.ParquetFile, file: DataFile, columns: Sequence[str], limit: int
    ) -> Iterator[tuple[pa.RecordBatch, np.ndarray, np.ndarray]]:
        """The first `limit` samples by record batches: a batch, which of its rows are samples, and each one's part (index into `PARTS`)."""
        split_columns = self.split_columns(parquet)
        needed = list(dict.fromkeys([*(self.filter.columns if self.filter else ()), *split_columns, *columns]))
        if missing := [name for name in needed if name not in parquet.schema_arrow.names]:
            raise DamagedFile(f"data.path: {file.name} has no column {missing[0]!r}; it has {', '.join(parquet.schema_arrow.names)}")
        first_row = 0
        for batch in self._record_batches(parquet, file, needed):
            rows = np.arange(batch.num_rows) if self.filter is None else self.filter.passing(batch)
            rows = rows[:limit]
            named = batch.select(split_columns).take(pa.array(rows))
            yield batch, rows, self.splitter.parts(named, file.name, first_row + rows)
            first_row += batch.num_rows
            limit -= len(rows)
            if not limit:
                return

    def split_columns(self, parquet: pq.ParquetFile) -> list[str]:
        """The columns that decide a row's part in this file: the id only if the footer does not rule out rows without an article."""
        first = self.splitter.columns[0]
        return [first] if _never_null(parquet, first) else self.splitter.columns

    def texts(self, rows: pa.RecordBatch) -> Texts:
        """The text of each row by `data.text_template`."""
        parts, lengths = [], []
        for literal, column in self._template:
            if literal:
                parts.append(_constant(literal))
            if column is not None:
                cells = pc.fill_null(as_bytes(rows.column(column)), b"")
                lengths.append(pc.binary_length(cells).to_numpy(zero_copy_only=False))
                parts.append(cells)
        empty = np.logical_or.reduce([length == 0 for length in lengths])
        joined = pc.binary_join_element_wise(*parts, _constant(END_OF_TEXT_NAME), _constant(""))
        _, offsets, data = joined.buffers()
        ends = np.frombuffer(offsets, np.int64, len(joined) + 1, 8 * joined.offset)
        spans = np.stack([np.zeros(len(joined), np.int64), ends[:-1], ends[1:]], axis=1)
        return Texts([memoryview(data if data is not None else b"")], spans, empty, self._parts(spans, lengths) if self.rows else None)

    def _parts(self, spans: np.ndarray, lengths: list[np.ndarray]) -> Parts:
        """Where the questions end and the answers lie in texts."""
        head = len(self._template[0][0].encode())
        behind = sum(len(literal.encode()) for literal, column in self._template if column is None) + len(END_OF_TEXT_NAME)
        ends = spans[:, 2] - spans[:, 1] - behind
        return Parts(self.data.max_length, np.stack([np.full_like(ends, head), head + lengths[0], ends - lengths[-1], ends], axis=1))

    def _record_batches(self, parquet: pq.ParquetFile, file: DataFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
        batches = parquet.iter_batches(_BATCH_ROWS, columns=columns, use_threads=False)
        while True:
            with named_faults(file.name):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


class Parts(NamedTuple):
    """What is where in texts that are questions with their completions."""

    max_length: int
    """Tokens that a document may have, to fit a window."""
    bytes: np.ndarray
    """int64 [texts, 4]: where each one's question begins and ends, and where its answer does, counted from the text's first byte."""


class Texts:
    """Texts of some rows. They are not copied from where Arrow put them: numbers move, bytes stay.

    Args:
        buffers: UTF-8, texts back to back, each with `<|endoftext|>` behind it.
        spans: int64 [texts, 3]: each one's buffer, and its first byte and the one after its last there.
        empty: bool [texts]: which of them miss a field.
        parts: what is where in each; None where nobody asked.
    """

    def __init__(self, buffers: list[memoryview], spans: np.ndarray, empty: np.ndarray, parts: Parts | None = None) -> None:
        self._buffers, self._spans, self._empty, self._parts = buffers, spans, empty, parts

    @classmethod
    def joined(cls, parts: Sequence[Texts]) -> Texts:
        """The texts of all parts."""
        buffers = [buffer for part in parts for buffer in part._buffers]
        firsts = itertools.accumulate([len(part._buffers) for part in parts], initial=0)
        spans = [part._spans + np.array([first, 0, 0]) for part, first in zip(parts, firsts, strict=False)]
        found = [part._parts for part in parts if part._parts is not None]
        joined = found[0]._replace(bytes=np.concatenate([each.bytes for each in found])) if found else None
        return cls(buffers, np.concatenate(spans), np.concatenate([part._empty for part in parts]), joined)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, row: int) -> bytes:
        buffer, start, stop = self._spans[row].tolist()
        return bytes(self._buffers[buffer][start : stop - len(END_OF_TEXT_NAME)])

    def take(self, rows: np.ndarray) -> Texts:
        """The texts of these rows, in this order."""
        parts = self._parts and self._parts._replace(bytes=self._parts.bytes[rows])
        return Texts(self._buffers, self._spans[rows], self._empty[rows], parts)

    def documents(self) -> Iterator[Documents]:
        """All documents, `DOCUMENTS_AT_ONCE` at a time, tokenized when they are asked for."""
        for first in range(0, len(self), DOCUMENTS_AT_ONCE):
            yield self._tokenized(first, min(first + DOCUMENTS_AT_ONCE, len(self)))

    def _tokenized(self, first: int, stop: int) -> Documents:
        """The documents of rows `first` to `stop - 1`, in one call: the special token between them keeps them apart."""
        if self._parts is not None:
            return self._one_by_one(first, stop)
        try:
            spans = self._spans[first:stop].tolist()
            text = b"".join([self._buffers[buffer][start:end] for buffer, start, end in spans]).decode("utf-8")
        except UnicodeDecodeError:
            return self._one_by_one(first, stop)
        tokens = encode_to_numpy(text, _END_OF_TEXT_NAMES).astype(np.uint16)
        ends = np.flatnonzero(tokens == END_OF_TEXT) + 1
        if len(ends) != stop - first:  # a text spells the special token out
            return self._one_by_one(first, stop)
        odd = {number: OddRows(empty_field=1) for number in np.flatnonzero(self._empty[first:stop]).tolist()}
        return Documents(tokens, np.concatenate([[0], ends]), odd)

    def _one_by_one(self, first: int, stop: int) -> Documents:
        found, odd, completions = [], {}, []
        for row in range(first, stop):
            raw, not_utf8 = self[row], False
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError:
                text, not_utf8 = raw.decode("utf-8", errors="replace"), True
            tokens = document(text)
            found.append(tokens)
            oddity = OddRows(int(self._empty[row]), int(not_utf8), int(END_OF_TEXT_NAME in text))
            if self._parts is not None:
                question, asked, answer, answered = self._parts.bytes[row].tolist()
                completions.append(first_token_after(tokens[:-1], _readable(raw[:asked])))
                whole = all(_readable(part).strip() for part in (raw[question:asked], raw[answer:answered]))
                oddity = oddity._replace(unanswered=int(not whole), too_long=int(whole and len(tokens) > self._parts.max_length))
            if any(oddity):
                odd[row - first] = oddity
        starts = np.cumsum([0, *map(len, found)])
        return Documents(np.concatenate(found), starts, odd, np.array(completions, np.int64) if self._parts is not None else None)


def _readable(raw: bytes) -> str:
    return raw.decode("utf-8", errors="replace")


def document(text: str) -> np.ndarray:
    """The tokens of a text followed by `<|endoftext|>`, uint16."""
    return np.append(encode_to_numpy(text), END_OF_TEXT).astype(np.uint16)


def _constant(text: str) -> pa.LargeBinaryScalar:
    return pa.scalar(text.encode(), pa.large_binary())


@functools.cache
def _pieces(template: str) -> list[tuple[str, str | None]]:
    """The template as literal text and the column that follows it."""
    pieces = []
    for literal, column, spec, conversion in string.Formatter().parse(template):
        if spec or conversion:
            raise UserError(f"data.text_template: write {{{column}}} without ! and : after the column's name")
        pieces.append((literal, column))
    return pieces


def _never_null(parquet: pq.ParquetFile, column: str) -> bool:
    """Whether the footer's statistics say that every row has a value."""
    metadata = parquet.metadata
    index = next((i for i in range(metadata.num_columns) if metadata.schema.column(i).path == column), None)
    if index is None:
        return False
    for group in range(metadata.num_row_groups):
        statistics = metadata.row_group(group).column(index).statistics
        if statistics is None or not statistics.has_null_count or statistics.null_count:
            return False
    return True
