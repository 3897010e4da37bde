"""The reader: samples of one part of one file, in the file's order, in bounded memory.

Policy for odd input: a null is an empty text; bytes that are not UTF-8 become U+FFFD; `<|endoftext|>` in a text is ordinary text, the
token of that name stands only between documents. No row is skipped.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from model.config import DataConfig
from model.errors import UserError
from model.stream.filter import Filter, parse_filter
from model.stream.manifest import DataFile
from model.stream.source import changed, named_faults, open_parquet
from model.stream.split import PARTS, Part, Splitter, as_bytes
from model.tokenizer import END_OF_TEXT, load_tokenizer

_BATCH_ROWS = 1000
"""Rows decoded at a time: a file's one row group is never in memory as a whole."""


class Reader:
    """Reads samples as one data config and seed define them."""

    def __init__(self, data: DataConfig, seed: int) -> None:
        self.data = data
        self.filter: Filter | None = parse_filter(data.filter) if data.filter is not None else None
        self.splitter = Splitter(data, seed)
        self._template = _pieces(data.text_template)

    def samples(self, file: DataFile, parts: Sequence[Part], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The file's samples that belong to one of `parts`, as batches of `columns` (a batch may be empty).

        Raises:
            UserError: the file is damaged, changed, or lacks a column; the message names it.
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

    def split(
        self, parquet: pq.ParquetFile, file: DataFile, columns: Sequence[str], limit: int
    ) -> Iterator[tuple[pa.RecordBatch, np.ndarray, np.ndarray]]:
        """The first `limit` samples by record batches: a batch, which of its rows are samples, and each one's part (index into `PARTS`)."""
        split_columns = self.split_columns(parquet)
        needed = list(dict.fromkeys([*(self.filter.columns if self.filter else ()), *split_columns, *columns]))
        if missing := [name for name in needed if name not in parquet.schema_arrow.names]:
            raise UserError(f"data.path: {file.name} has no column {missing[0]!r}; it has {', '.join(parquet.schema_arrow.names)}")
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

    def texts(self, rows: pa.RecordBatch) -> pa.LargeBinaryArray:
        """The text of each row by `data.text_template`, as UTF-8."""
        parts = []
        for literal, column in self._template:
            if literal:
                parts.append(pa.scalar(literal.encode(), pa.large_binary()))
            if column is not None:
                parts.append(pc.fill_null(as_bytes(rows.column(column)), b""))
        if len(parts) == 1:
            return parts[0]
        return pc.binary_join_element_wise(*parts, pa.scalar(b"", pa.large_binary()))

    def _record_batches(self, parquet: pq.ParquetFile, file: DataFile, columns: list[str]) -> Iterator[pa.RecordBatch]:
        batches = parquet.iter_batches(_BATCH_ROWS, columns=columns, use_threads=False)
        while True:
            with named_faults(file.name):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


def document(text: bytes) -> np.ndarray:
    """The tokens of a text followed by `<|endoftext|>`, uint16."""
    tokens = load_tokenizer().encode_to_numpy(text.decode("utf-8", errors="replace"), disallowed_special=())
    result = np.empty(len(tokens) + 1, dtype=np.uint16)
    result[:-1] = tokens
    result[-1] = END_OF_TEXT
    return result


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
