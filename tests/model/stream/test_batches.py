"""The order of the data: nothing lost, nothing twice, resumed anywhere."""

import dataclasses
import itertools
import json
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from corpora import data_config, documents_in, lane_streams, text_of, tokens_of, write_files
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from model.errors import Stopped, UserError
from model.stream import reader as reader_module
from model.stream.batches import TrainingWindows, check_shares, merged_state
from model.stream.lanes import plan_lanes
from model.stream.packing import OddRows
from model.stream.reader import Reader
from model.stream.resolve import resolve
from model.tokenizer import decode

relaxed = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def small_record_batches(monkeypatch):
    """So that files, blocks and record batches end in different places."""
    monkeypatch.setattr(reader_module, "_BATCH_ROWS", 7)


def train_rows(manifest, data, seed, files):
    """The rows that are trained on, by the reader that the lanes use; tested against the split in test_reader.py."""
    ids = [
        name
        for file in manifest.files
        for rows in Reader(data, seed).samples(file, ["train"], ["id"])
        for name in rows.column("id").to_pylist()
    ]
    by_id = {row["id"]: row for rows in files for row in rows}
    return [by_id[name] for name in ids]


@st.composite
def datasets(draw):
    return {
        "sizes": draw(st.lists(st.integers(0, 30), min_size=1, max_size=6)),
        "lanes": draw(st.integers(1, 6)),
        "buffer_size": draw(st.integers(1, 50)),
        "max_length": draw(st.integers(2, 40)),
        "seed": draw(st.integers(0, 5)),
        "filter": draw(st.sampled_from([None, "language == 'en'"])),
    }


def build(shape, folder):
    files = write_files(folder, shape["sizes"], shape["seed"])
    data = data_config(folder, **{key: shape[key] for key in ("lanes", "buffer_size", "max_length", "filter")})
    try:
        manifest = resolve(data, shape["seed"], folder)
    except UserError:
        assume(False)
    assume(manifest.train_samples >= data.lanes)
    return manifest, data, files


@pytest.mark.slow
@relaxed
@given(datasets(), st.integers(1, 3))
def test_every_sample_once_an_epoch_and_every_token_of_it(shape, epochs):
    with tempfile.TemporaryDirectory() as folder:
        manifest, data, files = build(shape, Path(folder))
        expected = sorted(tokens_of(row) for row in train_rows(manifest, data, shape["seed"], files))
        try:
            streams = lane_streams(manifest, data, shape["seed"], epochs)
        except UserError:  # not one window
            assert epochs * sum(map(len, expected)) <= data.lanes * data.max_length
            return
        owned = [sum(len(part) for part in slices) for slices in plan_lanes(manifest, data.lanes)]
        by_lane = [documents_in(stream) for stream in streams]
        for epoch in range(epochs):
            seen = [found[epoch * count : (epoch + 1) * count] for found, count in zip(by_lane, owned, strict=True)]
            if all(len(part) == count for part, count in zip(seen, owned, strict=True)):
                assert sorted(document for part in seen for document in part) == expected
        delivered = sum(map(len, streams))
        assert 0 <= epochs * sum(map(len, expected)) - delivered <= data.lanes * data.max_length


@pytest.mark.slow
@relaxed
@given(datasets(), st.integers(1, 7), st.lists(st.integers(0, 6), max_size=6))
def test_resumed_at_any_delivered_batch_it_goes_on_bit_for_bit(shape, global_batch, cuts):
    with tempfile.TemporaryDirectory() as folder:
        manifest, data, _ = build(shape, Path(folder))
        try:
            whole = list(TrainingWindows(manifest, data, shape["seed"], global_batch, 2))
        except UserError:
            assume(False)
        state, again = None, []
        for cut in [*cuts, 10**9]:
            windows = TrainingWindows(manifest, data, shape["seed"], global_batch, 2, json.loads(json.dumps(state)))
            for batch in windows:
                if cut == 0:
                    break
                again.append(batch)
                state = batch.state
                cut -= 1
        assert [batch.windows.tolist() for batch in again] == [batch.windows.tolist() for batch in whole]
        assert [(batch.epoch, batch.state) for batch in again] == [(batch.epoch, batch.state) for batch in whole]


