"""Resolving: from `data.path` to the files that hold the samples, each counted. build-config does it; training follows the manifest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from model.config import DataConfig
from model.errors import UserError
from model.stream.locate import locate
from model.stream.manifest import DataFile, DatasetManifest
from model.stream.packing import Documents
from model.stream.reader import Reader
from model.stream.row_packing import packed, rows_of
from model.stream.source import DamagedFile, open_parquet
from model.stream.split import PARTS, as_bytes

_SAMPLED_FILES, _SAMPLED_TEXTS = 8, 128
"""The mean number of tokens is taken over the first texts of some files."""
_DOES_NOT_FIT = (pa.ArrowNotImplementedError, pa.ArrowInvalid, pa.ArrowTypeError)


def resolve(data: DataConfig, seed: int, storage: Path) -> DatasetManifest:
    """Find the files of `data.path`, open as many of them, in order, as `num_samples` needs, and count.

    `quickstart` is the generated corpus, made in `storage` if it is not there. Only the columns that the filter and the split look at are
    read, in bounded memory. If there are fewer samples than `num_samples`, the manifest has all there are and says how many.

    Raises:
        UserError: nothing there, nothing passes, a column is missing or of the wrong type, or the Hub cannot be reached.
        Stopped: a URL does not answer.
    """
    reader = Reader(data, seed)
    revision, found = locate(data, storage)
    files, left_out = [], []
    left = data.num_samples
    for file in found:
        try:
            counted = _count(reader, file, left)
        except DamagedFile as fault:
            if not data.quarantine:
                raise
            left_out.append(str(fault))
            continue
        if counted.samples:
            files.append(counted)
        if left is not None:
            left -= counted.samples
            if not left:
                break
    if not files and left_out:
        raise UserError(left_out[0])
    if not files:
        what = "holds no rows" if data.filter is None else f"has no row that passes data.filter: {data.filter}"
        raise UserError(f"data.path: {data.path} {what}")
    return DatasetManifest(data.path, revision, files, _tokens_per_sample(reader, files), left_out)


def _count(reader: Reader, file: DataFile, limit: int | None) -> DataFile:
    """The file with its rows, its samples (at most `limit`) and its training samples counted."""
    samples = train = 0
    with open_parquet(file) as parquet:
        _check_columns(reader, file, parquet)
        rows = parquet.metadata.num_rows
        text_bytes = _text_bytes(parquet, reader.data.text_columns)
        for _, _, parts in reader.split(parquet, file, [], rows if limit is None else limit):
            samples += len(parts)
            train += int(np.count_nonzero(parts == PARTS.index("train")))
    return replace(file, rows=rows, samples=samples, train_samples=train, text_bytes=text_bytes)


def _text_bytes(parquet: pq.ParquetFile, columns: Sequence[str]) -> int:
    """Uncompressed bytes of the columns, by the footer."""
    groups = [parquet.metadata.row_group(number) for number in range(parquet.metadata.num_row_groups)]
    chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns)


def _check_columns(reader: Reader, file: DataFile, parquet: pq.ParquetFile) -> None:
    """Every column that the config names is there, and of a type that works."""
    data, schema = reader.data, parquet.schema_arrow
    texts = [("data.text_template", name) for name in data.text_columns] + [("data.id_column", data.id_column)]
    if data.article_column is not None:
        texts.append(("data.article_column", data.article_column))
    filtered = [("data.filter", name) for name in sorted(reader.filter.columns)] if reader.filter else []
    for field, name in filtered + texts:
        if name not in schema.names:
            raise DamagedFile(f"{field}: {file.name} has no column {name!r}; it has {', '.join(schema.names)}")
    for field, name in texts:
        try:
            as_bytes(pa.nulls(0, schema.field(name).type))
        except _DOES_NOT_FIT:
            raise DamagedFile(f"{field}: column {name!r} of {file.name} is {schema.field(name).type}, not text") from None
    if reader.filter is not None:
        try:
            reader.filter.passing(pa.RecordBatch.from_arrays([pa.nulls(0, field.type) for field in schema], schema=schema))
        except _DOES_NOT_FIT as error:
            raise DamagedFile(f"data.filter: {reader.filter.text} does not fit the types of the columns of {file.name} ({error})") from None


def _tokens_per_sample(reader: Reader, files: list[DataFile]) -> float:
    lengths = [length for documents in _first_documents(reader, files) for length in np.diff(documents.starts).tolist()]
    if not lengths:
        raise UserError(f"data.path: no text of {files[0].name} and others can be read; fetch them again")
    return round(sum(lengths) / len(lengths), 2)


def tokens_per_row(data: DataConfig, seed: int, manifest: DatasetManifest, one_each: bool) -> float:
    """Tokens that a training sample takes of windows of rows: the mean over the first samples of some files, of which those that
    no window holds take nothing. `one_each`: one a window.

    Raises:
        UserError: not one of them has an answer and fits a window.
    """
    rows = [row for documents in _first_documents(Reader(data, seed, rows=True), manifest.files) for row in rows_of(documents)]
    kept = [row for row in rows if row is not None]
    if not kept:
        raise UserError(
            f"data.max_length: of the first {len(rows):,} samples none has an answer and fits {data.max_length} tokens; raise it, or look "
            "at data.text_template: its first column asks, its last one answers"
        )
    return round(len(packed(kept, data.max_length, one_each)) * data.max_length / len(rows), 2)


def _first_documents(reader: Reader, files: Sequence[DataFile]) -> Iterator[Documents]:
    """The first texts of some of the files."""
    step = -(-len(files) // _SAMPLED_FILES)
    for file in files[::step]:
        left = _SAMPLED_TEXTS
        for rows in reader.readable_samples(file, PARTS, reader.data.text_columns):
            texts = reader.texts(rows.slice(0, left))
            yield from texts.documents()
            left -= len(texts)
            if not left:
                break
