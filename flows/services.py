"""The whole desk in one terminal: Prefect's server, MLflow's, a worker for each pool, the deployments."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from datetime import UTC, datetime
from typing import NamedTuple

from flows.access import PASSWORD, USER, Access
from flows.clone import PROJECT
from flows.desk import Desk, Service
from flows.local_server import answers
from flows.postgres import Databases, make_databases
from flows.stop import STOP
from model.secrets import redacted
from tasks.project import Project
from tasks.report import publish

_NO_TELEMETRY = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_PREFECT_SERVER = {
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    # Who holds a concurrency slot is known after a restart, too; kept in memory it would stay taken.
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
}
_MLFLOW_SERVER = {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
_WORKER = {"PREFECT_WORKER_QUERY_SECONDS": "2"}
"""How often it asks for work, unless the environment says otherwise; Prefect's own 10 s are half of what a small flow takes."""
_SERVERS_ONLY = ("GPT2_POSTGRES", "PGPASSWORD")
"""What no worker needs to know."""


class Worker(NamedTuple):
    """A worker of this machine."""

    pool: str
    limit: int | None
    """Flow runs at once; None: as many as there are. Where there is a limit, a run that is resumed before its old process has left kills
    Prefect's worker (3.8.8: its limiter refuses to count a run twice); so there is none where runs can be resumed."""

    @property
    def name(self) -> str:
        """Such as `gpu@first-machine`."""
        return f"{self.pool}@{socket.gethostname()}"

    def __str__(self) -> str:
        return f"{self.name} ({self.limit} at once)" if self.limit else self.name

    def service(self, project: Project, environment: dict[str, str]) -> Service:
        """What runs it, in this clone."""
        about = ["--pool", self.pool, "--type", "process", "--name", self.name]
        about += ["--limit", str(self.limit)] if self.limit else []
        return Service(
            f"{self.pool} worker", ["prefect", "worker", "start", *about], {**_WORKER, **environment, PROJECT: str(project.root)}
        )


def run_services(project: Project, access: Access, postgres: str | None = None) -> None:
    """Start everything, deploy, print the addresses, and wait for Ctrl-C; then end everything in the opposite order. A second Ctrl-C ends
    it at once.

    An MLflow that MLFLOW_TRACKING_URI names is used as it is. `postgres`: where both servers keep their data, instead of in SQLite files.

    Raises:
        UserError: the PostgreSQL cannot be used as it is given.
        ConnectionError: a service did not start, or ended.
    """
    from flows.deploy import deploy

    databases = make_databases(postgres) if postgres else None
    ours = "MLFLOW_TRACKING_URI" not in os.environ
    mlflow = access.mlflow if ours else os.environ["MLFLOW_TRACKING_URI"]
    clients = {key: value for key, value in os.environ.items() if key not in _SERVERS_ONLY}
    clients |= {**_NO_TELEMETRY, **access.for_clients(), publish.UI: mlflow}
    if ours and databases:
        clients |= access.for_mlflow_clients()
    servers = [_prefect_server(access, databases), *([_mlflow_server(project, access, databases)] if ours else [])]
    workers = [chosen_worker("gpu"), chosen_worker("cpu")]
    desk = Desk(project.root, project.scratch_folder())
    try:
        desk.start(*servers)
        if ours:
            desk.wait_until("MLflow", lambda: answers(f"{mlflow}/health"))
        desk.wait_until("Prefect", lambda: answers(f"{clients['PREFECT_API_URL']}/health"))
        if not STOP.is_set():
            print("deploying", flush=True)
            deploy(project, clients)
        desk.start(*(worker.service(project, clients) for worker in workers))
        _wait_for_workers(desk, workers, clients)
        if not STOP.is_set():
            print(_welcome(project, access, mlflow, clients, workers), flush=True)
        while not STOP.wait(1.0):
            desk.check()
    except Exception:
        if not STOP.is_set():  # Ctrl-C reaches the commands that deploy, too
            raise
    finally:
        desk.end()


def run_worker(project: Project, worker: Worker) -> None:
    """Run a worker for the Prefect server that PREFECT_API_URL or the active profile names, until it is asked to stop (Ctrl-C, SIGTERM):
    then its flows stop resumably, and say so to Prefect, before it ends.

    Raises:
        ConnectionError: it ended by itself.
    """
    desk = Desk(project.root, project.scratch_folder())
    try:
        desk.start(worker.service(project, {**os.environ, **_NO_TELEMETRY}))
        while not STOP.wait(1.0):
            desk.check()
    finally:
        desk.end()


