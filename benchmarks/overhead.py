"""What orchestration costs: a training by itself, by its stages' programs, by `gpt2 train`, and as a deployed run, in one go on one
machine.

    python -m benchmarks.overhead               # half an hour; in a checkout, whose tests have the servers
    python -m benchmarks.overhead --minutes 1   # a quick look
    python -m benchmarks.overhead --threads 2   # where the trainer takes both of two cores: then whatever else runs is paid for twice

A Prefect server, an MLflow server and a worker of each pool are up all the while. The network is the quickstart's, the corpus generated,
the number of steps such that the bare trainer takes `--minutes`; it leaves a core for everything else, as one on a GPU does. The bare
trainer talks to nobody; "stages" are the four programs of dvc.yaml one after the other, without Prefect and without DVC, MLflow included:
what of the flow's time is its own work, and what is orchestration.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
STAGES = ("build_config", "stream_and_train", "checkpoint_register", "evaluate_each_checkpoint")
WAYS = ("bare", "stages", "flow", "deployed")
PROBE_STEPS = 300


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0, help="that the bare trainer takes (5)")
    spare = max(1, (os.cpu_count() or 2) - 1)
    parser.add_argument("--threads", type=int, default=spare, help=f"that the trainer computes with (all cores but one: {spare})")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        project = Setup(Path(home), options.threads)
        try:
            steps = round(PROBE_STEPS * options.minutes * 60 / project.seconds_of_steps(PROBE_STEPS))
            project.experiments(dict.fromkeys(WAYS, steps))
            took = {
                "bare": project.bare(),
                "stages": project.stages(),
                "flow": project.timed("-m", "flows.cli", "train", "flow"),
                "deployed": project.deployed(),
            }
            again = project.timed("-m", "flows.cli", "train", "flow")
            help_ = min(project.timed("-m", "flows.cli", "--help") for _ in range(5))
        finally:
            project.end()
    console = Console()
    table = Table(title=f"{steps:,} steps, {options.threads} of {os.cpu_count()} cores, Prefect's and MLflow's servers up")
    for column in ("", "wall, s", "of bare", "of the stages"):
        table.add_column(column, justify="left" if not column else "right")
    names = {"bare": "the trainer alone", "stages": "the four stages' programs", "flow": "gpt2 train", "deployed": "deployed, two pools"}
    for way in WAYS:
        table.add_row(names[way], f"{took[way]:.1f}", f"{took[way] / took['bare']:.3f}", f"{took[way] / took['stages']:.3f}")
    console.print(table)
    console.print(f"gpt2 train with nothing to do: {again:.1f} s; gpt2 --help: {help_:.2f} s")


class Setup:
    """A clone with an experiment a way, the servers, and the workers."""

    def __init__(self, home: Path, threads: int) -> None:
        from flows.clone import PROJECT
        from model.stream.quickstart import write_corpus
        from tests.flows.prefect_server import PrefectServer
        from tests.tasks.conftest import Server

        self.root = home / "clone"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(self.root)], check=True)
        write_corpus(home / "corpus", seed=1, rows=6000, files=4)
        self._corpus = home / "corpus"
        self._prefect, self._mlflow = PrefectServer(home / "prefect"), Server(home / "mlflow")
        self._prefect.start()
        self._mlflow.start()
        self.environment = self._prefect.environment | {
            "MLFLOW_TRACKING_URI": self._mlflow.uri,
            "PYTHONPATH": str(self.root),
            "DVC_SITE_CACHE_DIR": str(home / "dvc"),
            "DVC_NO_ANALYTICS": "1",
            PROJECT: str(self.root),
            "OMP_NUM_THREADS": str(threads),
        }
        self.experiments({"probe": PROBE_STEPS})
        self._workers: list[subprocess.Popen[bytes]] = []
        from flows.deploy import deploy
        from tasks.project import Project

        deploy(Project(self.root), self.environment)
        for pool in ("cpu", "gpu"):
            command = [sys.executable, "-m", "flows.cli", "worker", pool]
            with (home / f"{pool}.log").open("wb") as log:
                self._workers.append(subprocess.Popen(command, cwd=self.root, env=self.environment, stdout=log, stderr=log))

    def experiments(self, steps: dict[str, int]) -> None:
        """Write params.yaml: the quickstart's network for so many steps, few checkpoints and little to evaluate."""
        params = yaml.safe_load((ROOT / "params.yaml").read_text())
        plain: dict[str, Any] = params["experiments"]["quickstart"]
        plain["data"]["path"] = str(self._corpus)
        few = {"items": 8, "questions": 8, "max_new_tokens": 8, "prompts": ["What is 4 + 5?"]}
        plain["evaluation"] |= few
        found = {}
        for seed, (name, count) in enumerate(steps.items()):
            training = {**plain["training"], "max_steps": count, "num_epochs": 100_000, "eval_freq": max(1, count // 10)}
            checkpoint = {"save_every_n_iterations": max(1, count // 3)}
            found[name] = {**plain, "seed": seed, "training": training, "checkpoint": checkpoint}
        everything = {"defaults": params["defaults"], "experiments": found}
        (self.root / "params.yaml").write_text(json.dumps(everything))  # which is YAML, without the aliases that a dump would make
        (self.root / "overrides.yaml").write_text(json.dumps({"overrides": {name: {} for name in found}}))

    def seconds_of_steps(self, steps: int) -> float:
        """What the trainer takes for the probe's steps, its start left out."""
        self._run("-m", "tasks.build_config", "probe")
        self._run("-m", "model.training", "runs/probe")
        events = [json.loads(line) for line in (self.root / "runs/probe/journal.jsonl").read_text().splitlines()]
        times = [event["time"] for event in events if event["event"] == "step"]
        return float((times[-1] - times[9]) * steps / (len(times) - 10))

    def bare(self) -> float:
        """The trainer alone, its config built before."""
        self._run("-m", "tasks.build_config", "bare")
        return self.timed("-m", "model.training", "runs/bare")

    def stages(self) -> float:
        """The stages' programs in their order."""
        return sum(self.timed("-m", f"tasks.{stage}", "stages") for stage in STAGES)

    def deployed(self) -> float:
        """From the request to the end of the flow run."""
        deployment = self._prefect.ask("deployments/name/train-gpt2/quickstart")["id"]
        body = {"parameters": {"experiment": "deployed"}}
        return _timed(lambda: self._wait(str(self._prefect.ask(f"deployments/{deployment}/create_flow_run", body)["id"])))

    def timed(self, *command: str) -> float:
        """Seconds that a command takes."""
        return _timed(lambda: self._run(*command))

    def end(self) -> None:
        """End workers and servers."""
        for worker in self._workers:
            worker.send_signal(signal.SIGINT)
        for worker in self._workers:
            worker.wait(90)
        self._mlflow.stop()
        self._prefect.stop()
        shutil.rmtree(self.root, ignore_errors=True)

    def _wait(self, flow_run_id: str) -> None:
        while (state := self._prefect.state(flow_run_id)) != "Completed":
            if state in ("Failed", "Crashed", "Cancelled"):
                raise RuntimeError(f"the deployed run ended {state}")
            time.sleep(0.5)

    def _run(self, *command: str) -> None:
        environment = {**self.environment, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
        done = subprocess.run([sys.executable, *command], cwd=self.root, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")


def _timed(act: Callable[[], None]) -> float:
    began = time.monotonic()
    act()
    return time.monotonic() - began


if __name__ == "__main__":
    main()
