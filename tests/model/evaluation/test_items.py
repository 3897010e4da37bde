"""Held-out samples as items."""

import pytest

from model.config import DataConfig
from model.evaluation.items import Template, make_items, normalised
from model.stream.validation import HeldOutRow

DATA = DataConfig(path="x")


def row(number, answer="4", kind="sum", query="2 + 2?", reasoning="two and two"):
    texts = {"query": query, "synthetic_reasoning": reasoning, "synthetic_answer": answer}
    return HeldOutRow(str(number), f"article {number}", kind, texts)


def test_a_row_is_cut_into_question_reasoning_and_answer():
    (item,) = make_items([row(7)], DATA, "choose")
    assert item.question == "Q: 2 + 2?"
    assert item.given == "Q: 2 + 2?\n\nReasoning:\ntwo and two\n\nA: "
    assert item.alone == "Q: 2 + 2?\n\nReasoning:\n\n\nA: "
    assert (item.answer, item.ending, item.distractors) == ("4", "", ())
    assert (item.half, item.id, item.article, item.exercise) == ("choose", "7", "article 7", "sum")
    assert item.text == DATA.text_template.format(**row(7).texts)


@pytest.mark.parametrize(
    ("template", "question", "given", "alone", "answer", "ending"),
    [
        ("{q} -> {a}", "one two", "one two -> ", "one two -> ", "three", ""),
        ("<{q}|{r}|{r2}|{a}>", "<one two", "<one two|because|so|", "<one two|||", "three", ">"),
        ("{q}{a}", "one two", "one two", "one two", "three", ""),
        ("Q {q} A {a} again {q}.", "Q one two", "Q one two A three again ", "Q one two A  again ", "one two", "."),
        ("{{{q}}} = {a} {{end}}", "{one two", "{one two} = ", "{one two} = ", "three", " {end}"),
        ("Text: {q}!", "Text: one", "Text: one", "Text: one", " two", "!"),
    ],
)
def test_any_template(template, question, given, alone, answer, ending):
    texts = {"q": "one two", "r": "because", "r2": "so", "a": "three"}
    item = Template(template).item(HeldOutRow("1", "1", "", texts), "report")
    assert (item.question, item.given, item.alone, item.answer, item.ending) == (question, given, alone, answer, ending)
    assert item.text == template.format(**texts)


@pytest.mark.parametrize(
    ("text", "asks"), [("", ""), ("a", ""), ("ab", "a"), ("a b", "a"), ("one two three four", "one two"), ("ab cdefghij", "ab")]
)
def test_half_of_a_text_of_one_column_asks(text, asks):
    item = Template("{t}").item(HeldOutRow("1", "1", "", {"t": text}), "report")
    assert (item.question, item.text) == (asks, text)


def test_distractors_are_other_answers_of_the_same_kind():
    rows = [row(i, answer=str(i % 6), kind="sum" if i % 2 else "word") for i in range(60)]
    items = make_items(rows, DATA, "report")
    for item in items:
        kind = {"1", "3", "5"} if item.exercise == "sum" else {"0", "2", "4"}
        assert len(item.distractors) == 3
        assert set(item.distractors[:2]) == kind - {item.answer}  # the kind has no third
        assert item.distractors[2] not in kind
    assert items == make_items(rows, DATA, "report")
    assert len({item.distractors for item in items if item.answer == "1"}) > 1


def test_distractors_differ_from_the_answer_and_each_other():
    rows = [row(i, answer=answer) for i, answer in enumerate(["Paris", "paris.", " PARIS ", "Rome", "rome", "Bern", "Wien", "Oslo", ""])]
    for item in make_items(rows, DATA, "report"):
        assert len({normalised(answer) for answer in (item.answer, *item.distractors)}) == 4
    assert [len(item.distractors) for item in make_items(rows[:5], DATA, "report")] == [1] * 5
