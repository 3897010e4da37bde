"""Questions and their grades."""

import pytest

from model.config import DataConfig
from model.evaluation.questions import Question, grade, make_questions, questions_digest

DATA = DataConfig(path="x")
ROW = {"id": "7", "article": "a/b", "query": "2 + 2?", "synthetic_reasoning": None, "synthetic_answer": "4", "exercise": "sum"}


def test_a_row_is_cut_where_the_network_takes_over():
    (question,) = make_questions([ROW], DATA, "exercise")
    assert question.prompt == "Q: 2 + 2?\n\nReasoning:\n"
    assert question.gold == "\n\nA: 4"
    assert question.answer == "4"
    assert (question.id, question.article, question.exercise) == ("7", "a/b", "sum")
    assert question.prompt + question.gold == DATA.text_template.format(query="2 + 2?", synthetic_reasoning="", synthetic_answer="4")


def test_a_template_of_one_column_is_all_prompt():
    data = DataConfig(path="x", text_template="{text}")
    assert make_questions([{"id": "1", "article": "1", "text": "abc"}], data, None)[0].prompt == "abc"


def test_the_digest_names_the_set():
    questions = make_questions([ROW, {**ROW, "id": "8"}], DATA, "exercise")
    assert questions_digest(questions) == questions_digest(list(questions))
    assert questions_digest(questions) != questions_digest(questions[::-1])
    assert questions_digest(questions) != questions_digest(questions[:1])


@pytest.mark.parametrize(
    ("text", "ended", "well_formed", "exact"),
    [
        ("two and two\n\nA: 4", True, True, True),
        ("two and two\n\nA: 4.", True, True, True),
        ("two and two\n\nA:  4 ", True, True, True),
        ("two and two\n\nA: 5", True, True, False),
        ("two and two\n\nA: 44", True, True, False),
        ("two and two\n\nA: 4", False, False, True),
        ("two and two", True, False, False),
        ("two\n\nA: 4\n\nA: 5", True, False, True),
        ("two\n\nA: ", True, False, False),
        ("", True, False, False),
    ],
)
def test_grades(text, ended, well_formed, exact):
    question = Question("1", "a", "sum", "Q", "gold", "4")
    graded = grade(question, text, ended, "\n\nA: ")
    assert (graded.well_formed, graded.exact_match) == (well_formed, exact)


def test_an_empty_gold_answer_is_matched_by_nothing():
    assert not grade(Question("1", "a", "", "Q", "g", ""), "r\n\nA: ", True, "\n\nA: ").exact_match
