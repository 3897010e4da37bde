"""The report of a run: one page that is whole by itself, shows each step once, and says what is measured and what is assumed."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import random
import re
import shlex
import socket
import threading
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from model.digest import checked_line
from model.errors import UserError
from model.evaluation.score_store import store_scores
from model.evaluation.scores import Scores
from model.params import parse_overrides, write_yaml
from tasks import tracking
from tasks.overview import gain_line
from tasks.project import Project
from tasks.report import charts, publish
from tasks.report.costs import costs
from tasks.report.facts import SHOWN_AT_ONCE, gather, picked, train_command
from tasks.report.history import history
from tasks.report.page import page, write_report
from tests.tasks.conftest import NAME, Server, write_config

STEPS = 40
PER_STEP = 128


class Journal:
    """A journal in the making: a second a step, unless told otherwise."""

    def __init__(self, project: Project) -> None:
        self.folder = project.run_folder(NAME)
        self.digest = tracking.read_config(self.folder).digest
        self.events: list[dict[str, Any]] = []
        self.now = 1_795_000_000.0

    def add(self, event: str, seconds: float = 0.0, **fields: Any) -> None:
        self.now += seconds
        self.events.append({"seq": len(self.events), "time": self.now, "event": event, **fields})

    def started(self, step: int = 0, **fields: Any) -> None:
        about = {"step": step, "config_digest": self.digest, "resumed_from": f"step_{step:08d}" if step else None, "total_steps": STEPS}
        about |= {"device": "cpu", "device_name": "cpu", "ranks": 1, "threads": 2, "precision": "fp32", "parameters": 1_637_792}
        about |= {"versions": {"torch": "2.13.0"}, "code": {"commit": "c" * 40, "diff_sha256": None}}
        self.add("started", 0.0, **{**about, **fields})

    def steps(self, first: int, last: int, seconds: float = 1.0, **fields: Any) -> None:
        for step in range(first, last + 1):
            about = {"epoch": 0, "learning_rate": 3e-4 * min(1, step / 5), "gradient_norm": 1 / step, "tokens": PER_STEP * step}
            about |= {"loss": 10 / step**0.5, "tokens_per_s": round(PER_STEP / (seconds or 1)), "step_time_s": seconds}
            self.add("step", seconds, step=step, **{**about, **fields})

    def validated(self, step: int, seconds: float = 0.5) -> None:
        self.add("validation", seconds, step=step, loss=10 / step**0.5 + 0.1, bits_per_byte=1.5, windows=4)

    def write(self) -> None:
        self.folder.journal.write_bytes(b"".join(map(checked_line, self.events)))


@pytest.fixture
def journal(new_project: Project) -> Journal:
    return Journal(new_project)


@pytest.fixture
def trained(new_project: Project, journal: Journal) -> Project:
    """A finished training that was never registered, never evaluated."""
    journal.started()
    journal.steps(1, STEPS)
    journal.validated(STEPS)
    journal.add("finished", step=STEPS, tokens=PER_STEP * STEPS, checkpoint="step_00000040", digest="e" * 64, model_sha256="f" * 64)
    journal.write()
    return new_project


def evaluate(project: Project, count: int = 3, champion: int = 1, **more: Any) -> list[dict[str, Any]]:
    """Scores as evaluate-each-checkpoint leaves them, of `count` checkpoints; the rows of scores.json."""
    folder = project.run_folder(NAME)
    rows = []
    for number in range(count):
        digest, key = f"{number:064x}", f"{number:03d}" * 20
        row = {"name": f"step_{10 * number + 10:08d}", "step": 10 * number + 10, "digest": digest, "version": str(number + 1), "key": key}
        row |= {"validation_loss": None, "answer_bits_per_byte": 1.5 - 0.1 * number, "exact_match": 0.25, "questions": 8, "items": 8}
        row |= {"intervals": {"answer_bits_per_byte": [1.4 - 0.1 * number, 1.6 - 0.1 * number], "exact_match": [0.125, 0.375]}}
        rows.append({**row, "champion": number == champion, "best": number == count - 1, "reason": f"takes over: reason {number}", **more})
        kinds = [("add", 1.0), ("add", 0.0), ("sort", 0.0)]
        items = [{"half": "report", "exercise": kind, "exact_match": right} for kind, right in kinds]
        samples = [{"prompt": f"Q: {prompt}\n", "text": f"{prompt} at {row['step']}"} for prompt in ("Why?", "<script>alert(1)</script>")]
        store_scores(folder.evaluation, key, Scores({"exact_match": 0.25}, {"exact_match.add": (0.1, 0.9)}, items, samples))
    marked = {key: rows[champion][key] for key in ("name", "digest", "version")}
    folder.registered.write_text(json.dumps([{**row, "run_id": "0123456789abcdef"} for row in rows]))
    folder.scores.write_text(json.dumps({"champion": marked, "best": marked, "evaluation_set": "5" * 64, "checkpoints": rows}))
    return rows


class Parsed(HTMLParser):
    """What a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.cells: list[list[str]] = []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "elements are closed in their order"

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.words.append(data)
        if "td" in self.open or "th" in self.open:
            self.cells[-1][-1] += data


