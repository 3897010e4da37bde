"""The commands that go on until they are stopped: the servers with their pages and workers, and a worker alone."""

import os
from typing import Annotated

import typer

from tasks.project import find_project


def services(
    prefect_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of Prefect's server and UI.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of MLflow's server and UI.")] = 5000,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where both listen; other than loopback only with a password in GPT2_PASSWORD.")
    ] = "127.0.0.1",
    postgres: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Keep the data of both in this PostgreSQL, such as postgresql://user@host:5432. Or set GPT2_POSTGRES."
        ),
    ] = None,
) -> None:
    """Start Prefect's and MLflow's servers with their UIs and a worker of each pool, `gpu` and `cpu`, and deploy. Ctrl-C ends all of them.

    With GPT2_PASSWORD in the environment both ask for it (user: admin).

    Example: gpt2 services

    Example: gpt2 services --postgres postgresql://gpt2@db.example.org
    """
    from flows.access import chosen_access
    from flows.postgres import refuse_a_password
    from flows.services import run_services

    if postgres is not None:
        refuse_a_password(postgres)
    run_services(find_project(), chosen_access(host, prefect_port, mlflow_port), postgres or os.environ.get("GPT2_POSTGRES"))


def worker(
    pool: Annotated[str, typer.Argument(metavar="POOL", help="Its work pool: `gpu` or `cpu`.")],
    limit: Annotated[
        int | None, typer.Option(min=1, help="Flow runs at once; by default one a GPU on the pool gpu, else all there are.")
    ] = None,
) -> None:
    """Run a worker for the Prefect server of PREFECT_API_URL. When it is stopped (Ctrl-C, SIGTERM), its trainings stop resumably first.

    Example: gpt2 worker gpu
    """
    from flows.services import chosen_worker, run_worker

    run_worker(find_project(), chosen_worker(pool, limit))
