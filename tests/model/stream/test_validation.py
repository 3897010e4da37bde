"""Held-out data is held out, fixed, and spread."""

from collections import Counter

import numpy as np
import pytest
from corpora import data_config, documents_in, make_rows, text_of, tokens_of, write_file

from model.errors import UserError
from model.stream.reader import Reader
from model.stream.resolve import resolve
from model.stream.validation import cached_validation_windows, held_out_rows, validation_windows


@pytest.fixture
def corpus(tmp_path):
    rows = make_rows(1200, articles=300)
    for number in range(6):
        write_file(tmp_path / f"{number}.parquet", rows[number * 200 : (number + 1) * 200])
    data = data_config(tmp_path, filter=None, train_ratio=0.6)
    return resolve(data, 42, tmp_path), data, {row["id"]: row for row in rows}


def part(manifest, data, name):
    return [i for file in manifest.files for rows in Reader(data, 42).samples(file, [name], ["id"]) for i in rows.column("id").to_pylist()]


def test_windows_are_the_choosing_half_in_order(corpus):
    manifest, data, rows = corpus
    windows = validation_windows(manifest, data, 42, 10**6)
    assert windows.dtype == np.uint16
    assert windows.shape[1] == data.max_length + 1
    assert (windows[1:, 0] == windows[:-1, -1]).all()
    stream = [*windows[0].tolist(), *(token for window in windows[1:] for token in window[1:].tolist())]
    expected = [tokens_of(rows[name]) for name in part(manifest, data, "choose")]
    found = documents_in(stream)
    assert found == expected[: len(found)]
    assert sum(map(len, expected)) - len(stream) < data.max_length
    assert (validation_windows(manifest, data, 42, 7) == windows[:7]).all()


def test_windows_do_not_depend_on_lanes_or_buffer(corpus):
    manifest, data, _ = corpus
    other = data.model_copy(update={"lanes": 1, "buffer_size": 3})
    assert (validation_windows(manifest, other, 42, 20) == validation_windows(manifest, data, 42, 20)).all()


def test_too_little_validation_is_said(tmp_path):
    write_file(tmp_path / "a.parquet", make_rows(30))
    data = data_config(tmp_path, filter=None, train_ratio=0.999)
    with pytest.raises(UserError, match=r"^data\.train_ratio: "):
        validation_windows(resolve(data, 1, tmp_path), data, 1, 5)


@pytest.mark.parametrize("half", ["choose", "report"])
def test_rows_come_from_their_half_alone_and_are_always_the_same(corpus, half):
    manifest, data, rows = corpus
    found = held_out_rows(manifest, data, 42, 20, half)
    assert found == held_out_rows(manifest, data, 42, 20, half)
    assert len({row.id for row in found}) == 20
    assert {row.id for row in found} <= set(part(manifest, data, half))
    for row in found:
        source = rows[row.id]
        assert (row.article, row.kind) == (source["article"] or source["id"], "")
        assert data.text_template.format(**row.texts) == text_of(source)


def test_rows_do_not_depend_on_how_is_trained(corpus):
    manifest, data, _ = corpus
    other = data.model_copy(update={"lanes": 1, "buffer_size": 3, "max_length": 64, "cache": True})
    assert held_out_rows(manifest, other, 42, 20, "choose", "language") == held_out_rows(manifest, data, 42, 20, "choose", "language")


def test_no_article_is_in_two_halves_or_in_training(corpus):
    manifest, data, rows = corpus
    halves = [{row.article for row in held_out_rows(manifest, data, 42, 10**5, half)} for half in ("choose", "report")]
    trained = {rows[name]["article"] or name for name in part(manifest, data, "train")}
    assert min(map(len, halves)) > 50
    assert not halves[0] & halves[1]
    assert not trained & (halves[0] | halves[1])


def test_as_many_rows_as_there_are(corpus):
    manifest, data, _ = corpus
    everything = held_out_rows(manifest, data, 42, 10**5, "report", "language")
    assert sorted(row.id for row in everything) == sorted(part(manifest, data, "report"))