def shown(project: Project) -> Parsed:
    return Parsed(write_report(project, NAME).read_text(encoding="utf-8"))


def test_it_is_whole_by_itself_and_the_same_each_time(trained: Project) -> None:
    evaluate(trained)
    made = write_report(trained, NAME)
    before = made.read_bytes()
    parsed = Parsed(before.decode())
    assert parsed.open == []
    assert not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _ in parsed.tags}
    attributes = [(name, value or "") for _, values in parsed.tags for name, value in values.items()]
    assert all(value.startswith("#") for name, value in attributes if name in ("href", "src", "xlink:href"))
    assert not [name for name, _ in attributes if name.startswith("on")]
    style = before.decode().split("<style>")[1].split("</style>")[0]
    assert not any(outside in style for outside in ("url(", "@import", "http"))
    targets = {values["id"] for _, values in parsed.tags if "id" in values}
    assert {value[1:] for name, value in attributes if name == "href"} <= targets
    assert write_report(trained, NAME).read_bytes() == before


def test_a_run_that_was_never_evaluated_says_so(trained: Project) -> None:
    parsed = shown(trained)
    assert "trained on somewhere for 5.12 k tokens: finished , step 40 of 40" in parsed.text
    assert f"no checkpoint is evaluated yet. gpt2 evaluate {NAME}" in parsed.text
    assert "gpt2 replay" not in parsed.text, "no run in MLflow is known"


@pytest.mark.parametrize("left", [b"", b'{"torn'])
def test_what_has_not_begun_has_no_report(new_project: Project, left: bytes) -> None:
    new_project.run_folder(NAME).journal.write_bytes(left)
    with pytest.raises(UserError, match=f"train it first: gpt2 train {NAME}"):
        write_report(new_project, NAME)
    with pytest.raises(UserError, match="nothing"):
        write_report(new_project, "nothing")
    assert not new_project.run_folder(NAME).report.exists()


@pytest.mark.parametrize(
    ("steps", "seconds", "loss", "says"),
    [
        (0, 1.0, 3.0, "No step is done yet"),
        (1, 1.0, 3.0, "ends at 3.000"),
        (1, 0.0, 3.0, "ends at 3.000"),
        (9, 1.0, None, "loss was finite"),
    ],
)
def test_a_training_that_has_hardly_begun_has_a_report(
    new_project: Project, journal: Journal, steps: int, seconds: float, loss: float | None, says: str
) -> None:
    journal.started()
    journal.steps(1, steps, seconds=seconds, loss=loss)
    journal.write()
    parsed = shown(new_project)
    assert says in parsed.text
    assert "interrupted by a fault" in parsed.text


