"""What sending a training's journal to MLflow takes of the machine, whatever MLflow does: the only way in which it can slow a step down.

    python -m benchmarks.forwarder      # four minutes; in a checkout, whose tests have the servers that misbehave

The trainer itself talks to nobody. Beside it runs the forwarder; a core that it uses is missing to a training that uses all of them. A
journal is written as a training of so many steps a second writes it, and the forwarder's processor time is read from the system.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
MODES = ("answers", "black hole", "closed", "503")
TO_START_S = 25.0


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forwarder", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=25.0, help="to measure each behaviour for (25)")
    parser.add_argument("--steps", type=float, default=30.0, help="a second, which the journal tells of (30)")
    options = parser.parse_args()
    from tests.faults.misbehaving import Misbehaving
    from tests.tasks.conftest import Server

    table = Table(title=f"{options.steps:g} steps/s")
    for column in ("MLflow", "to start, CPU-s", "then, % of one core"):
        table.add_column(column, justify="left" if column == "MLflow" else "right")
    with tempfile.TemporaryDirectory() as home:
        server = Server(Path(home) / "mlflow")
        server.start()
        try:
            toy = Misbehaving(server.uri)
            for mode in MODES:
                toy.mode = mode
                start, share = measure(Path(home) / mode.replace(" ", "_"), toy.uri, options.seconds, options.steps)
                table.add_row(mode, f"{start:.1f}", f"{100 * share:.2f}")
            toy.close()
        finally:
            server.stop()
    Console().print(table)


def measure(root: Path, uri: str, seconds: float, steps_a_second: float) -> tuple[float, float]:
    """CPU-seconds that the forwarder takes to start, and its share of one core after that."""
    from tests.tasks.conftest import NAME, make_project
    from tests.tasks.test_forwarder import Training

    training = Training(make_project(root))
    training.start()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": uri}
    command = [sys.executable, "-m", "tasks.forwarder", NAME, "--follow"]
    forwarder = subprocess.Popen(command, cwd=root, env=environment, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        process = psutil.Process(forwarder.pid)
        time.sleep(TO_START_S)
        start, began, step = sum(process.cpu_times()[:2]), time.monotonic(), 0
        while (took := time.monotonic() - began) < seconds:
            step += 1
            training.steps(step, step)
            time.sleep(1 / steps_a_second)
        return start, (sum(process.cpu_times()[:2]) - start) / took
    finally:
        forwarder.kill()
        forwarder.wait()


if __name__ == "__main__":
    main()
