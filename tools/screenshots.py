"""Makes the screenshots of docs/ anew, of a `gpt2 services` without a password whose deployment `train-gpt2/quickstart` has run:

    gpt2 services                                             # in a clone at a place that may be seen, such as /srv/gpt2-from-scratch
    prefect deployment run train-gpt2/quickstart --watch
    python tools/screenshots.py http://127.0.0.1:4200 http://127.0.0.1:5000 [--experiment quickstart] [--folder docs/screenshots]

The browser is this machine's Chromium, Chrome or Edge; where there is none, the one that playwright fetches. Nothing is started or changed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Error, Locator, Page, expect, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge", "chrome")
SECONDS = 60.0
"""How long a page may take on a busy machine."""
VIEW = "?workflowType=machine_learning"
"""Without it, MLflow's pages may show what it has for language models in use."""
_NO_ASSISTANT = """localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true")
localStorage.setItem("mlflow.assistant.panelOpen_v1", "false")"""
"""MLflow opens its assistant at the first visit, over a quarter of the page."""


class NoBrowser(Exception):
    """There is no browser, and none could be fetched."""


@contextlib.contextmanager
def open_browser() -> Iterator[Browser]:
    """A browser without a window; it ends with the block.

    Raises:
        NoBrowser: this machine has none, and playwright could not fetch one.
    """
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        if found is None and not Path(playwright.chromium.executable_path).exists():
            fetched = subprocess.run([sys.executable, "-m", "playwright", "install", "chromium"], capture_output=True, text=True)
            if fetched.returncode:
                raise NoBrowser("no Chromium, Chrome or Edge here, and `playwright install chromium` could not fetch one")
        browser = playwright.chromium.launch(executable_path=found)
        try:
            yield browser
        finally:
            browser.close()


def new_page(browser: Browser) -> Page:
    """A page that looks the same on every machine: size, language, time zone."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, locale="en-US", timezone_id="UTC", reduced_motion="reduce")
    context.add_init_script(_NO_ASSISTANT)
    context.set_default_timeout(1000 * SECONDS)
    expect.set_options(timeout=1000 * SECONDS)
    return context.new_page()


def field(page: Page, label: str) -> Locator:
    """A field of Prefect's form for a run, such as `Learning Rate`, with its description."""
    return page.locator(".schema-form-property", has=page.get_by_text(f"{label} (Optional)", exact=True)).last


def choices(page: Page, label: str) -> Locator:
    """The choices of a field of the form, opened."""
    field(page, label).locator("button.p-select-button__control").press("Space")
    return page.locator(".p-select-option__text")


def open_form(page: Page, prefect: str, deployment: str) -> None:
    """Prefect's form for a run of `train-gpt2`, with the changes unfolded. `deployment`: its id."""
    page.goto(f"{prefect}/deployments/deployment/{deployment}/run")
    page.get_by_role("button", name="ExperimentChanges").click()
    expect(field(page, "Learning Rate")).to_be_visible()


@dataclass
class Pages:
    """Where the pages of an experiment are."""

    prefect: str
    mlflow: str
    experiment: str

    def flow_run(self) -> str:
        """The newest run of train-gpt2 that trained it: `quickstart 0 to 900`, not one that found all done."""
        body = {"flows": {"name": {"any_": ["train-gpt2"]}}, "flow_runs": {"name": {"like_": f"{self.experiment} 0 to "}}}
        return f"{self.prefect}/runs/flow-run/{self._newest('flow_runs', body, sort='START_TIME_DESC')}"

    def artifact(self, what: str) -> str:
        """The newest one of `training`, `loss`, `checkpoints`, `report`."""
        body = {"artifacts": {"key": {"any_": [f"{what}-{self.experiment}"]}}}
        return f"{self.prefect}/artifacts/artifact/{self._newest('artifacts', body, sort='CREATED_DESC')}"

    def deployment(self) -> str:
        """The id of the deployment."""
        found = _ask(f"{self.prefect}/api/deployments/name/train-gpt2/{self.experiment}")
        return str(found["id"])

    def mlflow_run(self) -> str:
        """The newest run of its experiment in MLflow; the address without the query."""
        api = f"{self.mlflow}/api/2.0/mlflow"
        experiment = _ask(f"{api}/experiments/get-by-name?experiment_name={self.experiment}")["experiment"]["experiment_id"]
        run = _ask(f"{api}/runs/search", {"experiment_ids": [experiment], "max_results": 1})["runs"][0]["info"]["run_id"]
        return f"{self.mlflow}/#/experiments/{experiment}/runs/{run}"

    def registered_model(self) -> str:
        """The page with its versions."""
        return f"{self.mlflow}/#/models/{self.experiment}{VIEW}"

    def _newest(self, kind: str, body: dict[str, Any], sort: str) -> str:
        found = _ask(f"{self.prefect}/api/{kind}/filter", {**body, "sort": sort, "limit": 1})
        if not found:
            sys.exit(f"{self.prefect} has no such page yet: prefect deployment run train-gpt2/{self.experiment} --watch")
        return str(found[0]["id"])


