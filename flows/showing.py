"""What Prefect shows of an experiment: how far the training is, its loss curve, its checkpoints with their scores, where its report lies;
and the event of each new checkpoint. Its server may be away: that costs a picture, never a step.
"""

import base64
import contextlib
import contextvars
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast
from uuid import UUID

from prefect import runtime
from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.events import emit_event
from prefect.logging import get_run_logger

from flows.checkpoint_page import cells, legend
from tasks.overview import checkpoint_list, steps_to_go
from tasks.progress import Progress, Reading
from tasks.project import Project
from tasks.run_page import FLOW_RUN_URL

SECONDS_BETWEEN_UPDATES = 5.0
SECONDS_BETWEEN_LOG_LINES = 60.0
SECONDS_BETWEEN_IMAGES = 60.0
SHARE_BETWEEN_IMAGES = 0.02
"""Of the time since the training began here: Prefect keeps the image of each update among its events for a week, 20 kB each."""
SEALED = "gpt2.checkpoint.sealed"
"""The event that asks for an evaluation of what is new (prefect.yaml)."""


def artifact_key(what: str, experiment: str) -> str:
    """`checkpoints-my-experiment`: Prefect takes lower-case letters, digits and dashes."""
    return f"{what}-{re.sub('[^a-z0-9]+', '-', experiment.lower())}"


def name_by_steps(project: Project, experiment: str) -> None:
    """Call the flow run by its experiment and the steps that it has before it, `samples2m 4,000 to 30,000`, and tell the stages its
    page."""
    if url := runtime.flow_run.ui_url:
        os.environ[FLOW_RUN_URL] = url
    steps = steps_to_go(project, experiment)
    flow_run_id = runtime.flow_run.id
    if steps is None or flow_run_id is None:
        return
    name = f"{experiment} {steps[0]:,} to {steps[1]:,}" if steps[0] < steps[1] else f"{experiment} {steps[1]:,}"

    def rename() -> None:
        with get_client(sync_client=True) as client:
            client.update_flow_run(UUID(flow_run_id), name=name)

    _store(rename, "the run's name")


def show_checkpoints(project: Project, experiment: str) -> None:
    """The checkpoints with their scores as a table among the flow run's artifacts."""
    rows = checkpoint_list(project, experiment)
    scored = next((row for row in reversed(rows) if row["answer_bits_per_byte"] is not None), None)
    description = f"Checkpoints of {experiment}, oldest first. {legend(scored) if scored else ''}".rstrip()
    key, table = artifact_key("checkpoints", experiment), [cells(row) for row in rows]
    _store(lambda: create_table_artifact(table, key=key, description=description), "the table of checkpoints")


def link_report(experiment: str, path: Path, link: str | None) -> None:
    """Where the report lies, here and in MLflow."""
    here = f"On {socket.gethostname()}: `{path}`"
    lines = [f"[The report of {experiment} in MLflow]({link})" if link else "", here, f"`gpt2 report {experiment}` makes it anew."]
    key, markdown = artifact_key("report", experiment), "\n\n".join(filter(None, lines))
    _store(lambda: create_markdown_artifact(markdown, key=key, description=f"Report of {experiment}"), "the link to the report")


@contextlib.contextmanager
def training(project: Project, experiment: str) -> Iterator[None]:
    """Meanwhile, show how far the training is, draw its curve, and tell of each sealed checkpoint."""
    done = threading.Event()
    show = _Training(project, experiment, get_run_logger())
    thread = threading.Thread(target=contextvars.copy_context().run, args=(show.until, done), name="showing", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(SECONDS_BETWEEN_UPDATES)


class _Training:
    """The journal's tail, as artifacts, events and now and then a line of the log."""

    def __init__(self, project: Project, experiment: str, logger: logging.Logger | logging.LoggerAdapter[Any]) -> None:
        self._experiment = experiment
        self._folder = project.run_folder(experiment)
        self._logger = logger
        self._progress = Progress(self._folder.journal)
        self._artifact: UUID | None = None
        self._image: UUID | None = None
        self._before = self._drawn = self._read()  # of an earlier attempt: not news
        self._told = self._progress.checkpoint
        self._began = self._logged_at = self._drawn_at = time.monotonic()

    def until(self, done: threading.Event) -> None:
        """Look at the journal until it is over, and once more then."""
        last = False
        while not last:
            last = done.wait(SECONDS_BETWEEN_UPDATES)
            reading = self._read()
            if self._progress.checkpoint != self._told:
                self._told = self._progress.checkpoint
                self._quietly(self._tell_sealed)
            if reading is None or reading == (self._drawn if last else self._before):
                continue
            self._before = reading
            percent, line = round(100 * reading.step / max(reading.total_steps, 1), 2), reading.line()
            self._quietly(lambda percent=percent, line=line: self._show(percent, line))  # type: ignore[misc]
            between = max(SECONDS_BETWEEN_IMAGES, SHARE_BETWEEN_IMAGES * (time.monotonic() - self._began))
            if last or time.monotonic() - self._drawn_at > between:
                self._drawn_at, self._drawn = time.monotonic(), reading
                self._quietly(self._draw)
            if last or time.monotonic() - self._logged_at > SECONDS_BETWEEN_LOG_LINES:
                self._logged_at = time.monotonic()
                self._logger.info(line)

    def _read(self) -> Reading | None:
        try:
            return self._progress.read()
        except OSError as error:  # a network's file system; the next look may succeed
            self._logger.debug("the journal cannot be read now: %s", error)
            return None

    def _show(self, percent: float, line: str) -> None:
        if self._artifact is None:
            key = artifact_key("training", self._experiment)
            self._artifact = cast(UUID, create_progress_artifact(percent, key=key, description=line))
        else:
            update_progress_artifact(self._artifact, percent, description=line)

    def _draw(self) -> None:
        from tasks.curve_image import loss_curve

        drawing = base64.b64encode(loss_curve(self._folder).encode()).decode()
        data, key = f"data:image/svg+xml;base64,{drawing}", artifact_key("loss", self._experiment)
        if self._image is None:
            self._image = cast(UUID, create_image_artifact(data, key=key, description=f"Loss of {self._experiment}"))
            return
        with get_client(sync_client=True) as client:
            client.update_artifact(self._image, ArtifactUpdate(data=data))

    def _tell_sealed(self) -> None:
        sealed = self._told
        resource = {"prefect.resource.id": f"gpt2.checkpoint.{self._experiment}.{sealed}", "gpt2.experiment": self._experiment}
        emit_event(SEALED, resource={**resource, "gpt2.checkpoint": sealed or "", "prefect.resource.name": f"{self._experiment} {sealed}"})

    def _quietly(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:
            self._logger.debug("not shown now: %s", error)


def _store(create: Callable[[], object], what: str) -> None:
    """Store an artifact, unless Prefect's server is gone: its client would try for more than a minute to reach it."""
    logger = get_run_logger()

    def store() -> None:
        try:
            create()
        except Exception as error:
            logger.warning("%s was not stored: %s", what, error)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(store,), name="artifact", daemon=True)
    thread.start()
    thread.join(SECONDS_BETWEEN_UPDATES)
