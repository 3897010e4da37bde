"""Questions answered greedily, graded without a judge."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from model.evaluation.items import Item, Template, normalised
from model.generation import generate
from model.gpt2 import GPT2
from model.tokenizer import END_OF_TEXT, decode, encode

CHECKABLE_WORDS = 8
"""A gold answer of one line and at most so many words is right or wrong; a longer one can be said in many ways."""


@dataclass(frozen=True)
class Graded:
    """What the network made of one question."""

    text: str
    """Everything it wrote."""
    answer: str | None
    """What stands after the answer's delimiter, to the next one; None without a delimiter."""
    well_formed: bool
    """Every delimiter of the template in its place and only there, an answer that is not empty, end of text reached."""
    exact_match: bool | None
    """The answer is the gold one, but for case, spaces and a final full stop; None: the gold answer is not `checkable`."""
    token_f1: float
    """0 to 1: the words that it shares with the gold answer (SQuAD's F1); 0 without an answer."""


def checkable(answer: str) -> bool:
    """Whether a gold answer is short enough to be compared as a whole: one line, not empty, `CHECKABLE_WORDS` words at most."""
    return len(answer.strip().splitlines()) == 1 and len(answer.split()) <= CHECKABLE_WORDS and bool(normalised(answer))


def token_f1(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall over words, without case, punctuation and English articles (Rajpurkar et al. 2016, SQuAD)."""
    ours, theirs = _words(answer), _words(gold)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs)) if ours and theirs else float(ours == theirs)


def _words(text: str) -> list[str]:
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def grade(item: Item, template: Template, text: str, ended: bool) -> Graded:
    """Judge what was written after the question; `ended` says whether it reached its end of text.

    Delimiters of white space alone (or nothing) occur in any text and are not asked for.
    """
    delimiters = [literal for literal in template.between if literal.strip()]
    ending = template.ending if template.ending.strip() else ""
    answer = _answer(text, delimiters, ending)
    return Graded(
        text=text,
        answer=answer,
        well_formed=ended and bool((answer or "").strip()) and _in_order(text, [*delimiters, *([ending] if ending else [])]),
        exact_match=answer is not None and normalised(answer) == normalised(item.answer) if checkable(item.answer) else None,
        token_f1=0.0 if answer is None else token_f1(answer, item.answer),
    )


def _in_order(text: str, delimiters: list[str]) -> bool:
    """Whether the delimiters come one after the other, the first of them at once, and each only as often as the template has it."""
    at = 0
    for number, delimiter in enumerate(delimiters):
        found = text.find(delimiter, at)
        if found < 0 or (number == 0 and text[:found].strip()):
            return False
        at = found + len(delimiter)
    return all(text.count(delimiter) == delimiters.count(delimiter) for delimiter in delimiters)


def _answer(text: str, delimiters: list[str], ending: str) -> str | None:
    """What follows the answer's delimiter, to its next occurrence, the template's ending, or the end."""
    if delimiters:
        last, place = delimiters[-1], delimiters.count(delimiters[-1])
        parts = text.split(last)
        if len(parts) <= place:
            return None
        text = parts[place]
    return text.partition(ending)[0] if ending else text


def ask(model: GPT2, prompts: Sequence[str], max_new_tokens: int, batch_size: int) -> list[tuple[str, bool]]:
    """What the network writes greedily after each prompt, and whether it reached its end of text; the order of the prompts stays.

    As in training, a text begins after the end of another. Spaces at a prompt's end are left to the network: with what follows they are
    other tokens than alone.
    """
    tokens = [[END_OF_TEXT, *encode(prompt.rstrip())] for prompt in prompts]
    written = []
    for row in generate(model, tokens, max_new_tokens, batch_size=batch_size):
        ended = row[-1] == END_OF_TEXT
        written.append((decode(row[:-1] if ended else row), ended))
    return written
