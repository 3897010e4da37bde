"""Held-out questions: the same for every checkpoint, answered greedily, graded without a judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from model.config import DataConfig
from model.digest import digest_of
from model.generation import generate
from model.gpt2 import GPT2
from model.tokenizer import END_OF_TEXT, decode, encode


@dataclass(frozen=True)
class Question:
    """One held-out row, cut where the network takes over."""

    id: str
    article: str
    exercise: str
    prompt: str
    """The text up to where the reasoning begins."""
    gold: str
    """What follows in the data: reasoning, delimiter, answer."""
    answer: str
    """The gold answer alone."""


@dataclass(frozen=True)
class Graded:
    """What the network made of one question."""

    text: str
    """Everything it wrote."""
    answer: str | None
    """What stands after the answer's delimiter; None without a delimiter."""
    well_formed: bool
    """The delimiter once, an answer that is not empty, end of text reached."""
    exact_match: bool
    """The answer is the gold one, but for case, spaces and a final full stop."""


def make_questions(rows: Sequence[dict[str, Any]], data: DataConfig, kind_column: str | None) -> list[Question]:
    """Questions from held-out rows, which have `id`, `article`, the template's columns and `kind_column`."""
    rest = data.text_template.removeprefix(data.prompt_template)
    questions = []
    for row in rows:
        fields = {column: row[column] or "" for column in data.text_columns}
        questions.append(
            Question(
                id=row["id"],
                article=row["article"],
                exercise=str(row[kind_column] or "") if kind_column else "",
                prompt=data.prompt_template.format(**fields),
                gold=rest.format(**fields),
                answer=fields[data.text_columns[-1]],
            )
        )
    return questions


def questions_digest(questions: Sequence[Question]) -> str:
    """Names the set: another question, another order or another text gives another digest."""
    return digest_of([asdict(question) for question in questions])


def normalised(text: str) -> str:
    """For comparing answers: case, runs of spaces and a final full stop do not count."""
    return " ".join(text.lower().split()).rstrip(".")


def grade(question: Question, text: str, ended: bool, delimiter: str) -> Graded:
    """Judge what was written after the prompt; `ended` says whether it reached its end of text."""
    parts = text.split(delimiter)
    found = parts[1] if len(parts) > 1 else None
    return Graded(
        text=text,
        answer=found,
        well_formed=len(parts) == 2 and bool(parts[1].strip()) and ended,
        exact_match=found is not None and bool(found.strip()) and normalised(found) == normalised(question.answer),
    )


def ask(model: GPT2, questions: Sequence[Question], delimiter: str, max_new_tokens: int, batch_size: int) -> list[Graded]:
    """Greedy answers, graded. Prompts of like length share a batch; the order of the questions stays."""
    prompts = [encode(question.prompt) for question in questions]
    by_length = sorted(range(len(questions)), key=lambda i: len(prompts[i]))
    graded: dict[int, Graded] = {}
    for start in range(0, len(by_length), batch_size):
        chosen = by_length[start : start + batch_size]
        for i, tokens in zip(chosen, generate(model, [prompts[i] for i in chosen], max_new_tokens), strict=True):
            ended = tokens[-1] == END_OF_TEXT
            graded[i] = grade(questions[i], decode(tokens[:-1] if ended else tokens), ended, delimiter)
    return [graded[i] for i in range(len(questions))]
