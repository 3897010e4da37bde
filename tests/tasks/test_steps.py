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


STARTS_THREADS = """
import subprocess, sys, threading
from tasks.steps import run_step

SENDER = "for _ in sys.stdin: time.sleep(random.uniform(0.001, 0.004)); os.kill(os.getppid(), signal.SIGTERM)"

def a_step(project, name):
    sender.stdin.write(b"now\\n")
    sender.stdin.flush()
    while True:
        threading.Thread(target=int).start()

sender = subprocess.Popen([sys.executable, "-c", "import os, random, signal, sys, time\\n" + SENDER], stdin=subprocess.PIPE)
for _ in range(200):
    try:
        run_step(a_step)
    except SystemExit as end:
        print(end.code, flush=True)
"""


def test_a_signal_while_a_thread_starts_breaks_neither(new_project: Project) -> None:
    """From another process, because threads of this one cannot send it in the moment that matters."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", STARTS_THREADS, NAME], cwd=new_project.root, env=environment, capture_output=True, text=True, timeout=100
    )
    assert set(done.stdout.split()) == {"75"}
    assert done.returncode in (0, 75), "75: the exception went to a destructor, and the process was left"
    assert "_bootstrap" not in done.stderr, done.stderr[-3000:]
    assert {line for line in done.stderr.splitlines() if line.startswith("error")} == {"error: stopped: SIGTERM received"}


def test_a_request_that_goes_to_a_destructor_is_heard_all_the_same(new_project: Project) -> None:
    body = "Deaf = type('Deaf', (), {'__del__': lambda self: (print('deaf', flush=True), time.sleep(60))}); Deaf(); time.sleep(60)"
    step = start(new_project, body, NAME)
    assert step.stdout is not None
    while step.stdout.readline() != "deaf\n":
        pass
    began = time.monotonic()
    step.send_signal(signal.SIGTERM)
    _, err = step.communicate(timeout=60)
    assert step.returncode == 75
    assert err.splitlines()[-1] == "error: stopped: SIGTERM received"
    assert time.monotonic() - began < 10


def test_a_step_may_be_interrupted_by_a_handler_of_its_own(new_project: Project) -> None:
    step = start(new_project, "from model.errors import Interrupted; raise Interrupted('SIGTERM')", NAME)
    _, err = step.communicate(timeout=60)
    assert (step.returncode, err) == (75, "error: stopped: SIGTERM received\n")
