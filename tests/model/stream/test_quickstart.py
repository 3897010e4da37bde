"""The generated corpus: SYNTH's shape, right answers, no question on both sides of a split, equal bytes for equal seeds."""

import re
from collections import Counter, defaultdict
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from model.config import SYNTH_TEMPLATE
from model.stream.quickstart import SCHEMA, corpus_rows, write_corpus
from model.stream.quickstart_kinds import DAYS, KINDS, UNITS
from model.tokenizer import encode

REAL_TEXT = Path(__file__).parents[4] / "shared/data/wiki-synth"
ROWS = 20_000


@pytest.fixture(scope="module")
def rows():
    return list(corpus_rows(seed=3, rows=ROWS))


def english(rows, *kinds):
    return [row for row in rows if row["language"] == "en" and row["exercise"] in kinds]


def question_and_answer(rows, *kinds):
    chosen = [(row["query"], row["synthetic_answer"]) for row in english(rows, *kinds)]
    assert chosen
    return chosen


def test_files_have_one_row_group_each_and_hold_every_row_in_order(tmp_path):
    write_corpus(tmp_path / "corpus", seed=3, rows=1_001, files=4)
    files = sorted((tmp_path / "corpus").iterdir())
    assert [file.name for file in files] == [f"synth_{n:03}.parquet" for n in (1, 2, 3, 4)]
    assert [pq.ParquetFile(file).num_row_groups for file in files] == [1, 1, 1, 1]
    assert [row for file in files for row in pq.read_table(file).to_pylist()] == [
        {name: row.get(name) for name in SCHEMA.names} for row in corpus_rows(3, 1_001)
    ]


def test_the_schema_is_that_of_real_synth_shaped_files(tmp_path):
    if not REAL_TEXT.is_dir():
        pytest.skip("needs the SYNTH-shaped shards of wiki-synth beside the project")
    write_corpus(tmp_path / "corpus", seed=3, rows=40, files=1)
    written = pq.read_schema(tmp_path / "corpus/synth_001.parquet")
    assert written.equals(pq.read_schema(next(REAL_TEXT.glob("*.parquet"))))


def test_equal_seeds_give_equal_bytes_and_others_do_not(tmp_path):
    for name, seed in (("a", 3), ("again", 3), ("b", 4)):
        write_corpus(tmp_path / name, seed=seed, rows=400, files=2)
    a, again, b = ([file.read_bytes() for file in sorted((tmp_path / name).iterdir())] for name in ("a", "again", "b"))
    assert a == again
    assert a != b


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/mine.txt").write_text("keep")
    with pytest.raises(OSError, match="not empty"):
        write_corpus(tmp_path / "corpus", seed=3, rows=40)
    assert [path.name for path in tmp_path.rglob("*")] == ["corpus", "mine.txt"]


def test_languages_nulls_and_articles_are_mixed_as_in_synth(rows):
    languages = Counter(row["language"] for row in rows)
    assert 0.15 < (languages["fr"] + languages["es"]) / ROWS < 0.22
    assert languages["en"] / ROWS > 0.75
    assert 0 < languages[None] < 0.005 * ROWS
    reasonings = Counter(row["synthetic_reasoning"] for row in rows)
    assert 0 < reasonings[None] < 0.01 * ROWS
    assert 0 < reasonings[""] < 0.01 * ROWS
    articles = Counter(row["query_seed_url"] for row in rows)
    assert 0 < articles.pop(None) < 0.01 * ROWS
    assert sum(articles.values()) / len(articles) > 2
    assert len({row["synth_id"] for row in rows}) == ROWS
    assert {row["exercise"] for row in rows} == set(KINDS)


def test_no_question_comes_from_two_articles(rows):
    """Else training would have seen what validation asks."""
    articles = defaultdict(set)
    for row in rows:
        articles[row["query"]].add(row["query_seed_url"] or row["synth_id"])
    assert [query for query, sources in articles.items() if len(sources) > 1] == []