@pytest.mark.slow
@relaxed
@given(datasets(), st.integers(1, 2), st.lists(st.tuples(st.sampled_from([1, 2, 4, 8]), st.integers(0, 3), st.integers(0, 5)), max_size=4))
def test_any_number_of_ranks_and_threads_sees_the_same_global_batches(shape, share, stretches):
    """Each stretch goes on from where the last one was cut, with its own number of ranks and threads."""
    shape["lanes"], global_batch = 8, 8 * share
    with tempfile.TemporaryDirectory() as folder:
        manifest, data, _ = build(shape, Path(folder))
        try:
            whole = list(TrainingWindows(manifest, data, shape["seed"], global_batch, 2))
        except UserError:
            assume(False)
        state, again = None, []
        for world_size, threads, length in [*stretches, (1, 0, 10**9)]:
            options = {"world_size": world_size, "threads": threads}
            ranks = [
                TrainingWindows(manifest, data, shape["seed"], global_batch, 2, json.loads(json.dumps(state)), rank=rank, **options)
                for rank in range(world_size)
            ]
            for _ in range(length):
                shares = [batch for rank in ranks if (batch := next(rank, None))]
                if not shares or (all(batch.ended for batch in shares) and not sum(len(batch.windows) for batch in shares)):
                    break
                assert all(len(batch.windows) <= global_batch // world_size for batch in shares)
                again.append(sorted(window for batch in shares for window in batch.windows.tolist()))
                state = merged_state([batch.state for batch in shares])
            for rank in ranks:
                rank.close()
        assert [windows for windows in again if windows] == [sorted(batch.windows.tolist()) for batch in whole]


@pytest.mark.slow
@relaxed
@given(datasets(), st.integers(1, 9))
def test_a_global_batch_is_so_many_slots(shape, global_batch):
    with tempfile.TemporaryDirectory() as folder:
        manifest, data, _ = build(shape, Path(folder))
        try:
            single = [
                (batch.state["slot"] - 1, batch.windows[0].tolist()) for batch in TrainingWindows(manifest, data, shape["seed"], 1, 2)
            ]
        except UserError:
            assume(False)
        batches = list(TrainingWindows(manifest, data, shape["seed"], global_batch, 2))
        together = [[window for _, window in slots] for _, slots in itertools.groupby(single, lambda slot: slot[0] // global_batch)]
        assert [batch.windows.tolist() for batch in batches] == together
        assert {(batch.windows.dtype, batch.windows.shape[1]) for batch in batches} == {(torch.uint16, data.max_length + 1)}


@pytest.fixture
def corpus(tmp_path):
    files = write_files(tmp_path, [120] * 5)
    data = data_config(tmp_path, filter=None, lanes=4, buffer_size=100)
    return resolve(data, 42, tmp_path), data, files


def test_the_second_epoch_has_the_same_samples_in_another_order(corpus):
    manifest, data, _ = corpus
    for stream, slices in zip(lane_streams(manifest, data, 42, 3), plan_lanes(manifest, data.lanes), strict=True):
        count, documents = sum(len(part) for part in slices), documents_in(stream)
        first, second = documents[:count], documents[count : 2 * count]
        assert sorted(first) == sorted(second)
        assert first != second
        assert sum(a == b for a, b in zip(first, second, strict=True)) < count / 4


def test_files_come_in_another_order_each_epoch(tmp_path):
    write_files(tmp_path, [9] * 12)
    data = data_config(tmp_path, filter=None, lanes=1, buffer_size=1, text_template="{id}")
    (stream,) = lane_streams(resolve(data, 42, tmp_path), data, 42, 3)
    ids = [decode(list(document[:-1])) for document in documents_in(stream)]
    epoch = len(set(ids))
    files = [row.split("-")[0] for row in ids]
    first, second = ([name for name, _ in itertools.groupby(files[start : start + epoch])] for start in (0, epoch))
    assert len(first) == 12  # the rows of a file stay together
    assert sorted(first) == sorted(second)
    assert first != second


def test_resumed_after_every_single_window_of_uneven_lanes(tmp_path):
    write_files(tmp_path, [3, 10, 25])
    data = data_config(tmp_path, filter=None, lanes=3, max_length=9)
    manifest = resolve(data, 42, tmp_path)
    whole = list(TrainingWindows(manifest, data, 42, 1, 3))
    for batch, following in itertools.pairwise(whole):
        resumed = next(TrainingWindows(manifest, data, 42, 1, 3, batch.state))
        assert (resumed.windows == following.windows).all()
        assert (resumed.epoch, resumed.state) == (following.epoch, following.state)


@pytest.mark.parametrize(
    ("sizes", "lanes"), [([200] * 9, 8), ([900], 8), ([300] * 3, 8), ([100, 180, 260, 340], 4), ([500, 10, 10, 10], 2), ([50] * 20, 8)]
)
def test_lanes_come_to_their_ends_together(tmp_path, sizes, lanes):
    """However many files there are, and however large: so no rank waits for another, and few batches are smaller."""
    write_files(tmp_path, sizes)
    data = data_config(tmp_path, filter=None, lanes=lanes, max_length=8)
    manifest = resolve(data, 42, tmp_path)
    plan = plan_lanes(manifest, lanes)
    owned = sorted((part.file, sample) for slices in plan for part in slices for sample in range(part.start, part.stop))
    assert owned == [(number, sample) for number, file in enumerate(manifest.files) for sample in range(file.train_samples)]
    windows = [len(stream) // data.max_length for stream in lane_streams(manifest, data, 42, 1)]
    assert min(windows) > 0.5 * max(windows)  # lengths differ by chance, too
    heavy = [dataclasses.replace(file, text_bytes=file.text_bytes * (3 if number else 1)) for number, file in enumerate(manifest.files)]
    loads = [
        sum(len(part) * 16 * heavy[part.file].text_bytes // heavy[part.file].rows for part in slices)
        for slices in plan_lanes(dataclasses.replace(manifest, files=heavy), lanes)
    ]
    assert min(loads) > 0.85 * max(loads)


def test_the_beginning_of_a_file_is_what_is_given_away(tmp_path):
    """Whoever gets a part of another lane's file reads no further than to its end."""
    write_files(tmp_path, [200] * 9)
    plan = plan_lanes(resolve(data_config(tmp_path, filter=None), 42, tmp_path), 8)
    assert sum(len(slices) == 2 for slices in plan) >= 7
    assert len({part.file for slices in plan for part in slices if part.start}) == 1


def test_lanes_and_batches_that_ranks_cannot_share_are_refused():
    check_shares(8, 16, 4)
    with pytest.raises(UserError, match=r"^data\.lanes: 8 lanes cannot be shared out among 16 ranks"):
        check_shares(8, 16, 16)
    with pytest.raises(UserError, match=r"^training\.batch_size: a global batch of 6 windows cannot be shared out among 4 ranks"):
        check_shares(8, 6, 4)


def test_another_seed_gives_another_order_and_another_split(corpus):
    manifest, data, _ = corpus
    first, second = (next(TrainingWindows(manifest, data, seed, 8, 1)).windows for seed in (42, 42))
    assert (first == second).all()
    other = resolve(data, 43, Path())
    assert (next(TrainingWindows(other, data, 43, 8, 1)).windows != first).any()


def test_epochs_are_counted_and_the_end_stays_the_end(corpus):
    manifest, data, _ = corpus
    batches = list(TrainingWindows(manifest, data, 42, 4, 2))
    epochs = [batch.epoch for batch in batches]
    assert epochs == sorted(epochs)
    assert set(epochs) == {0, 1}
    assert abs(epochs.count(0) - epochs.count(1)) < len(epochs) / 5
    assert not batches[0].ended
    assert list(TrainingWindows(manifest, data, 42, 4, 2, batches[-1].state)) == []


def test_a_state_is_small(tmp_path):
    write_files(tmp_path, [100] * 8)
    data = data_config(tmp_path, lanes=8, filter=None)
    *_, last = TrainingWindows(resolve(data, 1, tmp_path), data, 1, 4, 3)
    position = [1000, 10_000_000, 100_000, 10_000_000, 1000, 1000, 10_000_000, 10_000_000, 1000]
    large = {"slot": 10**9, "lanes": {str(lane): position for lane in range(8)}}
    assert last.state.keys() == large.keys()
    assert last.state["lanes"].keys() == large["lanes"].keys()
    assert {len(lane) for lane in last.state["lanes"].values()} == {9}
    assert len(json.dumps(large)) < 1000


def test_a_sample_longer_than_many_windows_is_resumed_inside(tmp_path):
    rows = write_files(tmp_path, [6])[0]
    data = data_config(tmp_path, filter=None, lanes=1, max_length=4, text_template="{id} {text} " + "a b c d e f g " * 30)
    manifest = resolve(data, 3, tmp_path)
    whole = list(TrainingWindows(manifest, data, 3, 2, 1))
    assert len(rows) == 6
    for number, batch in enumerate(whole[:-1]):
        following = next(TrainingWindows(manifest, data, 3, 2, 1, batch.state))
        assert (following.windows == whole[number + 1].windows).all()


def test_too_little_data_is_said_in_one_line(tmp_path):
    write_files(tmp_path, [20])
    data = data_config(tmp_path, filter=None, lanes=2, max_length=10_000)
    with pytest.raises(UserError, match=r"^data\.max_length: "):
        next(TrainingWindows(resolve(data, 1, tmp_path), data, 1, 4, 1))
    many = data_config(tmp_path, filter=None, lanes=200)
    with pytest.raises(UserError, match=r"^data\.lanes: 200 lanes, but only \d+ training samples"):
        TrainingWindows(resolve(many, 1, tmp_path), many, 1, 4, 1)


@pytest.mark.parametrize("threads", [1, 2, 3, 9])
def test_made_ahead_the_batches_and_their_states_are_the_same(corpus, threads):
    manifest, data, _ = corpus
    plain = list(TrainingWindows(manifest, data, 42, 4, 2))
    ahead = list(TrainingWindows(manifest, data, 42, 4, 2, threads=threads))
    assert [(batch.windows.tolist(), batch.state) for batch in ahead] == [(batch.windows.tolist(), batch.state) for batch in plain]


def test_closing_ends_the_threads(corpus):
    manifest, data, _ = corpus
    batches = TrainingWindows(manifest, data, 42, 1, 1000, threads=2)
    next(batches)
    assert [thread.name for thread in threading.enumerate()].count("stream") == 2
    batches.close()
    assert "stream" not in {thread.name for thread in threading.enumerate()}


def test_what_goes_wrong_ahead_is_raised_at_the_consumer_after_the_good_batches(corpus):
    manifest, data, _ = corpus
    whole = len(list(TrainingWindows(manifest, data, 42, 4, 1)))
    victim = Path(manifest.files[-1].url)
    healthy = victim.read_bytes()
    victim.write_bytes(healthy[: len(healthy) // 2])
    delivered = []
    with pytest.raises(UserError, match=r"^data\.path: part_004\.parquet changed since build-config"):
        delivered += TrainingWindows(manifest, data, 42, 4, 1, threads=2)
    assert len(delivered) < whole


def test_a_stop_is_heard_while_waiting_for_data(corpus, monkeypatch):
    manifest, data, _ = corpus
    never = threading.Event()
    monkeypatch.setattr(Reader, "samples", lambda *_: iter(never.wait, None))
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    batches = TrainingWindows(manifest, data, 42, 4, 1, threads=2, stopping=stop.is_set)
    with pytest.raises(Stopped):
        next(batches)
    never.set()


def test_odd_rows_are_counted_as_they_are_delivered(corpus):
    manifest, data, files = corpus
    rows = train_rows(manifest, data, 42, files)
    *_, last = batches = list(TrainingWindows(manifest, data, 42, 4, 1))
    literal = sum("<|endoftext|>" in (row["text"] or "") for row in rows)
    empty = sum(not row["text"] for row in rows)
    assert last.odd_rows == OddRows(empty_field=empty, end_of_text=literal)
    middle = batches[len(batches) // 2]
    *_, resumed = TrainingWindows(manifest, data, 42, 4, 1, middle.state)
    assert middle.odd_rows < resumed.odd_rows == last.odd_rows


def test_texts_are_not_changed_on_their_way(corpus):
    manifest, data, files = corpus
    rows = {tokens_of(row): text_of(row) for row in train_rows(manifest, data, 42, files)}
    for stream in lane_streams(manifest, data, 42, 1):
        for document in documents_in(stream):
            assert decode(list(document[:-1])) == rows[document]
