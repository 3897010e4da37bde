"""Data behind a URL: the same samples as from a folder, whatever happens on the way, and no byte too many."""

import contextlib
import email.utils
import math
import random
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import SCHEMA, data_config, make_rows, write_file, write_files
from servers import FileServer

from model.errors import Stopped, UserError
from model.stream import reader, source
from model.stream.batches import TrainingWindows
from model.stream.resolve import resolve

pytestmark = pytest.mark.slow


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*.parquet")}


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "data"
    write_files(folder / "deep", [150, 150, 150])
    local = resolve(data_config(folder), 42, tmp_path)
    with FileServer(contents(tmp_path)) as server:
        yield server, local, data_config(folder), data_config(f"{server.url}/data")


def windows(manifest, data):
    return [batch.windows.tolist() for batch in TrainingWindows(manifest, data, 42, 4, 2)]


def test_a_folder_a_glob_and_a_file_behind_http(corpus, tmp_path):
    server, local, at_home, _ = corpus
    names = [file.name.split("/")[-1] for file in local.files]
    for url in (f"{server.url}/data", f"{server.url}/data/", f"{server.url}/data/deep/*.parquet"):
        data = data_config(url)
        manifest = resolve(data, 42, tmp_path)
        assert [file.name for file in manifest.files] == names
        assert manifest.samples == local.samples
        assert windows(manifest, data) == windows(local, at_home)
    single = resolve(data_config(f"{server.url}/data/deep/part_001.parquet"), 42, tmp_path)
    assert [(file.name, file.rows) for file in single.files] == [("part_001.parquet", 150)]
    assert single.files[0].digest is not None


def test_another_fsspec_file_system(corpus, tmp_path):
    import fsspec

    _, local, at_home, _ = corpus
    memory = fsspec.filesystem("memory")
    for file in local.files:
        memory.pipe(f"/bucket/{file.name}", Path(file.url).read_bytes())
    data = data_config("memory://bucket")
    assert windows(resolve(data, 42, tmp_path), data) == windows(local, at_home)


@pytest.mark.parametrize("fault", [500, 503, 429, "reset", "short", "less", "stall", "half", "trickle"])
def test_a_passing_fault_changes_nothing(corpus, tmp_path, monkeypatch, fault):
    server, local, at_home, away = corpus
    monkeypatch.setattr(source, "_ANSWER_S", 0.5)
    server.faults.append(fault)  # the first request for data: a footer
    manifest = resolve(away, 42, tmp_path)
    assert not server.faults
    stream, delivered = TrainingWindows(manifest, away, 42, 4, 2), []
    for number, batch in enumerate(stream):
        delivered.append(batch.windows.tolist())
        if number == 3:
            server.faults.append(fault)  # one in the middle
    assert not server.faults
    assert delivered == windows(local, at_home)


def test_a_fault_that_stays_stops_resumably_and_names_the_file(corpus, tmp_path, monkeypatch):
    server, local, at_home, away = corpus
    monkeypatch.setattr(source, "SILENCE_S", 1.0)
    manifest = resolve(away, 42, tmp_path)
    stream = TrainingWindows(manifest, away, 42, 4, 2)
    delivered = [next(stream) for _ in range(2)]
    server.broken = dict.fromkeys(server.files, 503)
    with pytest.raises(Stopped, match=r"^data\.path: \S*part_00\d\.parquet could not be read for \d s .*503"):
        delivered.extend(stream)
    server.broken = {}
    delivered.extend(TrainingWindows(manifest, away, 42, 4, 2, delivered[-1].state))
    assert [batch.windows.tolist() for batch in delivered] == windows(local, at_home)


@pytest.mark.parametrize(("fault", "threads"), [("stall", 0), ("half", 2), ("trickle", 0)])
def test_silence_ends_in_time_and_names_the_file(corpus, tmp_path, monkeypatch, fault, threads):
    server, *_, away = corpus
    manifest = resolve(away, 42, tmp_path)
    monkeypatch.setattr(source, "SILENCE_S", 1.5)
    monkeypatch.setattr(source, "_ANSWER_S", 0.6)
    server.broken = {"data/deep/part_001.parquet": fault}
    began = time.monotonic()
    with (
        contextlib.closing(TrainingWindows(manifest, away, 42, 4, 2, threads=threads)) as stream,
        pytest.raises(Stopped, match=r"^data\.path: part_001\.parquet could not be read for \d s .*; the same command goes on from here$"),
    ):
        for _ in stream:
            pass
    assert 1 < time.monotonic() - began < 5
    assert len(server.spoiled) > 1  # it was asked again


@pytest.mark.parametrize("how", ["seconds", "date", "the Hub's RateLimit"])
def test_a_server_that_says_when_to_come_back_is_obeyed(corpus, tmp_path, monkeypatch, how):
    """Also when it asks for more than a silent one would be granted."""
    server, local, at_home, away = corpus
    manifest = resolve(away, 42, tmp_path)
    monkeypatch.setattr(source, "SILENCE_S", 1.0)
    back = math.ceil(time.time()) + 3
    headers = {
        "seconds": {"Retry-After": "2"},
        "date": {"Retry-After": email.utils.formatdate(back, usegmt=True)},
        "the Hub's RateLimit": {"RateLimit": '"resolvers";r=0;t=2'},
    }[how]
    server.requests.clear()
    server.times.clear()
    server.faults.append((429, headers))
    assert windows(manifest, away) == windows(local, at_home)
    (refused,) = server.spoiled
    asked = back if how == "date" else server.times[refused] + 2
    path = server.requests[refused][1]
    later = [when for when, request in zip(server.times, server.requests, strict=True) if request[1] == path][1:]
    after = [when for when in later if when > server.times[refused]]
    assert asked - 0.01 < min(after) < asked + 2


