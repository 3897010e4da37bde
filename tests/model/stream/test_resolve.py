"""Local data: what is found, what is refused, and what the manifest says of it."""

import dataclasses
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from corpora import SCHEMA, data_config, make_rows, tokens_of, write_file, write_files

from model.errors import UserError
from model.stream import quickstart
from model.stream.batches import TrainingWindows
from model.stream.manifest import DatasetManifest
from model.stream.reader import Reader
from model.stream.resolve import resolve


def names(path, folder):
    return [file.name for file in resolve(data_config(path, filter=None), 1, folder).files]


def test_a_folder_a_glob_and_a_file(tmp_path):
    for name in ("b.parquet", "a.parquet", "deep/c.parquet", ".hidden/d.parquet", "empty.parquet"):
        write_file(tmp_path / "data" / name, make_rows(0 if "empty" in name else 5))
    (tmp_path / "data" / "notes.txt").write_text("not data")
    assert names(tmp_path / "data", tmp_path) == ["a.parquet", "b.parquet", "deep/c.parquet"]
    assert names(tmp_path / "data" / "[ab].parquet", tmp_path) == ["a.parquet", "b.parquet"]
    assert names(f"{tmp_path}/data/**/*.parquet", tmp_path) == ["a.parquet", "b.parquet", "deep/c.parquet"]
    assert names(tmp_path / "data" / "b.parquet", tmp_path) == ["b.parquet"]


def test_a_relative_folder_that_looks_like_a_hub_id_is_local(tmp_path, monkeypatch):
    write_files(tmp_path / "PleIAs" / "SYNTH", [5])
    monkeypatch.chdir(tmp_path)
    manifest = resolve(data_config("PleIAs/SYNTH", filter=None), 1, tmp_path)
    assert manifest.revision is None
    monkeypatch.chdir("/")
    assert next(Reader(data_config("x", filter=None), 1).samples(manifest.files[0], ["train"], ["id"])) is not None


def test_a_copy_elsewhere_has_the_same_digest_and_changed_bytes_another(tmp_path):
    write_files(tmp_path / "one", [20, 20])
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    one, two = (resolve(data_config(tmp_path / folder), 1, tmp_path) for folder in ("one", "two"))
    assert one.digest == two.digest
    assert one.files != two.files
    write_file(tmp_path / "two" / "part_001.parquet", make_rows(20, seed=99))
    assert resolve(data_config(tmp_path / "two"), 1, tmp_path).digest != one.digest
    assert resolve(data_config(tmp_path / "one", filter=None), 1, tmp_path).digest != one.digest


def test_a_manifest_is_read_as_it_was_written(tmp_path):
    write_files(tmp_path, [20, 20])
    manifest = resolve(data_config(tmp_path), 1, tmp_path)
    manifest.write(tmp_path / "dataset.json")
    assert DatasetManifest.read(tmp_path / "dataset.json") == manifest
    changed = dataclasses.replace(manifest, files=manifest.files[:1])
    changed.write(tmp_path / "other.json")
    text = (tmp_path / "other.json").read_text()
    (tmp_path / "other.json").write_text(text.replace(changed.digest, manifest.digest))
    for path in (tmp_path / "other.json", tmp_path / "missing.json", Path(manifest.files[0].url)):
        with pytest.raises(UserError, match="run build-config again"):
            DatasetManifest.read(path)


