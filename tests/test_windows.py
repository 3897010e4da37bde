"""Windows by construction: nobody runs these tests there, but a call that only POSIX has is found here.

mypy knows which functions a platform lacks (os.killpg, signal.SIGKILL, fcntl, os.fork, resource, …) and accepts them only behind a check
of `sys.platform`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
POSIX_ONLY = """
import os, signal, sys

def kill(group: int) -> None:
    if sys.platform == "win32":
        os.kill(group, signal.CTRL_BREAK_EVENT)
    else:
        os.killpg(group, signal.SIGKILL)

def careless(group: int) -> None:
    os.killpg(group, signal.SIGKILL)
"""


def mypy(*arguments: str) -> subprocess.CompletedProcess[str]:
    # A cache of its own: the other platform's would be thrown away at each change between the two.
    command = [sys.executable, "-m", "mypy", "--platform", "win32", "--cache-dir", str(ROOT / ".mypy_cache" / "win32"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_nothing_is_called_that_windows_lacks() -> None:
    # `unreachable` is off: what follows a check of the platform is.
    found = mypy("--no-warn-unreachable", "-p", "flows", "-p", "tasks", "-p", "model")
    assert found.returncode == 0, found.stdout + found.stderr


def test_mypy_would_find_it(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(POSIX_ONLY)
    found = mypy("--config-file", "", str(tmp_path / "code.py")).stdout
    assert found.count("error:") == 2
    assert 'code.py:11: error: Module has no attribute "killpg"' in found
    assert 'code.py:11: error: Module has no attribute "SIGKILL"' in found