def test_rows_are_spread_over_the_files(corpus):
    manifest, data, _ = corpus
    assert len({int(row.id.split("-")[1]) // 200 for row in held_out_rows(manifest, data, 42, 40, "choose")}) == 6


def test_each_kind_has_its_share_and_so_have_the_first_rows(tmp_path):
    kinds = ["common"] * 700 + ["usual"] * 250 + ["rare"] * 45 + ["once"] * 4 + [None]
    rows = [{"id": str(i), "article": f"article {i}", "language": kind} for i, kind in enumerate(kinds)]
    write_file(tmp_path / "a.parquet", rows)
    data = data_config(tmp_path, filter=None, train_ratio=0.02)
    manifest = resolve(data, 42, tmp_path)
    everything = Counter(row.kind for row in held_out_rows(manifest, data, 42, 1000, "report", "language"))
    assert 0 < everything["once"] + everything[""] < 6
    found = held_out_rows(manifest, data, 42, 100, "report", "language")
    assert Counter(row.kind for row in found).keys() == everything.keys()
    for some, count in ((found, 100), (found[:40], 40)):
        shares = Counter(row.kind for row in some)
        assert shares["common"] == pytest.approx(0.7 * count, abs=4)
        assert shares["usual"] == pytest.approx(0.25 * count, abs=4)
        assert shares["rare"] <= 0.08 * count
    assert [row.kind for row in held_out_rows(manifest, data, 42, 1, "report", "language")] == ["common"]
    one, many = [[row.kind for row in held_out_rows(manifest, data, 42, count, "report", None)] for count in (3, 100)]
    assert set(one + many) == {""}


def test_a_new_article_goes_before_a_second_row_of_one(tmp_path):
    rows = [
        {"id": f"{article}-{i}", "article": str(article), "language": "en"} for article in range(60) for i in range(1 + 20 * (article < 30))
    ]
    write_file(tmp_path / "a.parquet", rows)
    data = data_config(tmp_path, filter=None, train_ratio=0.1)
    manifest = resolve(data, 42, tmp_path)
    articles = Counter(row.article for row in held_out_rows(manifest, data, 42, 10**5, "choose", "language"))
    many = [article for article, rows in articles.items() if rows > 1]
    assert len(many) > 5 < len(articles) - len(many)
    found = [row.article for row in held_out_rows(manifest, data, 42, len(articles), "choose", "language")]
    assert set(found) == set(articles)
    found = [row.article for row in held_out_rows(manifest, data, 42, len(articles) + len(many), "choose", "language")]
    assert Counter(found) == {article: 1 + (article in many) for article in articles}


def test_kinds_share_no_article_while_there_are_others(tmp_path):
    rows = [{"id": f"{article}-{kind}", "article": str(article), "language": kind} for article in range(300) for kind in ("en", "fr")]
    write_file(tmp_path / "a.parquet", rows)
    data = data_config(tmp_path, filter=None, train_ratio=0.6)
    found = held_out_rows(resolve(data, 42, tmp_path), data, 42, 40, "choose", "language")
    assert Counter(row.kind for row in found) == {"en": 20, "fr": 20}
    assert len({row.article for row in found}) == 40


def test_the_beginnings_of_some_files_are_enough(tmp_path):
    for number in range(32):
        write_file(tmp_path / f"{number:02}.parquet", make_rows(400, seed=number, articles=50))
    data = data_config(tmp_path, filter=None, train_ratio=0.5)
    manifest = resolve(data, 42, tmp_path)
    found = held_out_rows(manifest, data, 42, 64, "choose", "language")
    for number in range(1, 32, 2):
        (tmp_path / f"{number:02}.parquet").unlink()
    assert held_out_rows(manifest, data, 42, 64, "choose", "language") == found
    assert len({row.id.split("-")[0] for row in found}) > 10


def test_all_rows_are_found_where_files_are_uneven(tmp_path):
    write_file(tmp_path / "0.parquet", make_rows(2000, articles=500))
    for number in range(1, 40):
        write_file(tmp_path / f"{number}.parquet", [{"id": f"x{number}", "article": f"y{number}"}])
    data = data_config(tmp_path, filter=None)
    manifest = resolve(data, 42, tmp_path)
    available = len(part(manifest, data, "report"))
    assert available > 60
    assert len(held_out_rows(manifest, data, 42, available, "report")) == available


def test_rows_without_a_name_are_rows(tmp_path):
    write_file(tmp_path / "a.parquet", [{"id": None, "text": f"text {i}", "words": i} for i in range(200)])
    data = data_config(tmp_path, filter=None, text_template="{text}: {words}")
    manifest = resolve(data, 42, tmp_path)
    found = {half: held_out_rows(manifest, data, 42, 200, half) for half in ("choose", "report")}
    every = [row for rows in found.values() for row in rows]
    assert len({row.id for row in every}) == len({row.article for row in every}) == len({row.texts["text"] for row in every}) > 10
    assert all(row.texts["text"] == f"text {row.texts['words']}" for row in every)


def test_a_column_that_is_not_there_is_named(corpus):
    manifest, data, _ = corpus
    with pytest.raises(UserError, match=r"^data\.path: 0\.parquet has no column 'exercise'; it has id, "):
        held_out_rows(manifest, data, 42, 5, "choose", "exercise")


def test_windows_are_read_once_and_never_trusted_unseen(corpus, tmp_path):
    manifest, data, _ = corpus
    path = tmp_path / "windows.safetensors"
    first = cached_validation_windows(path, manifest, data, 42, 6)
    assert (first == validation_windows(manifest, data, 42, 6)).all()
    assert first.dtype == np.uint16
    written = path.stat().st_mtime_ns
    assert (cached_validation_windows(path, manifest, data, 42, 6) == first).all()
    assert path.stat().st_mtime_ns == written
    assert len(cached_validation_windows(path, manifest, data, 42, 4)) == 4
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        path.write_bytes(damaged)
        assert (cached_validation_windows(path, manifest, data, 42, 4) == first[:4]).all()
        made = path.read_bytes()
        assert len(made) == len(whole)
        assert (cached_validation_windows(path, manifest, data, 42, 4) == first[:4]).all()
        assert path.read_bytes() == made
