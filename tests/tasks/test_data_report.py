"""What `gpt2 data` finds out: right figures, before and after build-config, for any schema, from few rows, writing only its plot."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from fsspec.implementations.http import HTTPFileSystem

from model.errors import EXIT_USER, UserError
from model.stream.quickstart import corpus_rows, write_corpus
from model.stream.reader import document
from model.training.journal import Journal
from tasks import data_report as module
from tasks.build_config import build_config
from tasks.data_report import DataReport, data_report
from tasks.project import Project
from tests.model.stream.servers import FileServer

NAME = "some"
REAL_TEXT = Path(__file__).parents[3] / "shared/data/wiki-synth"


def make_project(root: Path, **data: Any) -> Project:
    own = {"model": {"preset": "nano"}, "data": {"max_length": 16, **data}, "training": {"batch_size": 2, "gradient_accumulation": 3}}
    (root / "params.yaml").write_text(yaml.safe_dump({"defaults": {}, "experiments": {NAME: own}}))
    (root / "dvc.yaml").write_text("stages: {}\n")
    return Project(root)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """An experiment over a small corpus in SYNTH's shape, in three files."""
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "corpus", seed=1, rows=600, files=3)
    return make_project(tmp_path, path="corpus")


def write_rows(folder: Path, rows: list[dict[str, Any]], files: int = 1, **types: pa.DataType) -> None:
    folder.mkdir()
    for number in range(files):
        table = pa.Table.from_pylist(rows[number::files], schema=pa.schema(list(types.items())) if types else None)
        pq.write_table(table, folder / f"part_{number:02}.parquet")


def without_speeds(report: DataReport) -> dict[str, Any]:
    return {key: value for key, value in report.as_json().items() if key != "stream_tokens_per_s"}


