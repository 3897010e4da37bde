"""Held-out samples, cut where scoring cuts them: question, reasoning, gold answer; and wrong answers beside the right one."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace

from model.config import DataConfig
from model.stream.validation import Half, HeldOutRow

DISTRACTORS = 3


@dataclass(frozen=True)
class Item:
    """One held-out sample. `given + answer + ending` is its text."""

    half: Half
    id: str
    article: str
    exercise: str
    question: str
    """The text up to and including the first column."""
    given: str
    """The text up to where the gold answer begins: question, reasoning, delimiters."""
    alone: str
    """The same with nothing for a reasoning, as the template puts it."""
    answer: str
    """The gold answer: the last column."""
    ending: str
    """What the template puts behind it."""
    distractors: tuple[str, ...]
    """Gold answers of other items of this half: of the same exercise, as far as there are enough, and all different."""

    @property
    def text(self) -> str:
        """The whole sample."""
        return self.given + self.answer + self.ending


class Template:
    """A `text_template` as evaluation sees it: the first column asks, the last answers, what lies between is reasoning.

    A template of one column has no question. There the first half of the value asks, to the white space nearest its middle, and the
    rest is the answer.
    """

    def __init__(self, text_template: str) -> None:
        literals, columns, literal = [], [], ""
        for more, column, _, _ in string.Formatter().parse(text_template):
            literal += more
            if column is not None:
                literals.append(literal)
                columns.append(column)
                literal = ""
        self.columns = columns
        """In the template's order; one that it names twice is here twice."""
        self.head, *self.between = literals
        """What stands before the first column, and before each of the others."""
        self.ending = literal
        """What stands behind the last column."""

    def prompt(self, value: str) -> str:
        """The text up to and including a first column of this value."""
        return self.head + value

    def item(self, row: HeldOutRow, half: Half) -> Item:
        """A row's item, without distractors."""
        values = [row.texts[column] for column in self.columns]
        if not self.between:
            cut = _middle(values[0])
            question, answer = self.prompt(values[0][:cut]), values[0][cut:]
            given = alone = question
        else:
            question, answer = self.prompt(values[0]), values[-1]
            *middle, last = self.between
            given = question + "".join(literal + value for literal, value in zip(middle, values[1:], strict=False)) + last
            alone = question + "".join(self.between)
        return Item(half, row.id, row.article, row.kind, question, given, alone, answer, self.ending, ())


def make_items(rows: Sequence[HeldOutRow], data: DataConfig, half: Half) -> list[Item]:
    """The items of a half's rows, in their order, each with `DISTRACTORS` distractors (fewer only where the half has no more answers that
    differ from it and each other, normalised)."""
    template = Template(data.text_template)
    items = [template.item(row, half) for row in rows]
    of_kind: dict[str, list[Item]] = {}
    for item in items:
        of_kind.setdefault(item.exercise, []).append(item)
    return [_with_distractors(item, of_kind[item.exercise], items) for item in items]


def _with_distractors(item: Item, kind: list[Item], all_items: list[Item]) -> Item:
    """Walks from a place that the item's id names by a hash, first through its kind, then through all."""
    start = int.from_bytes(hashlib.blake2b(item.id.encode(), digest_size=8).digest(), "little")
    found = {normalised(item.answer): item.answer}
    for candidates in (kind, all_items):
        for step in range(len(candidates)):
            if len(found) > DISTRACTORS:
                break
            answer = candidates[(start + step) % len(candidates)].answer
            found.setdefault(normalised(answer), answer)
    return replace(item, distractors=tuple(found.values())[1:])


def _middle(text: str) -> int:
    """Where the second half begins: at the white space nearest the middle, or at the middle where there is none."""
    half = len(text) // 2
    spaces = [i for i, character in enumerate(text) if character.isspace() and 0 < i < len(text) - 1]
    return min(spaces, key=lambda i: abs(i - half), default=half)


def normalised(text: str) -> str:
    """For comparing answers: case, runs of spaces and a final full stop do not count."""
    return " ".join(text.lower().split()).rstrip(".")
