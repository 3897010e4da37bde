"""model/training/lock.py: who is dead is not in the way, who lives is."""

import subprocess
import sys
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
    subprocess.Popen(["sleep", "0.5"], close_fds=False)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no process inherits a lock there")
def test_who_was_killed_while_it_started_a_process_is_not_in_the_way(tmp_path: Path) -> None:
    lock = tmp_path / "it.lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    holder.kill()
    holder.wait(30)
    with pytest.raises(UserError, match=f"it is in use by another trainer .process {holder.pid}"), held(lock, "it", patience=0):
        pass
    with held(lock, "it"):
        pass
    holder.stdout.close()


def test_who_lives_is_waited_for_no_longer_than_a_moment(tmp_path: Path) -> None:
    with held(tmp_path / "it.lock", "it"), pytest.raises(UserError, match="in use"), held(tmp_path / "it.lock", "it"):
        pass