def written(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_the_figures_are_those_of_the_data(project: Project) -> None:
    template = "Q: {query}\n\nReasoning:\n{synthetic_reasoning}\n\nA: {synthetic_answer}"
    english = [row for row in corpus_rows(1, 600) if row["language"] == "en"]
    texts = {row["synth_id"]: template.format_map({key: value or "" for key, value in row.items()}) for row in english}
    lengths = sorted(len(document(text)) for text in texts.values())
    report = data_report(project, NAME, 5)

    assert (report.files, report.samples) == (3, len(english))
    assert report.bytes == sum(file.stat().st_size for file in (project.root / "corpus").iterdir())
    assert Path(report.location) == project.root / "corpus"
    assert (report.sampled_rows, report.sampled_files) == (len(english), 3), "a corpus smaller than the sample is the sample"
    assert report.tokens.mean == round(sum(lengths) / len(lengths), 1)
    assert report.tokens.max == lengths[-1]
    for share, length in ((0.05, report.tokens.p5), (0.5, report.tokens.median), (0.95, report.tokens.p95)):
        assert sum(other <= length for other in lengths) >= share * len(lengths)
        assert sum(other < length for other in lengths) < share * len(lengths)
    assert report.odd_rows["empty_field"] == sum(not row["synthetic_reasoning"] for row in english) > 0

    assert {part: share.sampled for part, share in report.split.items()} == {part: share.samples for part, share in report.split.items()}
    assert sum(share.samples for share in report.split.values()) == len(english)
    assert all(share.samples > 0 for share in report.split.values())
    assert report.epoch.tokens == pytest.approx(report.split["train"].samples * sum(lengths) / len(lengths), rel=0.01)
    assert report.epoch.windows == report.epoch.tokens // 16
    assert report.epoch.steps == pytest.approx(report.epoch.windows / 6, abs=1)
    assert report.planned_steps == pytest.approx(report.epoch.steps, rel=0.02)

    assert len(report.shown) == 5
    for sample in report.shown:
        assert sample.text == texts[sample.id]
        assert sample.tokens == len(document(sample.text))
        assert sample.characters == len(sample.text)


def test_samples_are_shown_in_the_part_they_are_trained_or_tested_in(project: Project) -> None:
    report = data_report(project, NAME, 1000)
    assert len(report.shown) == report.samples
    assert Counter(sample.part for sample in report.shown) == {part: share.samples for part, share in report.split.items()}


def test_before_build_config_only_the_plot_is_written_and_the_answer_is_the_same_again(project: Project) -> None:
    before = written(project.root)
    first = data_report(project, NAME, 3)
    new = {name: content for name, content in written(project.root).items() if name not in before}
    assert list(new) == [f"runs/{NAME}/report/document_lengths.svg"]
    assert first.built is False
    assert without_speeds(data_report(project, NAME, 3)) == without_speeds(first)
    assert {name: content for name, content in written(project.root).items() if name not in before} == new, "equal bytes"


def test_after_build_config_nothing_is_looked_up_again_while_the_data_are_the_same_ones(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = data_report(project, NAME, 3)
    build_config(project, NAME)
    looked_up = []
    resolve = module.resolve
    monkeypatch.setattr(module, "resolve", lambda *arguments: looked_up.append(arguments) or resolve(*arguments))
    report = data_report(project, NAME, 3)
    assert without_speeds(report) == {**without_speeds(before), "built": True}
    project.record_overrides(NAME, {"data": {"max_length": 8, "lanes": 2}, "training": {"learning_rate": 0.1}})
    assert data_report(project, NAME, 0).epoch.windows == pytest.approx(2 * report.epoch.windows, abs=1)
    assert not looked_up

    for change in ({"data": {"filter": "language == 'fr'"}}, {"data": {"train_ratio": 0.5}}, {"data": {"num_samples": 100}}, {"seed": 1}):
        project.record_overrides(NAME, change)
        other = data_report(project, NAME, 0)
        assert other.built is False
        assert other.split != report.split
    assert len(looked_up) == 4

    project.record_overrides(NAME, {})
    manifest = project.run_folder(NAME).dataset
    manifest.write_text(manifest.read_text().replace("synth_001", "synth_009"))
    assert data_report(project, NAME, 0).built is False, "a damaged manifest is not believed"


def test_a_relative_path_means_the_same_from_any_folder(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.root / "corpus")
    assert data_report(project, NAME, 0).files == 3
    assert Path.cwd() == project.root / "corpus"


def test_another_schema_by_configuration_alone(tmp_path: Path) -> None:
    rows = [{"uuid": n, "body": f"Story {n} has {n % 7} lines." * (1 + n % 3), "stars": n % 5} for n in range(300)]
    write_rows(tmp_path / "stories", rows)
    fields = {"text_template": "* {body}", "id_column": "uuid", "article_column": None, "filter": "stars > 2", "train_ratio": 0.8}
    project = make_project(tmp_path, path=str(tmp_path / "stories"), **fields)
    report = data_report(project, NAME, 4)
    assert report.samples == sum(row["stars"] > 2 for row in rows)
    assert 0.7 < report.split["train"].share < 0.9
    assert [sample.text for sample in report.shown] == [f"* {rows[int(sample.id)]['body']}" for sample in report.shown]
    build_config(project, NAME)
    assert without_speeds(data_report(project, NAME, 4)) == {**without_speeds(report), "built": True}


def test_odd_rows_are_counted_and_shown_as_they_are_read(tmp_path: Path) -> None:
    bodies = [None, b"", b"caf\xe9", b"one <|endoftext|> two", b"plain", "naïve".encode()]
    rows = [{"uuid": f"u{number}", "body": body} for number, body in enumerate(bodies)]
    write_rows(tmp_path / "odd", rows, uuid=pa.string(), body=pa.binary())
    fields = {"text_template": "{body}", "id_column": "uuid", "article_column": None, "filter": None}
    report = data_report(make_project(tmp_path, path=str(tmp_path / "odd"), **fields), NAME, 6)
    assert report.odd_rows == {"empty_field": 2, "not_utf8": 1, "end_of_text": 1}
    assert [sample.text for sample in report.shown] == ["", "", "caf\ufffd", "one <|endoftext|> two", "plain", "naïve"]
    assert report.shown[0].tokens == 1


def test_of_many_files_and_rows_the_beginnings_of_some_are_read_and_of_long_texts_both_ends_are_kept(tmp_path: Path) -> None:
    rows = [{"uuid": f"{number}", "body": "begin " + "middle " * 1000 + "end"} for number in range(20_000)]
    write_rows(tmp_path / "many", rows, files=40)
    fields = {"text_template": "{body}", "id_column": "uuid", "article_column": None, "filter": None}
    report = data_report(make_project(tmp_path, path=str(tmp_path / "many"), **fields), NAME, 2)
    assert (report.files, report.samples) == (40, 20_000)
    assert report.sampled_files <= 16
    assert 2048 <= report.sampled_rows < 2200
    assert sum(share.samples for share in report.split.values()) == 20_000
    for sample in report.shown:
        assert sample.text.startswith("begin ")
        assert sample.text.endswith(" end")
        assert len(sample.text) < 1000 < sample.characters


def test_the_time_of_an_epoch_is_known_once_some_steps_were_trained(project: Project) -> None:
    build_config(project, NAME)
    report = data_report(project, NAME, 0)
    assert (report.training_speed, report.epoch.seconds) == (None, None)
    assert report.stream_tokens_per_s > 0
    journal = Journal(project.run_folder(NAME).journal)
    journal.append("started", step=0, device="cpu")
    for step, speed in enumerate([7, 500, 1000, 900, 100_000]):
        journal.append("step", step=step + 1, tokens_per_s=speed)
    journal.close()
    report = data_report(project, NAME, 0)
    assert report.training_speed is not None
    assert report.as_json()["training_speed"] == {"tokens_per_s": 900, "steps": 5, "device": "cpu"}
    assert report.epoch.seconds == pytest.approx(report.epoch.tokens / 900, abs=0.1)
    project.record_overrides(NAME, {"model": {"n_layer": 5}})
    assert data_report(project, NAME, 0).training_speed is None, "another model takes another time"


def test_the_json_has_the_documented_keys(project: Project) -> None:
    found = json.loads(json.dumps(data_report(project, NAME, 1).as_json()))
    assert set(found) == {
        *("experiment", "path", "location", "revision", "built", "files", "bytes", "left_out", "filter", "samples", "split"),
        *("sampled_rows", "sampled_files", "tokens", "odd_rows", "shown", "max_length", "global_batch", "epoch", "planned_steps"),
        *("training_speed", "stream_tokens_per_s", "plot"),
    }
    assert list(found["split"]) == ["train", "choose", "report"]
    assert all(set(share) == {"sampled", "share", "samples"} for share in found["split"].values())
    assert set(found["tokens"]) == {"mean", "median", "p5", "p95", "max"}
    assert set(found["epoch"]) == {"tokens", "windows", "steps", "seconds"}
    assert set(found["shown"][0]) == {"id", "part", "tokens", "characters", "text"}


@pytest.mark.parametrize("lengths", [[5], [1, 1, 1, 1], [3, 40, 5000]], ids=["one", "equal", "wide"])
def test_the_plot_is_an_image_with_labels_that_are_text(tmp_path: Path, lengths: list[int]) -> None:
    rows = [{"uuid": f"{number}", "body": "a " * (length - 1)} for number, length in enumerate(lengths * 20)]
    write_rows(tmp_path / "few", rows)
    fields = {"text_template": "{body}", "id_column": "uuid", "article_column": None, "filter": None}
    report = data_report(make_project(tmp_path, path=str(tmp_path / "few"), **fields), NAME, 0)
    svg = ElementTree.parse(report.plot).getroot()
    assert svg.tag == "{http://www.w3.org/2000/svg}svg"
    labels = ["".join(label.itertext()) for label in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert f"{NAME}: how long the documents are" in labels
    assert "tokens in a document, end-of-text included" in labels
    assert f"documents, of {len(rows)} sampled" in labels
    assert f"median {report.tokens.median}" in labels
    assert ("1,000" in labels) == (max(lengths) > 1000), "a long tail has a logarithmic axis with plain numbers"
    assert "e+" not in "".join(labels)


def test_data_that_are_not_there_are_named(tmp_path: Path, project: Project) -> None:
    with pytest.raises(UserError, match=r"nothing"):
        data_report(project, "nothing", 0)
    build_config(project, NAME)
    (project.root / "corpus/synth_002.parquet").unlink()
    with pytest.raises(UserError, match=r"data\.path: synth_002\.parquet"):
        data_report(project, NAME, 0)
    project.record_overrides(NAME, {"data": {"path": "elsewhere"}})
    with pytest.raises(UserError, match=r"data\.path: elsewhere"):
        data_report(project, NAME, 0)
    assert not project.run_folder(NAME).report.exists()


def test_damaged_files_can_be_left_out(project: Project) -> None:
    build_config(project, NAME)
    damaged = project.root / "corpus/synth_002.parquet"
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    with pytest.raises(UserError, match=r"synth_002\.parquet"):
        data_report(project, NAME, 0)
    project.record_overrides(NAME, {"data": {"quarantine": True}})
    report = data_report(project, NAME, 0)
    assert (report.files, report.sampled_files) == (2, 2)
    assert [fault for fault in report.left_out if "synth_002.parquet" in fault]


def test_a_server_that_went_away_is_named_within_seconds(tmp_path: Path, project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ANSWER_S", 0.5)
    files = {f"corpus/{file.name}": file.read_bytes() for file in (project.root / "corpus").iterdir()}
    with FileServer(files) as server:
        project.record_overrides(NAME, {"data": {"path": f"{server.url}/corpus"}})
        build_config(project, NAME)
        report = data_report(project, NAME, 2)
        assert (report.built, report.files, report.location) == (True, 3, f"{server.url}/corpus")
    HTTPFileSystem.clear_instance_cache()  # and its open connections
    with pytest.raises(UserError, match=r"data\.path: .*cannot be reached"):
        data_report(project, NAME, 2)


def test_a_hub_that_cannot_be_reached_is_one_line(project: Project) -> None:
    project.record_overrides(NAME, {"data": {"path": "PleIAs/SYNTH"}})
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "127.0.0.1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "flows.cli", "data", NAME, "--json"]
    done = subprocess.run(command, cwd=project.root, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (EXIT_USER, "")
    assert done.stderr.count("\n") == 1
    assert "data.path: PleIAs/SYNTH cannot be reached" in done.stderr
    assert not project.run_folder(NAME).path.exists()


def test_real_prose(tmp_path: Path) -> None:
    if not REAL_TEXT.is_dir():
        pytest.skip("needs the SYNTH-shaped shards of wiki-synth beside the project")
    report = data_report(make_project(tmp_path, path=str(REAL_TEXT)), NAME, 3)
    assert (report.files, report.sampled_files, report.sampled_rows) == (8, 8, 2048)
    assert 0.88 < report.split["train"].share < 0.92
    assert 100 < report.tokens.p5 < report.tokens.median < report.tokens.mean < report.tokens.p95 < 300
    assert report.planned_steps == pytest.approx(report.epoch.steps, rel=0.03), "build-config's own estimate, from fewer rows"
    assert all(sample.text.startswith("Q: ") and "\n\nReasoning:\n" in sample.text for sample in report.shown)
