"""Held-out data is held out, fixed, and spread."""

import numpy as np
import pytest
from corpora import data_config, documents_in, make_rows, tokens_of, write_file

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
    members = part(manifest, data, half)
    found = held_out_rows(manifest, data, 42, 20, half, ["text", "words"])
    assert found == held_out_rows(manifest, data, 42, 20, half, ["text", "words"])
    assert len({row["id"] for row in found}) == 20
    assert {row["id"] for row in found} <= set(members)
    for row in found:
        source = rows[row["id"]]
        assert row == {"id": source["id"], "article": source["article"] or source["id"], "text": source["text"], "words": source["words"]}


def test_fewer_rows_are_the_first_of_more(corpus):
    manifest, data, _ = corpus
    everything = held_out_rows(manifest, data, 42, 10**5, "report", ["text"])
    assert sorted(row["id"] for row in everything) == sorted(part(manifest, data, "report"))
    assert held_out_rows(manifest, data, 42, 200, "report", ["text"]) == everything[:200]


def test_rows_are_spread_over_the_files(corpus):
    manifest, data, _ = corpus
    files = {int(row["id"].split("-")[1]) // 200 for row in held_out_rows(manifest, data, 42, 40, "choose", [])}
    assert len(files) == 6


def test_all_rows_are_found_where_files_are_uneven(tmp_path):
    write_file(tmp_path / "0.parquet", make_rows(2000, articles=500))
    for number in range(1, 40):
        write_file(tmp_path / f"{number}.parquet", [{"id": f"x{number}", "article": f"y{number}"}])
    data = data_config(tmp_path, filter=None)
    manifest = resolve(data, 42, tmp_path)
    available = len(part(manifest, data, "report"))
    assert available > 60
    assert len(held_out_rows(manifest, data, 42, available, "report", [])) == available


def test_a_column_that_is_not_there_is_named(corpus):
    manifest, data, _ = corpus
    with pytest.raises(UserError, match=r"^data\.path: 0\.parquet has no column 'exercise'; it has id, "):
        held_out_rows(manifest, data, 42, 5, "choose", ["text", "exercise"])


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
