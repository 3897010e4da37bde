"""The product as its user has it: a clone of the repository, its commands as processes, servers on free ports; only the network is tiny."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from model.run_folder import RunFolder
from model.stream.quickstart import write_corpus
from model.training.journal import Event, read_all
from tests.flows.prefect_server import ask
from tests.tasks.conftest import free_port

ROOT = Path(__file__).parents[2]
PYTHON = sys.executable
GPT2 = (PYTHON, "-m", "flows.cli")
DVC = (PYTHON, "-m", "dvc")
PREFECT = (PYTHON, "-m", "prefect")


@dataclass
class Clone:
    """A fresh clone with nano experiments: `quickstart`, `again` (the same, under another name), `quickstart-tuned`, which begins with
    quickstart's champion, and `samples2m`, which trains for ever."""

    root: Path
    environment: dict[str, str]
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def run(self, *command: str, check: bool = True, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        done = subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=timeout)
        if check:
            assert done.returncode == 0, f"{' '.join(command[1:])} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a command that a test will end. What it prints goes to a file, so that no pipe keeps it waiting."""
        with self._log(len(self.started)).open("w") as log:
            process = subprocess.Popen(
                command,
                cwd=self.root,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def said_by(self, process: subprocess.Popen[str]) -> str:
        """What a started command printed so far."""
        return self._log(self.started.index(process)).read_text()

    def _log(self, number: int) -> Path:
        return self.root.parent / f"process-{number}.log"

    def folder(self, experiment: str) -> RunFolder:
        return RunFolder(self.root / "runs" / experiment)

    def journal(self, experiment: str) -> list[Event]:
        return read_all(self.folder(experiment).journal)

    def status(self, experiment: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run(*GPT2, "status", experiment, "--json").stdout)
        return found

    def checkpoints(self, experiment: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = json.loads(self.run(*GPT2, "checkpoints", experiment, "--verify", "--json").stdout)
        return rows

    def trainers(self) -> list[psutil.Process]:
        """The trainer processes of this clone that are alive."""
        return [process for process in self._processes() if "model.training" in process.info["cmdline"]]

    def stages(self) -> list[psutil.Process]:
        """The stages and their `dvc repro` that are alive."""
        return [
            p for p in self._processes() if "repro" in p.info["cmdline"] or any(part.startswith("tasks.") for part in p.info["cmdline"])
        ]

    def dvc_of(self, experiment: str) -> psutil.Process:
        """The `dvc repro` that works on an experiment."""
        return next(p for p in self._processes() if "repro" in p.info["cmdline"] and p.info["cmdline"][-1].endswith(f"@{experiment}"))

    def _processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter(["cmdline", "cwd", "status"]):
            about = process.info
            if about["cmdline"] and about["cwd"] and Path(about["cwd"]) == self.root and about["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def end(self) -> list[str]:
        """End what still runs; what that was."""
        left = [process for process in self._processes() if process.pid != os.getpid()]
        names = [" ".join(process.info["cmdline"]) for process in left]
        for process in left:
            process.kill()
        psutil.wait_procs(left, 20)
        for process in self.started:
            process.wait(20)
        return names


def until(true: Callable[[], Any], seconds: float = 120.0, what: str = "") -> Any:
    """Wait until something holds, and return it."""
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what or true}"
        time.sleep(0.1)
    return value


def until_it_trains(clone: Clone, experiment: str) -> None:
    """Wait until the trainer that runs now has taken some steps."""

    def steps() -> bool:
        trainers = clone.trainers()
        since = trainers[0].create_time() if trainers else float("inf")
        return sum(event["event"] == "step" and event["time"] > since for event in clone.journal(experiment)) > 2

    until(steps, what=f"{experiment} trains")


def until_left(clone: Clone, seconds: float = 20.0) -> None:
    """Wait until no trainer is alive: `seconds` at most. Then until DVC and the stage have noticed, too."""
    until(lambda: not clone.trainers(), seconds, "the trainer leaves")
    until(lambda: not clone.stages(), 60.0, "DVC and the stage leave")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that is versioned: not the locks and claims, whose names begin with a dot, and not the report, which is made anew."""
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    versioned = [path for path in files if path.parts[0] != "report" and not any(part.startswith(".") for part in path.parts)]
    return {str(path): (folder / path).read_bytes() for path in versioned}


def copy_working_tree(root: Path) -> None:
    """What git tracks or would track, as it is now, into the new folder `root`; no record of DVC's."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.split("\0"):
        if (ROOT / name).is_file() and name != "dvc.lock":
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    home = tmp_path_factory.mktemp("home")
    root = home / "a clone"
    copy_working_tree(root)
    write_corpus(home / "corpus", seed=1, rows=600, files=2)
    tiny = {
        "model": {"preset": "nano", "dropout": 0.1},
        "data": {"path": str(home / "corpus"), "max_length": 32, "buffer_size": 100, "lanes": 2},
        "training": {"batch_size": 2, "num_epochs": 100_000, "max_steps": 240, "warmup_steps": 5, "eval_freq": 120, "eval_iters": 1},
        "checkpoint": {"save_every_n_iterations": 120},
        "evaluation": {"items": 4, "questions": 4, "max_new_tokens": 4, "prompts": ["What is 1 + 1?"]},
        "hardware": {"device": "cpu"},
    }
    tuned = {"post_training": {"base": "models:/quickstart@champion"}, "training": {"learning_rate": 0.001}}
    experiments = {"quickstart": {}, "again": {}, "quickstart-tuned": tuned, "samples2m": {"training": {"max_steps": 1_000_000}}}
    (root / "params.yaml").write_text(yaml.safe_dump({"defaults": tiny, "experiments": experiments}))
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "all"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    unset = ("PREFECT_API_URL", "PREFECT_PROFILE", "MLFLOW_TRACKING_URI", "GPT2_WATCH_PID", "PYTHONPATH")
    environment = {key: value for key, value in os.environ.items() if key not in unset} | {
        "PATH": os.pathsep.join([str(Path(PYTHON).parent), os.environ["PATH"]]),  # activated, as `dvc repro` needs it
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "DVC_SITE_CACHE_DIR": str(home / "dvc"),
        "DVC_NO_ANALYTICS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    clone = Clone(root, environment)
    yield clone
    assert clone.end() == [], "these were left behind"


@dataclass
class Services:
    """`gpt2 services`: a Prefect server, MLflow's, a worker of each pool, everything deployed."""

    clone: Clone
    desk: subprocess.Popen[str]
    mlflow: str

    def flow_run(self, experiment: str) -> str:
        """Start `train-gpt2/<experiment>`; the id of the run."""
        return self._run(f"train-gpt2/{experiment}")

    def watched(self, deployment: str) -> str:
        """Start a deployment and wait for the end of the run, which has to complete; its id."""
        return self._run(deployment, "--watch")

    def _run(self, *arguments: str) -> str:
        return self.clone.run(*PREFECT, "deployment", "run", *arguments).stdout.split("UUID:")[1].split()[0]

    def state(self, flow_run_id: str) -> str:
        return str(self.ask(f"flow_runs/{flow_run_id}")["state"]["name"])

    def task_states(self, flow_run_id: str, *names: str) -> dict[str, str]:
        """How these tasks of a flow run that is over ended. The server learns it from events, which may come later than the end."""
        body = {"flow_runs": {"id": {"any_": [flow_run_id]}}}
        deadline = time.monotonic() + 60
        while True:
            runs = self.ask("task_runs/filter", body)
            states = {run["name"].partition("[")[0]: run["state"]["name"] for run in runs}
            under_way = any(run["state"]["type"] in ("PENDING", "RUNNING") for run in runs)
            if time.monotonic() > deadline or (set(names) <= set(states) and not under_way):
                return {name: states.get(name, "unknown") for name in names}
            time.sleep(0.5)

    def training(self, experiment: str) -> dict[str, Any]:
        """The newest run of `stream-and-train` for an experiment."""
        body = {"flow_runs": {"tags": {"all_": [f"trains:{experiment}"]}}, "sort": "START_TIME_DESC", "limit": 1}
        found: dict[str, Any] = self.ask("flow_runs/filter", body)[0]
        return found

    def ask(self, path: str, body: Any = None) -> Any:
        return ask(f"{self.clone.environment['PREFECT_API_URL']}/{path}", body)

    def worker(self, pool: str) -> psutil.Process:
        below = psutil.Process(self.desk.pid).children(recursive=True)
        return next(process for process in below if {"worker", pool} <= set(process.cmdline()))


@pytest.fixture(scope="module")
def services(clone: Clone) -> Iterator[Services]:
    prefect, mlflow = free_port(), free_port()
    desk = clone.start(*GPT2, "services", "--prefect-port", str(prefect), "--mlflow-port", str(mlflow))
    until(lambda: "Ctrl-C ends all" in clone.said_by(desk) or desk.poll() is not None, 180, "all services answer")
    assert desk.poll() is None, clone.said_by(desk)
    clone.environment["PREFECT_API_URL"] = f"http://127.0.0.1:{prefect}/api"
    yield Services(clone, desk, f"http://127.0.0.1:{mlflow}")
    if desk.poll() is None:
        desk.send_signal(signal.SIGINT)
        assert desk.wait(90) == 0