def test_each_step_is_shown_once_and_lost_work_costs_time(journal: Journal) -> None:
    journal.started(energy_counters=["cpu package-0"])
    journal.steps(1, 25, energy_j=2.0)
    journal.validated(20)
    journal.add("warning", step=25, kind="stream", message="no answer")
    journal.now += 7200
    journal.started(20, energy_counters=["cpu package-0"])
    journal.steps(21, 30, energy_j=2.0)
    told = history(journal.events)
    assert told is not None
    loss = told.steps["loss"]
    assert loss.tokens.tolist() == [PER_STEP * step for step in range(1, 31)]
    assert told.steps_lost == 5
    assert told.seconds == pytest.approx(25 + 0.5 + 10), "without the pause, with what was lost"
    assert np.diff(loss.hours * 3600).tolist() == pytest.approx([1.0] * 19 + [6.5] + [1.0] * 9), "the lost steps lie behind step 20"
    assert costs(told).measured_joules == 2.0 * 35
    (resumed,) = told.marks
    assert (resumed.kind, resumed.step, resumed.tokens) == ("resumed", 20, 20 * PER_STEP)
    assert resumed.message == "broke off at step 25 (no answer), went on from step_00000020"


def test_what_another_configuration_left_in_the_journal_does_not_count(journal: Journal) -> None:
    journal.started(config_digest="another")
    journal.add("warning", step=0, kind="journal", message="an old one")
    journal.steps(1, 9, seconds=100.0)
    journal.started()
    journal.steps(1, 3)
    told = history(journal.events)
    assert told is not None
    assert (told.seconds, told.steps_lost, told.marks) == (pytest.approx(3.0), 0, [])
    assert len(told.steps["loss"].values) == 3


def test_a_rollback_is_marked_and_takes_its_time(journal: Journal) -> None:
    journal.started()
    journal.steps(1, 12)
    journal.now += 3
    journal.started(10, rolled_back_from=13)
    journal.steps(11, 20)
    told = history(journal.events)
    assert told is not None
    assert [(mark.kind, mark.step) for mark in told.marks] == [("rolled back", 10)]
    assert told.seconds == pytest.approx(12 + 3 + 10)


def test_a_hundred_thousand_steps_are_a_page_below_a_megabyte(trained: Project, journal: Journal) -> None:
    facts = gather(trained, NAME)
    journal.events.clear()
    journal.started()
    chance = random.Random(1)
    for step in range(1, 100_001):
        loss = None if step == 500 else 3 + 8 / step**0.5 + chance.gauss(0, 0.05)
        journal.steps(step, step, loss=loss, gradient_norm=chance.lognormvariate(0, 0.1))
        if step % 100 == 0:
            journal.validated(step)
            journal.add("warning", step=step, kind="bad step", message="skipped")
    told = history(journal.events)
    assert told is not None
    made = page(dataclasses.replace(facts, history=told))
    assert 30_000 < len(made) < 500_000
    assert "The last 200 of 1,000." in made


def test_a_spike_of_one_step_stays_visible() -> None:
    values = np.ones(100_000)
    values[54_321] = 9.0
    across = np.linspace(0, 1, len(values))
    columns, low, high, mean = charts._by_column(across, values)
    assert len(columns) == charts._COLUMNS
    assert (high.max(), low.max()) == (9.0, 1.0)
    assert columns[high.argmax()] == pytest.approx(0.54321, abs=1 / charts._COLUMNS)
    assert mean.max() < 1.1, "the line is the mean"
    thinned = charts._thinned(across, values)[1]
    assert len(thinned) <= 4 * charts._COLUMNS
    assert thinned.max() == 9.0


def test_the_smoothed_line_is_the_mean_on_even_ground() -> None:
    chance = np.random.default_rng(1)
    values = 5 + chance.normal(0, 1, 50_000)
    mean = charts._by_column(np.linspace(0, 1, 50_000), values)[3]
    assert np.abs(mean - 5).max() < 0.1