def test_facts_of_held_out_articles_are_told_in_others(rows):
    told = defaultdict(set)
    for row in english(rows, "town facts", "opposites", "first letter"):
        if row["synthetic_reasoning"]:
            told[row["exercise"], row["synthetic_reasoning"]].add(row["query_seed_url"])
    assert {len(articles) for articles in told.values()} == {3}


def test_texts_are_short(rows):
    texts = [SYNTH_TEMPLATE.format_map({**row, "synthetic_reasoning": row["synthetic_reasoning"] or ""}) for row in english(rows, *KINDS)]
    lengths = [len(encode(text)) + 1 for text in texts]
    assert 24 < sum(lengths) / len(lengths) < 32
    assert max(lengths) < 48


def test_sums_and_conversions_are_right(rows):
    for query, answer in question_and_answer(rows, "add digits"):
        assert sum(map(int, re.findall(r"\d", query))) == int(answer)
    for query, answer in question_and_answer(rows, "add numbers", "add with carry"):
        a, b, c, d = map(int, re.findall(r"\d", query))
        assert 10 * a + b + 10 * c + d == int(answer.replace(" ", ""))
    ratio = {unit: number for unit, _, number in UNITS}
    for query, answer in question_and_answer(rows, "units"):
        count, unit = re.search(r"(\d+) (\w+)", query).groups()
        assert int(count) * ratio[unit] == int(answer)


def test_carries_are_told_from_sums_without(rows):
    for kind, carries in (("add numbers", False), ("add with carry", True)):
        for query, _ in question_and_answer(rows, kind):
            _, b, _, d = map(int, re.findall(r"\d", query))
            assert (b + d > 9) == carries


def test_comparisons_and_orders_are_right(rows):
    for query, answer in question_and_answer(rows, "larger number"):
        assert max(map(int, re.findall(r"\d+", query))) == int(answer)
    for query, answer in question_and_answer(rows, "compare numbers"):
        a, b = map(int, re.findall(r"\d+", query))
        assert answer == ("yes" if a > b else "no")
    for query, answer in question_and_answer(rows, "sort numbers"):
        assert sorted(re.findall(r"\d", query)) == answer.split()
    for query, answer in question_and_answer(rows, "even or odd"):
        assert answer == ("odd" if int(re.findall(r"\d", query)[-1]) % 2 else "even")


def test_week_days_are_right(rows):
    days = DAYS["en"].split()
    for query, answer in question_and_answer(rows, "dates"):
        (day,) = set(query.replace(",", " ").replace(".", " ").split()) & set(days)
        date, other = map(int, re.findall(r"\d+", query))
        later = other if "later" in query else other - date
        assert days[(days.index(day) + later) % 7] == answer


def test_word_questions_are_right(rows):
    for query, answer in question_and_answer(rows, "copy words"):
        assert query.rstrip(".").split()[1:] == answer.split()
    for query, answer in question_and_answer(rows, "repeat"):
        _, word, times, _ = query.split()
        assert answer.split() == [word] * {"two": 2, "three": 3}[times]
    for query, answer in question_and_answer(rows, "first word", "last word"):
        listed = re.split(r" (?:of|in) ", query)[-1].rstrip("?").split()
        assert answer == listed[0 if "first" in query else -1]
    for query, answer in question_and_answer(rows, "reverse words", "reverse a line"):
        assert " ".join(reversed(answer.split())) in query
    for query, answer in question_and_answer(rows, "odd one out"):
        assert Counter(query.rstrip("?.").split())[answer] == 1
    for query, answer in question_and_answer(rows, "count words"):
        assert len(re.split(r"words are in |words ", query)[-1].rstrip("?.").split()) == int(answer)


def test_the_reasoning_ends_in_the_answer_or_in_what_decides_it(rows):
    decides = {
        "copy words",
        "first word",
        "last word",
        "count words",
        "first letter",
        "opposites",
        "town facts",
        "even or odd",
        "add digits",
    }
    for row in english(rows, *decides):
        if row["synthetic_reasoning"]:
            assert row["synthetic_reasoning"].rstrip(".").endswith(row["synthetic_answer"])
