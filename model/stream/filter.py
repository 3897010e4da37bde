"""The filter: which rows are samples. A few comparisons in Python's words, never run as Python.

    language == 'en'
    language in ('en', 'fr') and words > 50
    not (exercise == 'memorization' or synthetic_reasoning == None)

A name is a column, the other side a constant: text, a number, True, False or None. A row without a value (null) equals only None;
it is different from everything else and neither larger nor smaller than anything.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from model.errors import UserError

Mask = Callable[[pa.RecordBatch], pa.BooleanArray]
"""Which rows of a batch pass; never null."""

MAX_CHARACTERS = 1000
"""Of a filter; far below what Python's parser and stack stand."""
_EXAMPLE = "write for example language == 'en' and words > 50"
_ORDER = {ast.Lt: pc.less, ast.LtE: pc.less_equal, ast.Gt: pc.greater, ast.GtE: pc.greater_equal}


@dataclass(frozen=True)
class Filter:
    """A parsed filter."""

    text: str
    columns: frozenset[str]
    """The columns it looks at."""
    mask: Mask

    def passing(self, batch: pa.RecordBatch) -> np.ndarray:
        """Positions of the rows that are samples, ascending, int64."""
        return np.flatnonzero(self.mask(batch).to_numpy(zero_copy_only=False))


def parse_filter(text: str) -> Filter:
    """Parse a filter.

    Raises:
        UserError: not such an expression; the message starts with `data.filter`.
    """
    if len(text) > MAX_CHARACTERS:
        raise _refused(f"longer than {MAX_CHARACTERS:,} characters")
    columns: set[str] = set()
    try:
        mask = _compile(ast.parse(text.strip(), mode="eval").body, columns)
    except UserError:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _refused(f"{text!r} cannot be read") from None
    return Filter(text, frozenset(columns), mask)


def _refused(what: str) -> UserError:
    return UserError(f"data.filter: {what}; {_EXAMPLE}")


def _compile(node: ast.expr, columns: set[str]) -> Mask:
    match node:
        case ast.BoolOp(op=op, values=values):
            masks = [_compile(value, columns) for value in values]
            join = pc.and_ if isinstance(op, ast.And) else pc.or_

            def joined(batch: pa.RecordBatch) -> pa.BooleanArray:
                result = masks[0](batch)
                for mask in masks[1:]:
                    result = join(result, mask(batch))
                return result

            return joined
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            inner = _compile(operand, columns)
            return lambda batch: pc.invert(inner(batch))
        case ast.Compare(left=ast.Name(id=column), ops=[op], comparators=[right]):
            columns.add(column)
            return _comparison(column, op, right)
        case ast.Compare(ops=[_, _, *_]):
            raise _refused(f"{ast.unparse(node)!r} compares twice; join two comparisons with and")
        case ast.Compare():
            raise _refused(f"{ast.unparse(node)!r} does not start with a column's name")
    raise _refused(f"{ast.unparse(node)!r} is not a comparison")


def _comparison(column: str, op: ast.cmpop, right: ast.expr) -> Mask:
    match op:
        case ast.Eq() | ast.NotEq() | ast.Is() | ast.IsNot():
            wanted = [_constant(right)]
            if isinstance(op, ast.Is | ast.IsNot) and wanted != [None]:
                raise _refused(f"'is' goes with None only; write {column} == {ast.unparse(right)}")
        case ast.In() | ast.NotIn():
            if not isinstance(right, ast.List | ast.Tuple | ast.Set) or not right.elts:
                raise _refused(f"{column} in … needs a list such as ('en', 'fr')")
            wanted = [_constant(element) for element in right.elts]
        case _:
            return _ordering(column, op, right)
    values, null = [value for value in wanted if value is not None], None in wanted

    def equal(batch: pa.RecordBatch) -> pa.BooleanArray:
        cells = batch.column(column)
        result = pc.is_null(cells) if null else None
        for value in values:
            same = pc.fill_null(pc.equal(cells, pa.scalar(value)), False)
            result = same if result is None else pc.or_(result, same)
        return result

    if isinstance(op, ast.NotEq | ast.NotIn | ast.IsNot):
        return lambda batch: pc.invert(equal(batch))
    return equal


def _ordering(column: str, op: ast.cmpop, right: ast.expr) -> Mask:
    compare, value = _ORDER[type(op)], _constant(right)
    if value is None:
        raise _refused("nothing is larger or smaller than None")
    return lambda batch: pc.fill_null(compare(batch.column(column), pa.scalar(value)), False)


def _constant(node: ast.expr) -> str | int | float | bool | None:
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        value = ...
    if value is not None and not isinstance(value, str | int | float | bool):
        raise _refused(f"{ast.unparse(node)!r} is not a text, a number, True, False or None")
    return value
