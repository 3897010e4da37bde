"""The command that deploys to a team's Prefect server."""

import os
from typing import Annotated

import typer

from model.errors import UserError
from model.secrets import redacted
from tasks.project import find_project


def deploy(
    alert_webhook: Annotated[
        str | None,
        typer.Option(
            metavar="URL", envvar="GPT2_ALERT_WEBHOOK", help="Send alerts there: a webhook of Slack, Mattermost, Google Chat, ..."
        ),
    ] = None,
    alert_block: Annotated[
        str | None,
        typer.Option(metavar="TYPE/NAME", help="Send alerts to a notification block of the server, such as sendgrid-email/NAME."),
    ] = None,
) -> None:
    """Let a Prefect server (PREFECT_API_URL) have the work pools cpu and gpu, everything of prefect.yaml, and the automations.

    Repeating it is how a change of prefect.yaml gets there; what is right already is left alone. Alerts tell when a run failed or crashed,
    when another checkpoint is champion, and when one is rotten: docs/alerts.md.

    Example: gpt2 deploy

    Example: gpt2 deploy --alert-block slack-webhook/on-call
    """
    from flows.deploy import POOLS
    from flows.deploy import deploy as deploy_to

    if alert_webhook is not None and alert_block is not None:
        raise UserError("--alert-webhook, --alert-block: alerts go to one place; leave one of the two out")
    deploy_to(find_project(), os.environ, webhook=alert_webhook, block=alert_block)
    where = redacted(os.environ.get("PREFECT_API_URL", "the server of the active Prefect profile"))
    told = "; alerts are sent" if alert_webhook or alert_block else ""
    print(f"deployed to {where}: work pools {' and '.join(POOLS)}, everything of prefect.yaml, automations{told}")