def test_also_the_first_look_at_a_file_may_fail_and_is_put_off_as_asked(corpus, tmp_path, monkeypatch):
    server, local, at_home, away = corpus
    manifest = resolve(away, 42, tmp_path)
    monkeypatch.setattr(source, "SILENCE_S", 0.9)
    server.refused = 4  # twice a HEAD, and the GET with which fsspec makes sure
    assert windows(manifest, away) == windows(local, at_home)
    assert not server.refused


@pytest.mark.parametrize(("asks", "patience"), [("3600", 600.0), ("1", 2.5)])
def test_a_server_that_puts_off_for_ever_is_not_waited_for(corpus, tmp_path, monkeypatch, asks, patience):
    server, *_, away = corpus
    manifest = resolve(away, 42, tmp_path)
    monkeypatch.setattr(source, "_PATIENCE_S", patience)
    server.broken = dict.fromkeys(server.files, (503, {"Retry-After": asks}))
    began = time.monotonic()
    with pytest.raises(Stopped, match=r"part_00\d\.parquet could not be read for \d s .*503"):
        windows(manifest, away)
    assert time.monotonic() - began < 4


@pytest.mark.parametrize("status", [403, 404])
def test_what_will_not_pass_is_not_tried_again(corpus, tmp_path, status):
    server, *_, away = corpus
    server.broken = dict.fromkeys(server.files, status)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"^data\.path: \S*part_000\.parquet (cannot be read|is damaged)"):
        resolve(away, 42, tmp_path)
    assert time.monotonic() - started < 5


def test_a_file_that_changed_under_its_url_is_refused(corpus, tmp_path):
    server, *_, away = corpus
    manifest = resolve(away, 42, tmp_path)
    path = "data/deep/part_001.parquet"
    healthy = server.files[path]
    for changed in (healthy + b"more", bytes([healthy[0] ^ 1]) + healthy[1:]):
        server.files[path] = changed
        with pytest.raises(UserError, match=r"^data\.path: part_001\.parquet changed since build-config"):
            windows(manifest, away)


def test_a_file_that_changed_while_it_was_read_is_refused_when_it_is_opened_again(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "_READ_BYTES", 2000)
    monkeypatch.setattr(reader, "_BATCH_ROWS", 20)
    table = pa.Table.from_pylist(make_rows(1000), schema=SCHEMA)
    pq.write_table(table, tmp_path / "part_000.parquet", data_page_size=2000, write_batch_size=20, use_dictionary=False)
    with FileServer(contents(tmp_path)) as server:
        data = data_config(f"{server.url}/part_000.parquet", lanes=1)
        manifest = resolve(data, 42, tmp_path)
        stream = TrainingWindows(manifest, data, 42, 4, 1)
        next(stream)
        healthy = server.files["part_000.parquet"]
        server.files["part_000.parquet"] = bytes([healthy[0] ^ 1]) + healthy[1:]
        server.faults.append("reset")
        with pytest.raises(UserError, match=r"^data\.path: part_000\.parquet changed since build-config \(its digest is"):
            list(stream)
        assert not server.faults


def test_a_server_without_ranges_is_named(corpus, tmp_path):
    server, *_, away = corpus
    server.ranges = False
    with pytest.raises(UserError, match=r"^data\.path: part_000\.parquet cannot be read \(ValueError: The HTTP server doesn't appear"):
        resolve(away, 42, tmp_path)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:1/x.parquet", r"x\.parquet cannot be reached"),
        ("nosuch://bucket/x", r"nosuch://bucket/x: "),
        ("{server}/nothing/x.parquet", r"x\.parquet cannot be read"),
        ("{server}/nothing", r"nothing"),
    ],
)
def test_a_url_that_leads_nowhere(corpus, tmp_path, url, message):
    server = corpus[0]
    with pytest.raises(UserError, match=rf"^data\.path: .*{message}"):
        resolve(data_config(url.format(server=server.url)), 42, tmp_path)


def test_only_the_needed_columns_are_fetched(tmp_path):
    rng = random.Random(1)
    rows = [{"id": f"{n}", "article": f"a{n % 90}", "language": "en", "text": rng.randbytes(400).hex(), "words": n} for n in range(9000)]
    write_file(tmp_path / "big.parquet", rows)
    group = pq.read_metadata(tmp_path / "big.parquet").row_group(0)
    sizes = {group.column(index).path_in_schema: group.column(index).total_compressed_size for index in range(group.num_columns)}
    with FileServer(contents(tmp_path)) as server:
        data = data_config(f"{server.url}/big.parquet", text_template="{text}", lanes=1)
        manifest = resolve(data.model_copy(update={"text_template": "{words}"}), 42, tmp_path)
        counted, footer = server.sent, 70_000
        assert counted < 1.15 * (2 * (sizes["language"] + sizes["article"]) + sizes["words"]) + 3 * footer
        server.sent = 0
        for _ in TrainingWindows(manifest, data, 42, 8, 1):
            pass
        needed = sizes["language"] + sizes["article"] + sizes["text"]
        assert needed < server.sent < 1.15 * needed + footer
