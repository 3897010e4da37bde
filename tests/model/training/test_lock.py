"""model/training/lock.py: who is dead is not in the way, who lives is."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from model.errors import UserError
from model.training.lock import held

ROOT = Path(__file__).parents[3]
HOLDER = """
import contextlib, os, subprocess, sys, time
from pathlib import Path
from model.training.lock import held

with held(Path(sys.argv[1]), "it"):
    for descriptor in range(3, 100):  # what a process has until it is started
        with contextlib.suppress(OSError):
            os.set_inheritable(descriptor, True)
    subprocess.Popen(["cat"], close_fds=False)  # it ends when its input does
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no process inherits a lock there")
def test_who_was_killed_while_it_started_a_process_is_not_in_the_way(tmp_path: Path) -> None:
    lock = tmp_path / "it.lock"
    command = [sys.executable, "-c", HOLDER, str(lock)]
    holder = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdin is not None
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.wait(30)
    with pytest.raises(UserError, match=f"it is in use by another trainer .process {holder.pid}"), held(lock, "it", patience=0):
        pass
    threading.Timer(0.2, holder.stdin.close).start()
    with held(lock, "it"):
        pass
    holder.stdout.close()


def test_who_lives_is_waited_for_no_longer_than_a_moment(tmp_path: Path) -> None:
    with held(tmp_path / "it.lock", "it"), pytest.raises(UserError, match="in use"), held(tmp_path / "it.lock", "it"):
        pass
