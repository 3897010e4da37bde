"""The whole desk in one terminal: Prefect's server, MLflow's, one worker, the deployments. All on this machine's loopback."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.local_server import answers
from flows.stop import STOP
from model.errors import UserError
from model.secrets import redacted
from tasks.project import Project
from tasks.report import publish
from tasks.steps import stop_signals

HOST = "127.0.0.1"
POOL = "gpu"
STARTS_WITHIN_S = 180.0
ENDS_WITHIN_S = 35.0
"""A worker's flow gets 30 s to stop resumably."""


def run_services(project: Project, prefect_port: int, mlflow_port: int) -> None:
    """Start everything, deploy, print the addresses, and wait for Ctrl-C; then end everything in the opposite order.

    Raises:
        UserError: a port is taken.
        ConnectionError: a service did not start, or ended.
    """
    for port, option in ((prefect_port, "--prefect-port"), (mlflow_port, "--mlflow-port")):
        _check_free(port, option)
    desk = _Desk(project)
    for number in stop_signals():
        signal.signal(number, lambda *_: STOP.set())
    try:
        api = f"http://{HOST}:{prefect_port}/api"
        desk.environment["PREFECT_API_URL"] = api
        desk.start("Prefect", "prefect", "server", "start", "--host", HOST, "--port", str(prefect_port))
        if "MLFLOW_TRACKING_URI" in os.environ:
            mlflow = os.environ["MLFLOW_TRACKING_URI"]
        else:
            mlflow = f"http://{HOST}:{mlflow_port}"
            desk.start("MLflow", "mlflow", "server", "--host", HOST, "--port", str(mlflow_port), "--workers", "1", *_mlflow_store(project))
            desk.wait_for("MLflow", f"{mlflow}/health")
        desk.environment[publish.UI] = mlflow
        desk.wait_for("Prefect", f"{api}/health")
        desk.run("prefect", "--no-prompt", "work-pool", "create", POOL, "--type", "process", "--overwrite")
        desk.run("prefect", "--no-prompt", "deploy", "--all")
        desk.start("worker", "prefect", "worker", "start", "--pool", POOL, "--type", "process")
        if not STOP.is_set():
            print(
                f"""
Prefect   http://{HOST}:{prefect_port}
MLflow    {redacted(mlflow)}/#/models?workflowType=machine_learning
worker    of the pool `{POOL}`, in {project.root}

In another terminal:
  export PREFECT_API_URL={api}
  prefect deployment run train-gpt2/quickstart --watch
Ctrl-C ends all of it; a training is stopped resumably.""",
                flush=True,
            )
        while not STOP.wait(1.0):
            desk.check()
    finally:
        desk.end()


@dataclass
class _Desk:
    """The processes, each the leader of a group of its own, so that Ctrl-C reaches them through us and in order."""

    project: Project
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, *command: str) -> None:
        """Start a service; what it prints goes to .dvc/tmp/gpt2/<name>.log."""
        if STOP.is_set():
            return
        group: dict[str, Any] = {"creationflags": 0x200} if sys.platform == "win32" else {"start_new_session": True}
        with self._log(name).open("wb") as log:
            self.processes[name] = subprocess.Popen(
                _command(command),
                cwd=self.project.root,
                env=self.environment | _SERVERS,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                **group,
            )
        print(f"{name} starts", flush=True)

    def run(self, *command: str) -> None:
        """Run a command to its end.

        Raises:
            ConnectionError: it failed.
        """
        if STOP.is_set():
            return
        done = subprocess.run(_command(command), cwd=self.project.root, env=self.environment | _SERVERS, capture_output=True, text=True)
        if done.returncode:
            raise ConnectionError(f"{' '.join(command)} failed: {' '.join((done.stderr or done.stdout).split())[-500:]}")

    def wait_for(self, name: str, url: str) -> None:
        """Wait until a service answers."""
        deadline = time.monotonic() + STARTS_WITHIN_S
        while not answers(url) and not STOP.wait(0.3):
            self.check()
            if time.monotonic() > deadline:
                raise ConnectionError(f"{name} does not answer at {url}; see {self._log(name)}")

    def check(self) -> None:
        """All are alive.

        Raises:
            ConnectionError: one has ended; all others are to be ended, too.
        """
        for name, process in self.processes.items():
            if process.poll() is not None:
                raise ConnectionError(f"{name} ended with exit code {process.returncode}; see {self._log(name)}")

    def end(self) -> None:
        """End them, last started first."""
        for name, process in reversed(self.processes.items()):
            print(f"{name} ends", flush=True)
            process.terminate()
            try:
                process.wait(ENDS_WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _log(self, name: str) -> Path:
        return self.project.scratch_folder() / f"{name}.log"


_SERVERS: dict[str, str] = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}


def _mlflow_store(project: Project) -> list[str]:
    """MLflow's default store, that of the first experiment's storage; made here, because two processes must not make it at once."""
    from tasks import tracking

    experiment = project.experiment(project.experiment_names()[0])
    tracking.connect(project, experiment)
    artifacts = tracking.mlflow_folder(project, experiment) / "artifacts"
    return ["--backend-store-uri", tracking.tracking_uri(project, experiment), "--artifacts-destination", artifacts.as_uri()]


def _command(command: tuple[str, ...]) -> list[str]:
    return [sys.executable, "-m", *command]


def _check_free(port: int, option: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            raise UserError(f"{option}: port {port} is taken; choose another") from None
