"""The desk's processes: ended in order, all of them, whatever happens; and who fails says why."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from model.errors import EXIT_FAULT, EXIT_STOPPED
from tests.end_to_end.conftest import until

SERVICES = {
    "ready": "import time; print('ready', flush=True); time.sleep(600)",
    "stubborn": "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)",
    "broken": "raise RuntimeError('the disk is on fire')",
    # Its child stays in its group when it goes.
    "orphaning": "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); sys.exit('gone')",
    # A child that says when it was asked, as a flow of Prefect's worker does.
    "asked": "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('asked', flush=True)));"
    "print('ready', flush=True); time.sleep(600)",
}
DESK = """
import os, sys
from pathlib import Path
from flows.desk import Desk, Service
from flows.stop import STOP
desk = Desk(Path.cwd(), Path.cwd())
try:
    for batch in sys.argv[1:]:
        desk.start(*(Service(name, [name], dict(os.environ)) for name in batch.split("+")))
    print("all are there", flush=True)
    while not STOP.wait(0.1):
        desk.check()
except ConnectionError as error:
    sys.exit(str(error))
finally:
    desk.end()
"""


class Started:
    def __init__(self, folder: Path, *batches: str) -> None:
        for name, code in SERVICES.items():
            (folder / f"{name}.py").write_text(code)
        self.folder = folder
        self.said = folder / "said"
        with self.said.open("w") as out:
            self.desk = subprocess.Popen(
                [sys.executable, "-c", DESK, *batches], cwd=folder, stdout=out, stderr=out, env=os.environ, start_new_session=True
            )
        self.names = [name for batch in batches for name in batch.split("+")]

    def until_ready(self) -> None:
        until(lambda: "all are there" in self.said.read_text(), 30)
        until(lambda: all("ready" in (self.folder / f"{name}.log").read_text() for name in self.names), 30)

    def left(self) -> list[psutil.Process]:
        """What lives of it, wherever it is now: all run in its folder."""
        found = []
        for process in psutil.process_iter(["cwd", "status"]):
            if process.info["cwd"] == str(self.folder) and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for process in psutil.process_iter(["cwd"]):
        if process.info["cwd"] == str(tmp_path):
            process.kill()


def test_ctrl_c_ends_all_of_them_the_last_batch_first(folder: Path) -> None:
    started = Started(folder, "ready", "asked")
    started.until_ready()
    assert len(started.left()) == 4, "the desk, its keeper, two services"
    started.desk.send_signal(signal.SIGINT)
    assert started.desk.wait(20) == 0
    assert started.said.read_text().splitlines()[-2:] == ["asked ends", "ready ends"]
    assert "asked" in (folder / "asked.log").read_text()
    assert started.left() == []


def test_a_second_ctrl_c_ends_them_at_once(folder: Path) -> None:
    started = Started(folder, "ready", "stubborn")
    started.until_ready()
    started.desk.send_signal(signal.SIGINT)
    until(lambda: "stubborn ends" in started.said.read_text(), 10)
    time.sleep(0.5)
    assert started.desk.poll() is None, "it waits for what does not listen"
    started.desk.send_signal(signal.SIGINT)
    assert started.desk.wait(10) == EXIT_STOPPED
    assert started.left() == []


@pytest.mark.slow
def test_a_killed_desk_leaves_nothing_behind(folder: Path) -> None:
    started = Started(folder, "ready", "asked+ready")
    started.until_ready()
    started.desk.kill()
    started.desk.wait()
    until(lambda: not started.left(), 15)
    assert "asked" in (folder / "asked.log").read_text(), "it was asked to end, not killed"


def test_one_that_fails_is_named_with_its_reason_and_the_others_end(folder: Path) -> None:
    started = Started(folder, "ready", "broken")
    assert started.desk.wait(30) == EXIT_FAULT
    last = started.said.read_text().splitlines()[-1]
    assert last == f"broken ended with exit code 1: RuntimeError: the disk is on fire (all of it in {folder / 'broken.log'})"
    assert started.left() == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no process groups to find an orphan by")
def test_what_a_dead_service_left_behind_ends_too(folder: Path) -> None:
    started = Started(folder, "orphaning")
    assert started.desk.wait(30) == EXIT_FAULT
    assert "orphaning ended with exit code 1: gone" in started.said.read_text()
    assert started.left() == []
