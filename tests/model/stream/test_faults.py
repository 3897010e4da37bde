"""What is wrong with the data itself: files that changed or are damaged, and rows that are out of the ordinary."""

import contextlib
import dataclasses
import itertools
import os
import re
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import SCHEMA, data_config, documents_in, lane_streams, make_rows, tokens_of, write_files

from model.digest import file_sha256
from model.errors import UserError
from model.stream import reader as reader_module
from model.stream import source
from model.stream.batches import TrainingWindows
from model.stream.lanes import plan_lanes
from model.stream.packing import OddRows
from model.stream.reader import document
from model.stream.resolve import resolve
from model.stream.validation import validation_windows


def windows(manifest, data, state=None, epochs=1, **how):
    return [batch.windows.tolist() for batch in TrainingWindows(manifest, data, 42, 4, epochs, state, **how)]


def keep_time(path: Path, content: bytes) -> None:
    """Other bytes, the same time of writing: what a failing disk does."""
    status = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_one_flipped_bit_in_a_local_file_is_refused(tmp_path):
    write_files(tmp_path, [60, 60])
    data, path = data_config(tmp_path), tmp_path / "part_001.parquet"
    manifest = resolve(data, 42, tmp_path)
    path.write_bytes(flipped(path.read_bytes(), 100))
    with pytest.raises(UserError, match=r"^data\.path: part_001\.parquet changed since build-config \(its SHA-256 is \w{16}… instead of"):
        windows(manifest, data)


def test_a_copy_is_as_good_as_the_file_and_is_hashed_once(tmp_path, monkeypatch):
    write_files(tmp_path, [60, 60])
    data = data_config(tmp_path)
    manifest = resolve(data, 42, tmp_path)
    expected = windows(manifest, data, epochs=3)
    for path in tmp_path.glob("*.parquet"):
        os.utime(path, (1, 1))
    hashed = []
    monkeypatch.setattr(source, "file_sha256", lambda path: hashed.append(path.name) or file_sha256(path))
    assert windows(manifest, data, epochs=3) == expected
    assert windows(manifest, data, epochs=3) == expected
    assert sorted(hashed) == ["part_000.parquet", "part_001.parquet"]


def spoil(path: Path, column: str, share: float) -> None:
    """Damage the data of a column, from `share` of its bytes on for a little while. The footer stays whole, and the time of writing too."""
    group = pq.read_metadata(path).row_group(0)
    chunk = next(group.column(number) for number in range(group.num_columns) if group.column(number).path_in_schema == column)
    place = chunk.data_page_offset + int(share * chunk.total_compressed_size)
    keep_time(path, path.read_bytes()[:place] + b"\xff" * 40 + path.read_bytes()[place + 40 :])


@pytest.fixture
def paged(tmp_path, monkeypatch):
    """Three files of 600 rows in many small pages, and the config that reads them on past damage."""
    monkeypatch.setattr(reader_module, "_BATCH_ROWS", 50)
    for number in range(3):
        table = pa.Table.from_pylist(make_rows(600, seed=number), schema=SCHEMA)
        path = tmp_path / "data" / f"part_{number:03d}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(table, path, data_page_size=1000, write_batch_size=10, use_dictionary=False)
    return tmp_path / "data", data_config(tmp_path / "data", quarantine=True)


def test_damage_in_the_middle_of_a_file_is_named_while_training(paged):
    folder, data = paged
    data = data.model_copy(update={"quarantine": False})
    manifest = resolve(data, 42, folder)
    spoil(folder / "part_001.parquet", "text", 0.5)
    for threads in (0, 2):
        with pytest.raises(UserError, match=r"^data\.path: part_001\.parquet is damaged or not a parquet file \(.*\); fetch it") as caught:
            windows(manifest, data, threads=threads)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("again", [False, True])