def test_axes_have_some_ticks_that_differ() -> None:
    chance = random.Random(2)
    for log, _ in itertools.product((False, True), range(500)):
        low = 10 ** chance.uniform(-6, 9)
        axis = charts.axis_for([low, low * (1 + 10 ** chance.uniform(-2, 4))], log=log)
        ticks = axis.ticks(4)
        labels = charts.tick_labels(ticks)
        assert 2 <= len(ticks) <= 9, axis
        assert len(set(labels)) == len(labels), (axis, labels)
        assert all(-0.01 <= place <= 1.01 for place in axis.place(np.array(ticks)))


def test_the_table_of_checkpoints(trained: Project) -> None:
    rows = evaluate(trained)
    lone = {"name": "step_00000040", "step": 40, "digest": "9" * 64, "version": "4"}
    registered = json.loads(trained.run_folder(NAME).registered.read_text())
    trained.run_folder(NAME).registered.write_text(json.dumps([*registered, lone]))
    parsed = shown(trained)
    lines = {cells[0]: cells for cells in parsed.cells}
    assert "1.4001.300–1.500" in lines["20 ★"]
    assert "25 %12–38 %" in lines["20 ★"]
    assert lines["30 ◦"][1] == "3"
    assert lines["40"][1:3] == ["4", "1.681"], "its validation loss is the journal's"
    assert "step_00000040 is not evaluated yet" in parsed.text
    assert f"Champion: {rows[1]['name']}, version 2 in the registry. Takes over: reason 1." in parsed.text
    assert "gpt2 replay 0123456789abcdef" in parsed.text
    assert lines["add"][2:] == ["1 of 2", "10–90 %"]
    assert lines["sort"][2:] == ["0 of 1", "–"]


def test_a_champion_of_another_training_is_told_of(trained: Project) -> None:
    evaluate(trained, champion=0)
    scores = json.loads(trained.run_folder(NAME).scores.read_text())
    scores["champion"] = {"name": "step_00000900", "digest": "7" * 64, "version": "12"}
    scores["checkpoints"][0]["champion"] = False
    trained.run_folder(NAME).scores.write_text(json.dumps(scores))
    assert "Champion: version 12, of another training. Takes over: reason 2." in shown(trained).text


def test_scores_of_an_older_kind_do_no_harm(trained: Project) -> None:
    old = {
        "name": "step_00000010",
        "step": 10,
        "digest": "1" * 64,
        "version": "1",
        "gold_bits_per_byte": 0.5,
        "champion": True,
        "reason": "r",
    }
    trained.run_folder(NAME).scores.write_text(json.dumps({"champion": old, "evaluation_set": "5" * 64, "checkpoints": [old]}))
    assert "step_00000010 is not evaluated yet" in shown(trained).text


def test_texts_stand_side_by_side_and_are_text(trained: Project, journal: Journal) -> None:
    evaluate(trained, count=20, champion=7)
    for step in range(1, 31):
        journal.add("sample", step=step, prompt="Q: <b>bold</b> & sons", text=f"</p><img src=x onerror=alert({step})>")
    journal.write()
    parsed = shown(trained)
    assert "Why? at 80" in parsed.text, "the champion's"
    assert parsed.text.count("Why? at ") == SHOWN_AT_ONCE
    assert {"Why? at 10 ", "Why? at 200 "} <= {f"Why? at {step} " for step in (10, 200) if f"Why? at {step}" in parsed.text}
    assert "<script>alert(1)</script>" in parsed.text
    assert "Q: <b>bold</b> & sons" in parsed.text
    assert parsed.text.count("</p><img src=x onerror=alert(") == SHOWN_AT_ONCE
    assert not {"script", "img"} & {tag for tag, _ in parsed.tags}