def test_tokens_per_sample_is_the_mean(tmp_path):
    rows = [row for file in write_files(tmp_path, [60, 50]) for row in file]
    mean = sum(len(tokens_of(row)) for row in rows) / len(rows)
    assert resolve(data_config(tmp_path, filter=None), 1, tmp_path).tokens_per_sample == pytest.approx(mean, abs=0.01)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"filter": "lang == 'en'"}, r"^data\.filter: part_000\.parquet has no column 'lang'; it has id, article, language, text, words$"),
        ({"filter": "language == 5"}, r"^data\.filter: language == 5 does not fit"),
        ({"filter": "words == 'many'"}, r"^data\.filter: words == 'many' does not fit"),
        ({"filter": "language == 'zz'"}, r"^data\.path: .* has no row that passes data\.filter: language == 'zz'$"),
        ({"filter": "language = 'en'"}, r"^data\.filter: "),
        ({"text_template": "{query}"}, r"^data\.text_template: part_000\.parquet has no column 'query'"),
        ({"id_column": "key"}, r"^data\.id_column: part_000\.parquet has no column 'key'"),
        ({"article_column": "url"}, r"^data\.article_column: part_000\.parquet has no column 'url'"),
    ],
)
def test_what_does_not_fit_the_columns_is_named(tmp_path, fields, message):
    write_files(tmp_path, [5])
    with pytest.raises(UserError, match=message) as caught:
        resolve(data_config(tmp_path, **fields), 1, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_column_that_is_not_text_is_named(tmp_path):
    schema = pa.schema([*(field for field in SCHEMA if field.name != "text"), ("text", pa.list_(pa.string()))])
    write_file(tmp_path / "a.parquet", [{"id": "1", "text": ["x"]}], schema)
    with pytest.raises(UserError, match=r"^data\.text_template: column 'text' of a\.parquet is list<.*>, not text"):
        resolve(data_config(tmp_path, filter=None), 1, tmp_path)


def test_data_without_articles(tmp_path):
    schema = pa.schema([("id", pa.string()), ("text", pa.string())])
    write_file(tmp_path / "a.parquet", [{"id": str(number), "text": "t"} for number in range(200)], schema)
    manifest = resolve(data_config(tmp_path, filter=None, article_column=None), 1, tmp_path)
    assert 150 < manifest.train_samples < 200


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nothing", "nothing", "/nowhere/*.parquet", "C:\\data\\files", "~nobody/x"])
def test_a_path_that_leads_nowhere(tmp_path, path):
    with pytest.raises(UserError, match=r"^data\.path: .* names no parquet files"):
        resolve(data_config(path), 1, tmp_path)


@pytest.mark.parametrize("damage", ["text", "cut", "empty", "footer", "middle"])
def test_a_damaged_file_is_named(tmp_path, damage):
    rows = make_rows(3000)
    write_file(tmp_path / "bad.parquet", rows)
    healthy = (tmp_path / "bad.parquet").read_bytes()
    noise = bytes(range(256)) * 200
    broken = {
        "text": b"these are not the bytes you look for",
        "cut": healthy[: len(healthy) // 2],
        "empty": b"",
        "footer": healthy[:-200] + noise[:190] + healthy[-10:],
        "middle": healthy[:300] + noise[: len(healthy) // 2] + healthy[300 + len(noise[: len(healthy) // 2]) :],
    }[damage]
    (tmp_path / "bad.parquet").write_bytes(broken)
    with pytest.raises(UserError, match=r"^data\.path: bad\.parquet is damaged or not a parquet file") as caught:
        resolve(data_config(tmp_path), 1, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_file_that_changed_since_is_refused(tmp_path):
    write_files(tmp_path, [40, 40])
    data = data_config(tmp_path, filter=None)
    manifest = resolve(data, 1, tmp_path)
    list(TrainingWindows(manifest, data, 1, 4, 1))
    write_file(tmp_path / "part_001.parquet", make_rows(41, seed=5))
    with pytest.raises(UserError, match=r"^data\.path: part_001\.parquet changed since build-config"):
        list(TrainingWindows(manifest, data, 1, 4, 1))
    (tmp_path / "part_001.parquet").unlink()
    with pytest.raises(UserError, match=r"^data\.path: part_001\.parquet cannot be opened"):
        list(TrainingWindows(manifest, data, 1, 4, 1))


def test_the_generated_corpus_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "DEFAULT_ROWS", 400)
    fields = {"id_column": "synth_id", "article_column": "query_seed_url", "text_template": "{query} {synthetic_answer}"}
    first = resolve(data_config("quickstart", **fields), 42, tmp_path)
    stamps = {file.name: Path(file.url).stat().st_mtime_ns for file in first.files}
    assert first.path == "quickstart"
    assert 0 < first.train_samples < first.samples <= 400
    assert Path(first.files[0].url).is_relative_to(tmp_path / "datasets")
    again = resolve(data_config("quickstart", **fields), 42, tmp_path)
    assert again == first
    assert {file.name: Path(file.url).stat().st_mtime_ns for file in again.files} == stamps