def test_quarantine_gives_a_damaged_file_up_from_the_damage_on(paged, again):
    """What is lost is counted, and everything else arrives; whether build-config saw the file whole or not."""
    folder, data = paged
    healthy = resolve(data, 42, folder)
    shutil.copytree(folder, folder.parent / "healthy")
    spoil(folder / "part_001.parquet", "text", 0.5)
    manifest = resolve(data, 42, folder) if again else healthy
    assert not manifest.left_out
    reader = reader_module.Reader(data, 42)
    good, expected = 0, Counter()
    with contextlib.suppress(source.DamagedFile):
        for rows in reader.samples(manifest.files[1], ["train"], ["id", "text"]):
            good += rows.num_rows
    assert 0 < good < manifest.files[1].train_samples
    block, lost = data.buffer_size // data.lanes, 0
    for part in (part for slices in plan_lanes(manifest, data.lanes) for part in slices):
        file = dataclasses.replace(healthy.files[part.file], url=str(folder.parent / "healthy" / healthy.files[part.file].name))
        stop = part.stop
        if part.file == 1 and part.stop > good:  # no block with a damaged sample in it
            stop = part.start + max(0, good - part.start) // block * block
        lost += part.stop - stop
        found = [row for rows in reader.samples(file, ["train"], ["id", "text"]) for row in rows.to_pylist()]
        expected.update(tokens_of(row) for row in found[part.start : stop])
    delivered = Counter(found for stream in lane_streams(manifest, data, 42, 1) for found in documents_in(stream))
    assert delivered <= expected
    missing = expected - delivered  # the ends of lanes that fill no window
    assert sum(len(tokens) * count for tokens, count in missing.items()) < data.lanes * (data.max_length + max(map(len, expected)))
    stream = TrainingWindows(manifest, data, 42, 4, 2)
    counts = [batch.odd_rows.lost for batch in stream if batch.epoch == 1]
    assert counts[0] == lost > 0
    assert len([line for line in stream.warnings if "part_001.parquet is damaged" in line]) == len(stream.warnings) == 2  # one an epoch