def test_those_that_are_wanted_are_always_picked() -> None:
    for count in (1, 6, 7, 40):
        for wanted in itertools.combinations(range(count), min(2, count)):
            found = picked(list(range(count)), lambda row, wanted=wanted: row in wanted)
            assert set(wanted) <= set(found)
            assert found == sorted(set(found))
            assert len(found) == min(count, SHOWN_AT_ONCE)
    assert picked(list(range(100))) == [0, 20, 40, 59, 79, 99]


def test_no_secret_is_on_the_page(trained: Project, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_<&secret&>")
    journal.add("warning", step=40, kind="stream", message="https://user:hunter22@host/file: token hf_<&secret&>")
    journal.add("sample", step=40, prompt="Q: hf_<&secret&>", text="?sig=abcdef0123")
    journal.write()
    evaluate(trained, reason="asked https://name:hunter22@mlflow")
    made = write_report(trained, NAME).read_text()
    assert "***" in made
    assert not any(secret in made for secret in ("hunter22", "secret", "abcdef0123"))


def test_benchmarks_are_compared_by_the_same_metric_only(trained: Project) -> None:
    rows = evaluate(trained)
    results = {"hellaswag": {"acc": 0.29, "acc_stderr": 0.0045, "acc_norm": 0.31, "acc_norm_stderr": 0.005, "alias": "hellaswag"}}
    results["mine"] = {"acc": 0.5, "acc_stderr": "N/A"}
    folder = trained.run_folder(NAME).path / "benchmarks"
    folder.mkdir()
    found = {"checkpoint": rows[1]["name"], "digest": rows[1]["digest"], "lm_eval_version": "0.4.13", "results": results}
    (folder / "step_00000020.json").write_text(json.dumps(found))
    (folder / "step_00000020.limit-10.json").write_text(json.dumps({**found, "limit": 10, "results": {"tried out": {"acc": 1.0}}}))
    (folder / "step_00000030.json").write_text(json.dumps({**found, "digest": "0" * 63 + "x", "results": {"another's": {"acc": 1.0}}}))
    parsed = shown(trained)
    lines = [cells for cells in parsed.cells if cells[0] in ("hellaswag", "mine", "tried out", "another's")]
    assert lines == [
        ["hellaswag", "acc", "0.2900", "0.2812–0.2988", "–", "step_00000020 ★"],
        ["hellaswag", "acc_norm", "0.3100", "0.3002–0.3198", "0.3114", "step_00000020 ★"],
        ["mine", "acc", "0.5000", "–", "–", "step_00000020 ★"],
    ]
    assert "acc_norm is the figure to compare" in parsed.text
    assert "0.4.13" in parsed.text


GPU = {"device": "cuda:0", "threads": 8}


@pytest.mark.parametrize(
    ("started", "joules", "usd"),
    [
        ({}, 2 * 10 * 3600, None),
        ({**GPU, "device_name": "NVIDIA H100 80GB HBM3", "ranks": 2}, 2 * 700 * 3600, 2 * 2.50),
        ({**GPU, "device_name": "NVIDIA H100 PCIe"}, 350 * 3600, 2.00),
        ({**GPU, "device_name": "NVIDIA H100 NVL"}, None, None),
        ({**GPU, "device_name": "NVIDIA A100-SXM4-80GB MIG 1g.10gb"}, None, None),
        ({**GPU, "device_name": None}, None, None),
    ],
)
def test_what_is_estimated_is_assumed_openly(
    new_project: Project, journal: Journal, started: dict[str, Any], joules: float | None, usd: float | None
) -> None:
    journal.started(**started)
    journal.steps(1, 1, seconds=3600)
    told = history(journal.events)
    assert told is not None
    cost = costs(told)
    assert (cost.measured_joules, cost.estimated_joules, cost.usd) == (None, joules, usd)
    journal.write()
    text = shown(new_project).text
    assert ("estimated" in text.split("Time and energy")[-1]) == (joules is not None)
    assert ("assumed: " in text) == (usd is not None)
    assert ("not known: nothing is known of the power of" in text) == (joules is None)


def test_what_was_measured_in_part_is_estimated_for_the_rest(new_project: Project, journal: Journal) -> None:
    journal.started(energy_counters=["cpu package-0"])
    journal.steps(1, 10, seconds=360, energy_j=36_000.0)
    journal.started(10)
    journal.steps(11, 20, seconds=360)
    journal.write()
    text = shown(new_project).text
    assert "0.1 kWh measured in 1 h of the time" in text
    assert "counters: cpu package-0" in text
    assert "and 0.02 kWh estimated for the rest: 10 W for each of 2 cores" in text


def test_the_command_trains_the_same(trained: Project) -> None:
    changes = {"training": {"learning_rate": 0.003, "max_steps": 7, "spike": {"action": "skip"}}, "seed": 3}
    changes["data"] = {"filter": "language == 'en' and words > 3", "revision": None, "path": "a folder/it's"}
    words = shlex.split(train_command(NAME, changes))
    assert words[:3] == ["gpt2", "train", NAME]
    assert parse_overrides([word for before, word in itertools.pairwise(words) if before == "--set"]) == changes


def test_a_configuration_of_another_length_is_shown(new_project: Project, journal: Journal) -> None:
    """`max_steps` is no part of a run's identity; the learning rate is."""
    journal.started()
    journal.steps(1, 2)
    journal.write()
    config = write_config(new_project, learning_rate=0.01)
    assert config.digest in shown(new_project).text


@pytest.mark.slow
def test_mlflow_gets_the_page_once(server: Server, new_project: Project, journal: Journal) -> None:
    journal.started()
    journal.steps(1, 5)
    journal.write()
    for _ in range(2):
        made = publish.publish_apart(new_project, NAME, threading.Event())
        assert made.problem is None
        assert made.path is not None
    client = tracking.connect(new_project, new_project.experiment(NAME))
    run_id = tracking.training_run(client, new_project, NAME, tracking.read_config(new_project.run_folder(NAME)))
    assert made.link is not None
    assert made.link.startswith(f"{server.uri}/#/experiments/")
    assert made.link.endswith(f"/runs/{run_id}/artifacts/report/report.html?workflowType=machine_learning")
    assert [file.path for file in client.list_artifacts(run_id, "report")] == ["report/report.html"]
    assert Path(client.download_artifacts(run_id, "report/report.html")).read_bytes() == made.path.read_bytes()


@pytest.mark.slow
def test_an_mlflow_that_does_not_answer_costs_the_page_nothing(
    new_project: Project, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.started()
    journal.steps(1, 5)
    journal.write()
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as black_hole:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{black_hole.getsockname()[1]}")
        began = time.monotonic()
        made = publish.publish_apart(new_project, NAME, threading.Event(), silence=2.0)
        assert time.monotonic() - began < 60
    assert made.path is not None
    assert made.path.read_bytes().startswith(b"<!doctype html>")
    assert made.link is None
    assert made.problem == "MLflow did not take the report, the next run tries again: no answer in time"


@pytest.mark.slow
def test_a_report_that_cannot_be_made_says_why(new_project: Project) -> None:
    made = publish.publish_apart(new_project, NAME, threading.Event())
    assert (made.path, made.link) == (None, None)
    assert made.problem is not None
    assert made.problem.startswith(f"no report was made: {NAME} has not begun to train")


def post_trained(project: Project, journal: Journal, right: tuple[int, ...] = (1, 1, 1, 1, 1, 0)) -> None:
    """A finished post-training whose base answers two of six questions, and its step 40 those that are `right`."""
    folder = project.run_folder(NAME)
    fields = tracking.read_config(folder).model_dump(mode="json")
    base = {"source": "models:/quickstart/5", "experiment": "quickstart", "checkpoint": "step_00000900", "digest": "ab" * 32}
    write_yaml(folder.config, {**fields, "post_training": {"base": base, "packing": True}})
    params = yaml.safe_load((project.root / "params.yaml").read_text())
    params["experiments"][NAME]["post_training"] = {"base": "models:/quickstart@champion"}
    (project.root / "params.yaml").write_text(yaml.safe_dump(params))
    journal.digest = tracking.read_config(folder).digest
    journal.started()
    journal.steps(1, STEPS)
    journal.validated(STEPS)
    journal.add("finished", step=STEPS, tokens=PER_STEP * STEPS, checkpoint="step_00000040", digest="e" * 64, model_sha256="f" * 64)
    journal.write()
    rows = []
    for step, answers in ((0, (1, 0, 0, 0, 1, 0)), (STEPS, right)):
        digest, key = f"{step:064x}", f"{step:03d}" * 20
        row = {"name": f"step_{step:08d}", "step": step, "digest": digest, "version": str(1 + step), "key": key, "reason": "takes over"}
        rows.append({**row, "answer_bits_per_byte": 1.0, "champion": step > 0, "best": False, "intervals": {}, "validation_loss": None})
        figures = {"text_bits": 9.0, "text_bytes": 9, "answer_bytes": 2, "distractor_rank": 1, "well_formed": True, "token_f1": 0.5}
        figures |= {"answer_bits": 2.0 if step else 3.0, "answer_alone_bits": 4.0, "half": "report", "exercise": "add"}
        items = [{**figures, "id": str(n), "article": f"article {n}", "exact_match": bool(answer)} for n, answer in enumerate(answers)]
        store_scores(
            folder.evaluation, key, Scores({"exact_match": sum(answers) / 6}, {}, items, [{"prompt": "Q: Why?", "text": f"at {step}"}])
        )
    marked = {key: rows[1][key] for key in ("name", "digest", "version")}
    folder.scores.write_text(json.dumps({"champion": marked, "best": marked, "evaluation_set": "5" * 64, "checkpoints": rows}))


def test_a_post_training_is_held_against_its_base(new_project: Project, journal: Journal) -> None:
    post_trained(new_project, journal)
    found = Parsed(page(gather(new_project, NAME)))
    assert re.search(r"It began with\s+step_00000900 of quickstart\s*, here step 0, of digest\s+abababababab", found.text)
    rows = {cells[0]: cells for cells in found.cells if cells}
    assert rows["exact match"][1:4] == ["33 %", "83 %", "+50.0 points"]
    low, high = map(float, rows["exact match"][4].split(" to "))
    assert low < 50 < high
    assert rows["answer, bits/byte"][3:5] == ["-0.500", "–"], "all items are alike: there is no interval"
    assert "base at 0" in found.text, "its texts stand beside the others"
    assert "begun with step_00000900 of quickstart and post-trained on somewhere" in found.text
    assert f"gpt2 post-train {NAME}" in found.text
    line = gain_line(new_project, NAME)
    assert line is not None
    assert line.startswith(
        "against its base, on the same items: answer -0.500 (95 % interval -0.500 to -0.500); exact +50 points (95 % interval "
    )


def test_a_post_training_whose_base_is_still_the_champion_says_so(new_project: Project, journal: Journal) -> None:
    post_trained(new_project, journal)
    scores = json.loads(new_project.run_folder(NAME).scores.read_text())
    for row in scores["checkpoints"]:
        row["champion"] = row["step"] == 0
    new_project.run_folder(NAME).scores.write_text(json.dumps(scores))
    assert "It is still the champion" in Parsed(page(gather(new_project, NAME))).text
    line = gain_line(new_project, NAME)
    assert line is not None
    assert line.startswith("what it began with is still the champion")


def test_another_training_has_no_such_part(trained: Project) -> None:
    evaluate(trained)
    assert "Base and tuned" not in page(gather(trained, NAME))
    assert gain_line(trained, NAME) is None