def _ask(url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310 (the caller's own servers)
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:  # noqa: S310
        return json.loads(answer.read())


def _flow_run(page: Page, pages: Pages) -> None:
    page.goto(pages.flow_run())
    page.get_by_text("Subflow Runs", exact=True).click()
    expect(page.get_by_text(f"trains:{pages.experiment}")).to_be_visible()


def _loss(page: Page, pages: Pages) -> None:
    page.goto(pages.artifact("loss"))
    expect(page.locator("img[src^='data:image/svg']")).to_be_visible()
    # Prefect writes the picture's whole address below it, across the page.
    page.get_by_text("Image URL").evaluate("text => { text.parentElement.style.visibility = 'hidden' }")


def _checkpoints(page: Page, pages: Pages) -> None:
    page.goto(pages.artifact("checkpoints"))
    expect(page.get_by_text("★").last).to_be_visible()


def _form(page: Page, pages: Pages) -> None:
    open_form(page, pages.prefect, pages.deployment())
    field(page, "Learning Rate").locator("input").fill("-1")
    page.get_by_role("button", name="Submit").click()
    expect(page.get_by_text("Validation failed").first).to_be_visible()
    rate = field(page, "Learning Rate")
    expect(rate.locator("input")).to_have_value("-1")
    rate.evaluate("rate => rate.scrollIntoView({ block: 'center' })")


def _mlflow_run(page: Page, pages: Pages) -> None:
    page.goto(f"{pages.mlflow_run()}{VIEW}")
    expect(page.get_by_role("link", name="versions and champion")).to_be_visible()
    expect(page.get_by_text("train/loss", exact=True)).to_be_visible()


def _curves(page: Page, pages: Pages) -> None:
    page.goto(f"{pages.mlflow_run()}/model-metrics{VIEW}")
    expect(page.locator(".js-plotly-plot .lines path").nth(4)).to_be_visible()


def _registry(page: Page, pages: Pages) -> None:
    page.goto(pages.registered_model())
    expect(page.get_by_role("status", name="champion", exact=True)).to_be_visible()


def _report(page: Page, pages: Pages) -> None:
    page.goto(f"{pages.mlflow_run()}/artifacts/report/report.html{VIEW}")
    expect(page.frame_locator("iframe").get_by_text("finished").first).to_be_visible()


SHOTS: dict[str, Callable[[Page, Pages], None]] = {
    "prefect-flow-run": _flow_run,
    "prefect-loss": _loss,
    "prefect-checkpoints": _checkpoints,
    "prefect-form": _form,
    "mlflow-run": _mlflow_run,
    "mlflow-curves": _curves,
    "mlflow-registry": _registry,
    "mlflow-report": _report,
}
"""What is shown, by the name of the file; each opens its page and waits for what matters there."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make the screenshots of docs/ anew")
    parser.add_argument("prefect", help="where Prefect's pages are: http://127.0.0.1:4200")
    parser.add_argument("mlflow", help="where MLflow's are: http://127.0.0.1:5000")
    parser.add_argument("--experiment", default="quickstart", help="whose pages")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parents[1] / "docs" / "screenshots", help="where the pictures go")
    options = parser.parse_args()
    pages = Pages(options.prefect.rstrip("/"), options.mlflow.rstrip("/"), options.experiment)
    options.folder.mkdir(parents=True, exist_ok=True)
    try:
        with open_browser() as browser:
            for name, show in SHOTS.items():
                page = new_page(browser)
                show(page, pages)
                page.wait_for_timeout(1500)  # fonts, and what fades in
                page.screenshot(path=options.folder / f"{name}.png")
                page.context.close()
                print(f"{name}.png", flush=True)
    except (NoBrowser, Error, AssertionError, OSError) as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