def test_what_quarantine_loses_at_the_end_of_a_run_is_counted(paged):
    folder, data = paged
    data = data.model_copy(update={"path": str(folder / "part_001.parquet"), "lanes": 1})
    manifest = resolve(data, 42, folder)
    spoil(folder / "part_001.parquet", "text", 0.5)
    (slices,) = plan_lanes(manifest, 1)
    assert len(slices) == 1
    *_, before, last = TrainingWindows(manifest, data, 42, 4, 1)
    _, sample, *_ = before.state["lanes"]["0"]
    read = -(-sample // data.buffer_size) * data.buffer_size  # whole blocks
    assert last.odd_rows.lost == manifest.train_samples - read > 0


@pytest.mark.slow
def test_quarantine_is_exact_under_resume_and_repetition(paged):
    folder, data = paged
    manifest = resolve(data, 42, folder)
    spoil(folder / "part_001.parquet", "text", 0.4)
    batches = list(TrainingWindows(manifest, data, 42, 4, 2))
    expected = [(batch.windows.tolist(), batch.odd_rows) for batch in batches]
    assert [(batch.windows.tolist(), batch.odd_rows) for batch in TrainingWindows(manifest, data, 42, 4, 2, threads=2)] == expected
    for cut, batch in enumerate(batches):
        for step, again in enumerate(itertools.islice(TrainingWindows(manifest, data, 42, 4, 2, batch.state), 2), cut + 1):
            assert (again.windows.tolist(), again.odd_rows) == expected[step]
    rest = TrainingWindows(manifest, data, 42, 4, 2, batches[9].state)
    assert [(batch.windows.tolist(), batch.odd_rows) for batch in rest] == expected[10:]


def test_quarantine_leaves_out_what_the_footer_gives_away(tmp_path):
    write_files(tmp_path, [40, 40, 40, 40, 40])
    paths = [tmp_path / f"part_{number:03d}.parquet" for number in range(5)]
    paths[0].write_bytes(paths[0].read_bytes()[:-20])
    columns = pq.read_table(paths[1])
    pq.write_table(columns.drop_columns(["text"]), paths[1])
    pq.write_table(columns.drop_columns(["text"]).append_column("text", pa.array([["x"]] * 40)), paths[3])
    data = data_config(tmp_path, quarantine=True)
    manifest = resolve(data, 42, tmp_path)
    assert [file.name for file in manifest.files] == ["part_002.parquet", "part_004.parquet"]
    assert len(manifest.left_out) == 3
    for why, reason in zip(
        manifest.left_out,
        [r"part_000\.parquet is damaged", r"part_001\.parquet has no column 'text'", r"'text' of part_003\.parquet is list<"],
        strict=True,
    ):
        assert re.search(reason, why)
    assert windows(manifest, data)
    for number, field in ((0, "path"), (1, "text_template"), (3, "text_template")):
        with pytest.raises(UserError, match=rf"^data\.{field}: .*part_00{number}\.parquet"):
            resolve(data_config(paths[number]), 42, tmp_path)


def test_quarantine_of_damaged_texts_at_the_beginning_of_a_file(paged):
    """build-config reads some texts, too."""
    folder, data = paged
    spoil(folder / "part_000.parquet", "text", 0.05)
    manifest = resolve(data, 42, folder)
    assert windows(manifest, data)


def test_quarantine_holds_for_the_validation_windows(paged):
    folder, data = paged
    data = data.model_copy(update={"train_ratio": 0.5})
    manifest = resolve(data, 42, folder)
    healthy = validation_windows(manifest, data, 42, 100_000)
    spoil(folder / "part_000.parquet", "text", 0.5)
    assert 10 < len(validation_windows(manifest, data, 42, 100_000)) < len(healthy)


def test_odd_rows_are_read_by_the_documented_policy_and_counted(tmp_path):
    texts = pa.Array.from_buffers(
        pa.string(), 6, pa.array([b"plain", b"", b"\xff\xfe odd", b"say <|endoftext|>", None, b"\xc3<|endoftext|>"], pa.binary()).buffers()
    )
    rows = 600
    table = pa.table({"id": [f"r{number}" for number in range(rows)], "text": pa.concat_arrays([texts] * (rows // 6))})
    pq.write_table(table, tmp_path / "odd.parquet")
    data = data_config(tmp_path, filter=None, article_column=None, text_template="{text}", lanes=1)
    manifest = resolve(data, 42, tmp_path)
    reader = reader_module.Reader(data, 42)
    numbers = [int(name[1:]) for found in reader.samples(manifest.files[0], ["train"], ["id"]) for name in found.column("id").to_pylist()]
    assert manifest.samples == rows  # no row is skipped
    policy = ["plain", "", "\ufffd\ufffd odd", "say <|endoftext|>", "", "\ufffd<|endoftext|>"]
    (stream,) = lane_streams(manifest, data, 42, 1)
    expected = Counter(tuple(document(policy[number % 6]).tolist()) for number in numbers)
    delivered = Counter(documents_in(stream))
    assert delivered <= expected
    assert (expected - delivered).total() <= data.max_length + 1
    first = next(batch for batch in TrainingWindows(manifest, data, 42, 1, 2) if batch.state["lanes"]["0"][:2] >= [1, 0])
    kinds = Counter(number % 6 for number in numbers)
    odd = OddRows(empty_field=kinds[1] + kinds[4], not_utf8=kinds[2] + kinds[5], end_of_text=kinds[3] + kinds[5])
    _, beyond, *_ = first.state["lanes"]["0"]
    assert first.odd_rows.lost == 0
    for mine, all_of_them in zip(first.odd_rows, odd, strict=True):
        assert all_of_them <= mine <= all_of_them + beyond


NATURAL = "The river, it's said, runs 42 miles under naïve green stones; 文字 too.\n\n" * 14_000


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(NATURAL * 100, id="100 MB", marks=pytest.mark.slow),
        pytest.param("abcdefghijklmnopqrstuvwxyz" * 40_000, id="a word of 1 MB"),
        pytest.param("x" + " " * 1_000_000 + "y", id="1 MB of spaces"),
    ],
)
def test_a_very_long_text_is_one_document(tmp_path, text):
    names = [f"r{number}" for number in range(8)]
    data = data_config(tmp_path, filter=None, article_column=None, text_template="{text}", lanes=1, max_length=1023, train_ratio=0.999)
    pq.write_table(pa.table({"id": names, "text": ["short"] * 7 + [text]}), tmp_path / "long.parquet")
    began = time.monotonic()
    manifest = resolve(data, 42, tmp_path)
    assert manifest.train_samples == 8
    found = np.concatenate([batch.windows.numpy()[0][:-1] for batch in TrainingWindows(manifest, data, 42, 1, 1)])
    assert time.monotonic() - began < 60
    tokens = np.concatenate([document("short")] * 7)
    alone = document(text)
    start = int(np.argmax(found[: len(tokens) + 2] == alone[0])) if found[0] != alone[0] else 0
    assert start % len(document("short")) == 0
    assert np.array_equal(found[start:][: len(alone)], alone[: len(found) - start])
    assert len(found) > len(alone) + len(tokens) - 1024
