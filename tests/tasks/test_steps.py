"""Each step is a process; what it tells its starter is its exit code and one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tasks.project import Project
from tests.tasks.conftest import NAME

STEP = """
import sys, time
from model.errors import Stopped, UserError
from tasks.steps import run_step

def a_step(project, name):
    print("began", name, flush=True)
    {body}

run_step(a_step)
"""


def start(project: Project, body: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", STEP.format(body=body), *arguments]
    return subprocess.Popen(
        command, cwd=project.root, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    ("body", "code", "complaint"),
    [
        ("pass", 0, ""),
        ("raise UserError('data.path: not there')", 2, "error: data.path: not there\n"),
        ("raise Stopped('saved at step 3')", 75, "error: stopped: saved at step 3\n"),
    ],
)
def test_exit_code_and_one_line(new_project: Project, body: str, code: int, complaint: str) -> None:
    step = start(new_project, body, NAME)
    out, err = step.communicate(timeout=60)
    assert (step.returncode, out, err) == (code, f"began {NAME}\n", complaint)


def test_a_fault_keeps_its_traceback_and_ends_with_one_line(new_project: Project) -> None:
    step = start(new_project, "1 / 0", NAME)
    _, err = step.communicate(timeout=60)
    assert step.returncode == 1
    assert err.startswith("Traceback")
    assert err.splitlines()[-1] == "error: ZeroDivisionError: division by zero"


@pytest.mark.parametrize("error", ["UserError", "Stopped", "OSError"])
def test_what_a_step_says_holds_no_secret(new_project: Project, error: str) -> None:
    body = f"raise {error}('http://me:pl4nted1@host/x says no to pl4nted-token')"
    step = start(new_project, body, NAME, HF_TOKEN="pl4nted-token")
    _, err = step.communicate(timeout=60)
    assert err.splitlines()[-1].endswith("http://***@host/x says no to ***")
    assert "pl4nted" not in err.replace(body, ""), "the traceback, too"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_step_resumably(new_project: Project, number: signal.Signals) -> None:
    step = start(new_project, "time.sleep(60)", NAME)
    assert step.stdout is not None
    step.stdout.readline()
    began = time.monotonic()
    step.send_signal(number)
    _, err = step.communicate(timeout=60)
    assert step.returncode == 75
    assert number.name in err
    assert time.monotonic() - began < 10


def test_without_an_experiment_the_step_says_how_it_is_called(tmp_path: Path, new_project: Project) -> None:
    step = start(new_project, "pass")
    _, err = step.communicate(timeout=60)
    assert step.returncode == 2
    assert "python -m tasks.a_step" in err
