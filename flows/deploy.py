"""Deploying to a Prefect server: the work pools, everything of prefect.yaml, the automations. What is right already is left alone."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING
from uuid import UUID

from flows.local_server import answers
from model.errors import UserError
from model.secrets import redacted
from tasks.project import Project

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

POOLS = {
    "cpu": "Everything but training: flows, registering, evaluating",
    "gpu": "Training, one at a time on each GPU",
}
"""The work pools, each with what it is for. A new one is of the type `process`; one that is there may be of any."""

BLOCK = "gpt2-alerts"
"""The name of the notification block that `--alert-webhook` makes."""

_SETTINGS = {"PREFECT_API_URL": "api.url", "PREFECT_API_AUTH_STRING": "api.auth_string", "PREFECT_API_KEY": "api.key"}
"""Where a server is and how it is entered: the variables, and Prefect's names for them."""
_QUIET = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}


def deploy(project: Project, environment: Mapping[str, str], webhook: str | None = None, block: str | None = None) -> None:
    """Let the Prefect server that `environment` (PREFECT_API_URL, PREFECT_API_AUTH_STRING) or the active profile names have what this
    project needs. A work pool that is there is left as it is, an automation that somebody switched off stays off, and alerts stay.

    Args:
        project: with its prefect.yaml.
        environment: a whole one, with which `prefect deploy` runs.
        webhook: a URL that gets a JSON object with `text` for each alert.
        block: a notification block of the server that gets them instead, as `TYPE/NAME`.

    Raises:
        UserError: no server is configured, it refuses us, or there is no such block.
        ConnectionError: it does not answer, or `prefect deploy` failed.
    """
    if not (project.root / "prefect.yaml").is_file():
        raise UserError(f"prefect.yaml: not in {project.root}; nothing says what to deploy")
    with connected(environment) as client:
        document = _made_block(webhook) if webhook is not None else _found_block(client, block) if block is not None else None
        _make_pools(client)
        _run_prefect_deploy(project, environment)
        _make_automations(client, document)


@contextlib.contextmanager
def connected(environment: Mapping[str, str]) -> Iterator[SyncPrefectClient]:
    """A client of the server that is meant; while it is open, everything of Prefect in this process talks to that one."""
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({field: environment[variable] for variable, field in _SETTINGS.items() if variable in environment}):
        server = PREFECT_API_URL.value()
        if not server:
            raise UserError(
                "PREFECT_API_URL: no Prefect server is configured; start one (gpt2 services), and set it to http://HOST:4200/api"
            )
        shown = redacted(server)
        if not answers(f"{server}/health"):
            raise ConnectionError(f"PREFECT_API_URL: no Prefect server answers at {shown}; start it, or name another")
        try:
            with get_client(sync_client=True) as client:
                yield client
        except PrefectHTTPStatusError as error:
            if error.response.status_code in (401, 403):
                raise UserError(f"PREFECT_API_AUTH_STRING: the Prefect server at {shown} does not accept it; ask who runs it") from None
            raise ConnectionError(f"PREFECT_API_URL: {shown} answered {' '.join(redacted(str(error)).split())[:500]}") from None
        except httpx.HTTPError as error:
            raise ConnectionError(f"PREFECT_API_URL: {shown} went away: {redacted(str(error))}") from None


def _make_pools(client: SyncPrefectClient) -> None:
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.workers.process import ProcessWorker

    template = ProcessWorker.get_default_base_job_template()
    for name, purpose in POOLS.items():
        with contextlib.suppress(ObjectAlreadyExists):  # with a team's own template, which stays
            client.create_work_pool(WorkPoolCreate(name=name, type=ProcessWorker.type, description=purpose, base_job_template=template))


def _run_prefect_deploy(project: Project, environment: Mapping[str, str]) -> None:
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(command, cwd=project.root, env={**environment, **_QUIET}, capture_output=True, text=True)
    if done.returncode:
        said = " ".join(redacted(done.stderr or done.stdout).split())
        raise ConnectionError(f"prefect deploy --all failed: {said[-500:]}")


def _make_automations(client: SyncPrefectClient, document: UUID | None) -> None:
    from flows.automations import alerts, crash_the_dead, ensure, watch

    for automation in [crash_the_dead(), *(alerts(document) if document else [])]:
        ensure(client, automation)
    watch(client)


def _made_block(webhook: str) -> UUID:
    """The notification block for a webhook, made or changed. Its URL, often all one needs to write there, lies among its secrets."""
    from prefect.blocks.notifications import CustomWebhookNotificationBlock
    from prefect.types import SecretDict

    if not webhook.startswith(("https://", "http://")):
        raise UserError("--alert-webhook: give a URL that begins with https:// or http://")
    block = CustomWebhookNotificationBlock(
        name=BLOCK,
        url="{{url}}",
        headers=None,
        cookies=None,
        json_data={"text": "{{subject}}\n{{body}}"},
        secrets=SecretDict({"url": webhook}),
    )
    return UUID(str(block.save(BLOCK, overwrite=True)))


def _found_block(client: SyncPrefectClient, block: str) -> UUID:
    from prefect.exceptions import ObjectNotFound

    kind, _, name = block.partition("/")
    try:
        document = client.read_block_document_by_name(name, kind)
    except ObjectNotFound:
        raise UserError(f"--alert-block: there is no {block}; give TYPE/NAME of a block of the server (prefect block ls)") from None
    if document.block_schema is None or "notify" not in document.block_schema.capabilities:
        raise UserError(f"--alert-block: {block} cannot notify; give one that can, such as slack-webhook/NAME or custom-webhook/NAME")
    return document.id
