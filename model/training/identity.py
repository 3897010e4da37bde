"""What computed a checkpoint: recorded in each, because code is no part of a run's identity."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import subprocess
from pathlib import Path


def versions() -> dict[str, str]:
    """Of the libraries that decide the numbers, and of this project."""
    return {name: importlib.metadata.version(name) for name in ("torch", "numpy", "tiktoken", "gpt2-from-scratch")}


@functools.cache
def code_identity(root: Path = Path(__file__).resolve().parents[2]) -> dict[str, str | None]:  # noqa: B008 (a constant)
    """The commit the code in `root` is at (by default this code), and the SHA-256 of what differs from it in tracked files; both None
    outside a git checkout."""
    commit = _git(root, "rev-parse", "HEAD")
    difference = _git(root, "diff", "HEAD", "--", "model", "tasks", "flows") if commit is not None else None
    return {
        "commit": commit.decode().strip() if commit else None,
        "diff_sha256": hashlib.sha256(difference).hexdigest() if difference else None,
    }


def _git(root: Path, *arguments: str) -> bytes | None:
    try:
        result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None
