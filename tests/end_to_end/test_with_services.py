"""With `gpt2 services`: a deployed run completes and is skipped the second time, the night's round goes by, and a dead worker is told
of."""

from __future__ import annotations

import json
import re
import signal
import urllib.request
from collections.abc import Iterator

import psutil
import pytest
from playwright.sync_api import Page, Request, Route, expect

from model.errors import EXIT_FAULT
from tasks.versioning import STAGES
from tests.end_to_end.conftest import DVC, Clone, Services, until, until_it_trains, until_left
from tools.screenshots import SHOTS, NoBrowser, Pages, choices, field, new_page, open_browser

pytestmark = pytest.mark.slow

TASKS = ("build-config", "stream-and-train", "checkpoint-register", "evaluate-each-checkpoint")
AT_THE_END = ("sync-tracking", "push-to-storage", "make-report")


def test_everything_is_deployed(services: Services) -> None:
    deployments = services.ask("deployments/filter", {})
    names = {"quickstart", "samples2m", "samples2m-muon", "gpu", "follow", "crashed", "nightly"}
    assert {deployment["name"] for deployment in deployments} == names
    assert len(deployments) == len(names) + 2, "quickstart and samples2m have a post-training, too"
    nightly = next(deployment for deployment in deployments if deployment["name"] == "nightly")
    assert [(schedule["schedule"]["cron"], schedule["active"]) for schedule in nightly["schedules"]] == [("0 3 * * *", True)]
    scheduled = {"deployments": {"name": {"any_": ["nightly"]}}, "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
    until(lambda: services.ask("flow_runs/filter", scheduled), 90, "the scheduler plans the coming nights")


def test_a_deployed_run_completes_and_dvc_has_nothing_left_to_do(clone: Clone, services: Services) -> None:
    flow_run_id = services.watched("train-gpt2/quickstart")
    assert services.state(flow_run_id) == "Completed"
    training = services.training("quickstart")
    assert services.task_states(flow_run_id, *TASKS, *AT_THE_END) == dict.fromkeys((*TASKS, *AT_THE_END), "Completed")
    assert services.task_states(training["id"], *TASKS[:2]) == {"build-config": "Cached", "stream-and-train": "Completed"}
    assert training["name"] == "quickstart 0 to 240"
    artifacts = {artifact["key"]: artifact for artifact in services.ask("artifacts/filter", {})}
    assert "240/240" in artifacts["training-quickstart"]["description"]
    assert float(artifacts["training-quickstart"]["data"]) == 100
    assert "step_00000240" in artifacts["checkpoints-quickstart"]["data"]
    assert artifacts["loss-quickstart"]["data"].startswith("data:image/svg+xml;base64,")
    report = (clone.folder("quickstart").report / "report.html").read_text()
    assert "finished" in report
    link = artifacts["report-quickstart"]["data"].partition("](")[2].partition(")")[0]
    assert link.startswith(f"{services.mlflow}/#/experiments/")
    run_id = link.partition("/runs/")[2].partition("/")[0]
    with urllib.request.urlopen(f"{services.mlflow}/get-artifact?path=report/report.html&run_uuid={run_id}", timeout=30) as answer:
        assert answer.read().decode() == report

    assert "up to date" in clone.run(*DVC, "status").stdout
    repro = clone.run(*DVC, "repro")
    assert repro.stdout.count("didn't change, skipping") == len(STAGES)
    rows = clone.checkpoints("quickstart")
    assert [row["step"] for row in rows] == [120, 240]
    assert all(row["whole"] and row["version"] for row in rows)
    assert sum(row["champion"] for row in rows) == 1
    assert clone.status("quickstart")["state"] == "finished"
    with urllib.request.urlopen(
        f"{services.mlflow}/api/2.0/mlflow/registered-models/alias?name=quickstart&alias=champion", timeout=30
    ) as answer:
        champion = json.loads(answer.read())["model_version"]
    assert champion["version"] == next(row["version"] for row in rows if row["champion"])


@pytest.fixture
def pages(services: Services) -> Pages:
    """Where a person looks after that run."""
    return Pages(services.clone.environment["PREFECT_API_URL"].removesuffix("/api"), services.mlflow, "quickstart")


@pytest.fixture
def page() -> Iterator[Page]:
    """A page of a real browser."""
    try:
        with open_browser() as browser:
            yield new_page(browser)
    except NoBrowser as none:
        pytest.skip(str(none))


def test_prefects_page_of_the_run_shows_its_steps_its_tasks_and_the_training(pages: Pages, page: Page) -> None:
    SHOTS["prefect-flow-run"](page, pages)
    expect(page.get_by_text("quickstart 0 to 240", exact=True)).to_have_count(2)  # its own name, and that of the training below it
    expect(page.get_by_text("stream-and-train", exact=True)).to_be_visible()
    expect(page.get_by_text("Completed", exact=True)).to_have_count(2)
    page.get_by_text("Task Runs", exact=True).click()
    for task in (*TASKS, *AT_THE_END):
        expect(page.get_by_text(f"{task}[quickstart]", exact=True)).to_be_visible()


def test_prefects_artifacts_show_progress_curve_checkpoints_and_report(clone: Clone, pages: Pages, page: Page) -> None:
    page.goto(f"{pages.prefect}/artifacts")
    for what in ("training", "loss", "checkpoints", "report"):
        expect(page.get_by_text(f"{what}-quickstart", exact=True)).to_be_visible()
    page.goto(pages.artifact("training"))
    expect(page.get_by_text("step 240/240")).to_be_visible()
    expect(page.get_by_text("Progress: 100%")).to_be_visible()
    SHOTS["prefect-loss"](page, pages)
    assert page.locator("img[src^='data:image/svg']").evaluate("picture => picture.decode().then(() => picture.naturalWidth)") > 0
    SHOTS["prefect-checkpoints"](page, pages)
    rows = page.locator("tbody tr").all_inner_texts()
    for row, checkpoint in zip(rows, clone.checkpoints("quickstart"), strict=True):
        assert row.startswith(checkpoint["name"])
        assert ("★" in row) == checkpoint["champion"]
        assert f"{checkpoint['answer_bits_per_byte']:.3f} ±" in row
    page.goto(pages.artifact("report"))
    link = page.get_by_role("link", name="The report of quickstart in MLflow").get_attribute("href")
    assert link is not None
    page.goto(link)
    expect(page.frame_locator("iframe").get_by_text("finished").first).to_be_visible()


def test_prefects_form_shows_docs_choices_and_bounds_and_refuses_a_bad_value(services: Services, pages: Pages, page: Page) -> None:
    trainings = {"flows": {"name": {"any_": ["train-gpt2"]}}}
    before = services.ask("flow_runs/count", trainings)
    SHOTS["prefect-form"](page, pages)
    expect(page.get_by_text("'overrides.training.learning_rate'. Failure reason: -1 is less than or equal to").first).to_be_visible()
    assert services.ask("flow_runs/count", trainings) == before
    expect(field(page, "Learning Rate")).to_contain_text("Peak rate, reached after the warm-up. More than 0.")
    options = choices(page, "Optimizer")
    expect(options).to_have_count(2)
    assert options.all_inner_texts() == ["adamw", "muon"]

    options.last.click()
    field(page, "Learning Rate").locator("input").fill("0.001")
    choices(page, "Cache").first.click()
    asked: list[Request] = []

    def refuse(route: Route) -> None:
        asked.append(route.request)
        route.abort()

    page.route("**/create_flow_run", refuse)
    with page.expect_event("requestfailed", lambda request: request in asked):  # a page that is left before would still send it
        page.get_by_role("button", name="Submit").click()
    overrides = asked[0].post_data_json["parameters"]["overrides"]
    assert services.ask("flow_runs/count", trainings) == before
    assert overrides == {"data": {"cache": True}, "training": {"optimizer": "muon", "learning_rate": 0.001}}, "only what was filled in"


def test_mlflows_page_of_the_run_shows_what_it_is_and_its_curves(pages: Pages, page: Page) -> None:
    SHOTS["mlflow-run"](page, pages)
    expect(page.get_by_role("heading", name=re.compile(r"quickstart 0-240 \(seed 42, [0-9a-f]{8}\)"))).to_be_visible()
    for link in ("report", "checkpoints and scores", "versions and champion"):
        expect(page.get_by_role("link", name=link, exact=True)).to_be_visible()
    flow_run = page.get_by_role("link", name="flow run in Prefect").get_attribute("href")
    assert flow_run is not None
    expect(page.get_by_text(re.compile(r"\([0-9a-f]{32}\)")).first).to_be_visible()  # the dataset, by its digest
    SHOTS["mlflow-curves"](page, pages)
    for group in ("by_tokens", "train", "validation", "evaluation"):
        expect(page.get_by_text(group, exact=True).first).to_be_visible()
    page.goto(flow_run)
    expect(page.get_by_text("quickstart 0 to 240", exact=True).first).to_be_visible()


def test_mlflows_registry_shows_a_version_for_each_checkpoint_and_the_champion(clone: Clone, pages: Pages, page: Page) -> None:
    SHOTS["mlflow-registry"](page, pages)
    for checkpoint in clone.checkpoints("quickstart"):
        row = page.get_by_role("row").filter(has=page.get_by_role("link", name=f"Version {checkpoint['version']}", exact=True))
        expect(row).to_contain_text(checkpoint["name"])
        expect(row.get_by_role("status", name="champion", exact=True)).to_have_count(int(checkpoint["champion"]))


def test_the_second_run_skips_every_stage(services: Services) -> None:
    states = services.task_states(services.watched("train-gpt2/quickstart"), *TASKS, *AT_THE_END)
    assert states == dict.fromkeys(TASKS, "Cached") | dict.fromkeys(AT_THE_END, "Completed")


def test_a_deployed_post_training_begins_with_the_champion_and_answers_to_the_registry(clone: Clone, services: Services) -> None:
    states = services.task_states(services.watched("post-train/quickstart"), *TASKS, *AT_THE_END)
    assert states == dict.fromkeys((*TASKS, *AT_THE_END), "Completed")
    assert services.training("quickstart-tuned")["name"] == "quickstart-tuned 0 to 240"
    champion = next(row for row in clone.checkpoints("quickstart") if row["champion"])
    with urllib.request.urlopen(
        f"{services.mlflow}/api/2.0/mlflow/model-versions/get?name=quickstart-tuned&version=1", timeout=30
    ) as answer:
        tags = {tag["key"]: tag["value"] for tag in json.loads(answer.read())["model_version"]["tags"]}
    assert (tags["base"], tags["base_digest"]) == (f"models:/quickstart/{champion['version']}", champion["digest"])
    assert "up to date" in clone.run(*DVC, "status").stdout


def test_the_nightly_run_evaluates_what_has_checkpoints(clone: Clone, services: Services) -> None:
    before = clone.folder("quickstart").scores.read_bytes()
    run = services.ask(f"flow_runs/{services.watched('re-evaluate/nightly')}")
    assert (run["state"]["name"], run["state"]["message"]) == ("Completed", "evaluated: quickstart, quickstart-tuned")
    assert clone.folder("quickstart").scores.read_bytes() == before


def test_when_the_worker_is_killed_the_training_stops_and_the_services_say_so(clone: Clone, services: Services) -> None:
    services.flow_run("samples2m")
    until_it_trains(clone, "samples2m")
    flow = clone.dvc_of("samples2m").parent()
    assert flow is not None
    services.worker("gpu").send_signal(signal.SIGKILL)
    until_left(clone)
    assert clone.journal("samples2m")[-1]["event"] == "stopped"
    psutil.wait_procs([flow], 60)
    assert not flow.is_running(), "the flow that nobody waits for ends"
    assert services.desk.wait(60) == EXIT_FAULT
    assert "worker ended" in clone.said_by(services.desk)
