"""Train or validation: a keyed hash of the article decides, so neither the order nor the number of files does, and no article is in two."""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from model.config import DataConfig

Part = Literal["train", "choose", "report"]
"""What a sample is for: training, choosing among checkpoints, or reporting how good the chosen one is."""

PARTS: tuple[Part, ...] = ("train", "choose", "report")


class Splitter:
    """Says which part each row belongs to."""

    def __init__(self, data: DataConfig, seed: int) -> None:
        article = data.article_column if data.split_by == "article" else None
        self.columns = [data.id_column] if article is None else [article, data.id_column]
        """Columns that decide, the later ones where the earlier are null."""
        self.key = b"split" + seed.to_bytes(8, "little")
        self._train_below = round(data.train_ratio * 2**64)

    def part(self, name: bytes) -> Part:
        """The part of the article (or sample) called `name`."""
        value = hashlib.blake2b(name, digest_size=16, key=self.key).digest()
        if int.from_bytes(value[:8], "little") < self._train_below:
            return "train"
        return "choose" if value[8] & 1 else "report"

    def parts(self, rows: pa.RecordBatch, file: str, positions: np.ndarray) -> np.ndarray:
        """Index into `PARTS` for each of `rows`, uint8. A row without article and id is named by its file and position there."""
        names = names_of(rows, self.columns, file, positions).dictionary_encode()
        each = [PARTS.index(self.part(name)) for name in names.dictionary.to_pylist()]
        return np.array(each, dtype=np.uint8)[names.indices.to_numpy()]


def names_of(rows: pa.RecordBatch, columns: list[str], file: str, positions: np.ndarray) -> pa.LargeBinaryArray:
    """What each row is called: the first of `columns` that is not null, else its file and position.

    A column left out of `rows` counts as null.
    """
    cells = [as_bytes(rows.column(column)) for column in columns if column in rows.schema.names]
    names = pc.coalesce(*cells) if cells else pa.nulls(rows.num_rows, pa.large_binary())
    if names.null_count:
        unnamed = pa.array([f"{file}#{position}".encode() for position in positions], pa.large_binary())
        names = pc.coalesce(names, unnamed)
    return names


def as_bytes(column: pa.Array) -> pa.LargeBinaryArray:
    """A column's values as UTF-8 text, unchecked (a file may hold any bytes); numbers and dates are written out."""
    kind = column.type
    if pa.types.is_dictionary(kind) or not (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    ):
        column = column.cast(pa.string())
    return column.cast(pa.large_binary())
