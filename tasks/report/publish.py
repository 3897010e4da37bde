"""The report among the artifacts of its run in MLflow, made in a process of its own: an MLflow that does not answer is left after a while.

`python -m tasks.report.publish EXPERIMENT`
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from model.errors import Stopped
from model.secrets import redacted
from tasks import tracking
from tasks.project import Project
from tasks.steps import ERROR, run_step, start_apart

UI = "GPT2_MLFLOW_UI"
"""The environment variable that says where MLflow shows its default store, to which flows write without a server; `gpt2 services`
sets it."""
LONGEST_S = 300.0
"""For making the page."""
SILENCE_S = 20.0
"""So long without an answer, and MLflow is taken for dead."""
_MADE, _ASKED, _LINK = "report: ", "MLflow is asked", "link: "
"""Begin the lines that the process apart prints."""


@dataclass(frozen=True)
class Published:
    """What became of a report."""

    path: Path | None
    """The page; None if it could not be made."""
    link: str | None
    """Its place in MLflow's UI; None if there is no server, or it did not take the page."""
    problem: str | None
    """In one line; None if all went well."""


def publish_report(project: Project, name: str) -> None:
    """Make the page and put it among the artifacts of the training's run in MLflow, in place of an older one. Prints where it lies, and
    its link if MLflow is a server.

    Raises:
        UserError: see `write_report`.
        mlflow.MlflowException: MLflow does not answer. The page is made by then.
    """
    from tasks.report.page import write_report

    path = write_report(project, name)
    print(f"{_MADE}{path}", flush=True)
    client = tracking.connect(project, project.experiment(name))
    print(_ASKED, flush=True)
    run_id = tracking.training_run(client, project, name, tracking.read_config(project.run_folder(name)))
    client.log_artifact(run_id, str(path), "report")
    ui = os.environ.get(UI) or client.tracking_uri
    if ui.startswith(("http://", "https://")):
        place = f"experiments/{client.get_run(run_id).info.experiment_id}/runs/{run_id}/artifacts/report/{path.name}"
        print(f"{_LINK}{redacted(ui).rstrip('/')}/#/{place}?workflowType=machine_learning", flush=True)


def publish_apart(project: Project, name: str, stop: threading.Event, silence: float = SILENCE_S, longest: float = LONGEST_S) -> Published:
    """`publish_report` in a process of its own. A dead MLflow costs `silence` seconds.

    Raises:
        Stopped: `stop` was set meanwhile.
    """
    process = start_apart(project.root, "tasks.report.publish", name)
    lines: list[str] = []
    reader = threading.Thread(target=_pump, args=(process, lines), daemon=True)
    reader.start()
    try:
        deadline = time.monotonic() + longest
        asked = False
        while reader.is_alive() and time.monotonic() < deadline:
            if stop.is_set():
                raise Stopped(f"stopped while the report of {name} was made; gpt2 report {name} makes it")
            reader.join(0.2)
            if not asked and _ASKED in lines:
                asked, deadline = True, time.monotonic() + silence
        overdue = reader.is_alive()
        if not overdue:
            process.wait(5)
    finally:
        process.kill()
        process.wait()
    path, link, problem = (_told(lines, prefix) for prefix in (_MADE, _LINK, ERROR))
    if problem is None and (overdue or process.returncode):
        problem = "no answer in time" if overdue else f"it ended with {process.returncode}"
    if problem is not None:
        problem = f"MLflow did not take the report, the next run tries again: {problem}" if path else f"no report was made: {problem}"
    return Published(Path(path) if path else None, link, redacted(problem) if problem else None)


def _told(lines: list[str], prefix: str) -> str | None:
    return next((line.removeprefix(prefix) for line in lines if line.startswith(prefix)), None)


def _pump(process: subprocess.Popen[str], lines: list[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line.strip())


if __name__ == "__main__":
    run_step(publish_report)