def chosen_worker(pool: str, limit: int | None = None) -> Worker:
    """A worker of a pool; by default for as many flow runs at once as suit this machine: on `gpu` one for each GPU."""
    return Worker(pool, limit or (gpus() if pool == "gpu" else None))


def gpus() -> int:
    """How many trainings this machine runs at once: one on each GPU, one if there is none. CUDA_VISIBLE_DEVICES is respected."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return max(1, sum(device.strip() not in ("", "-1") for device in visible.split(",")))
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 1
    return max(1, len(re.findall(r"^GPU \d+:", listed, re.MULTILINE)))


def _prefect_server(access: Access, databases: Databases | None) -> Service:
    database = {"PREFECT_SERVER_DATABASE_CONNECTION_URL": databases.prefect} if databases else {}
    return Service(
        "Prefect",
        ["flows.prefect_server", "server", "start", "--host", access.host, "--port", str(access.prefect_port)],
        {**os.environ, **_NO_TELEMETRY, **_PREFECT_SERVER, **access.for_clients(), **access.for_prefect(), **database},
    )


def _mlflow_server(project: Project, access: Access, databases: Databases | None) -> Service:
    """On the default store, that of the first experiment's storage, if there are no databases. An empty one is made here, because two
    processes must not make it at once."""
    from tasks import tracking

    experiment = project.experiment(project.experiment_names()[0])
    if databases is None:
        tracking.connect(project, experiment)
    store = databases.mlflow if databases else tracking.tracking_uri(project, experiment)
    artifacts = tracking.mlflow_folder(project, experiment) / "artifacts"
    where = ["--host", access.host, "--port", str(access.mlflow_port), "--artifacts-destination", artifacts.as_uri()]
    accounts = ["--app-name", "basic-auth"] if access.password else []
    environment = {**os.environ, **_NO_TELEMETRY, **_MLFLOW_SERVER, **access.for_mlflow(project), "MLFLOW_BACKEND_STORE_URI": store}
    return Service("MLflow", ["mlflow", "server", *where, "--workers", "1", *accounts], environment)


def _wait_for_workers(desk: Desk, workers: list[Worker], environment: dict[str, str]) -> None:
    """Wait until Prefect's server has heard from each of them."""
    from flows.deploy import connected

    since = datetime.now(UTC)
    with connected(environment) as client:

        def heard_from(worker: Worker) -> bool:
            known = client.read_workers_for_work_pool(worker.pool)
            return any(each.name == worker.name and each.last_heartbeat_time and each.last_heartbeat_time > since for each in known)

        for worker in workers:
            desk.wait_until(f"{worker.pool} worker", lambda worker=worker: heard_from(worker))  # type: ignore[misc]


def _welcome(project: Project, access: Access, mlflow: str, clients: dict[str, str], workers: list[Worker]) -> str:
    """What is where, and what to type next; with the names of variables where a password belongs."""
    lines = [
        f"Prefect   {access.prefect}",
        f"MLflow    {redacted(mlflow)}/#/models?workflowType=machine_learning",
        f"workers   {', '.join(map(str, workers))}, in {project.root}",
    ]
    advice = [f"export PREFECT_API_URL={clients['PREFECT_API_URL']}"]
    if access.password:
        lines.append(f"login     {USER}:PASSWORD at Prefect, the user {USER} at MLflow; the password is that of {PASSWORD}")
        advice.append(f'export PREFECT_API_AUTH_STRING="{USER}:${PASSWORD}"')
    if clients.get("MLFLOW_TRACKING_URI") == access.mlflow:
        advice.append(f"export MLFLOW_TRACKING_URI={access.mlflow}")
        if access.password:
            advice.append(f'export MLFLOW_TRACKING_USERNAME={USER} MLFLOW_TRACKING_PASSWORD="${PASSWORD}"')
    advice.append("prefect deployment run train-gpt2/quickstart --watch")
    commands = "\n".join(f"  {command}" for command in advice)
    return "\n".join(["", *lines, "", "In another terminal:", commands, "Ctrl-C ends all of it; a training is stopped resumably."])
