"""A whole pipeline with secrets planted in its environment, and MLflow not answering: none of them is found in anything it leaves."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.errors import EXIT_USER
from tests.end_to_end.conftest import GPT2, Clone, clone
from tests.tasks.conftest import free_port

__all__ = ["clone"]
pytestmark = pytest.mark.slow

PLANTED = [f"pl4nted-{uuid.uuid4().hex}" for _ in range(4)]
"""Random: the clone holds this file, too."""


def leaks(folder: Path) -> Iterator[str]:
    """The files under a folder that hold a secret."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            content = path.read_bytes()
            yield from (f"{path.relative_to(folder)}: {secret}" for secret in PLANTED if secret.encode() in content)


def test_no_secret_leaves_the_environment(clone: Clone) -> None:
    clone.environment |= {
        "AWS_SECRET_ACCESS_KEY": PLANTED[0],
        "HF_TOKEN": PLANTED[1],
        "MLFLOW_TRACKING_PASSWORD": PLANTED[2],
        "DATABASE_URL": f"postgresql://user:{PLANTED[3]}@db/x",
    }
    whole = clone.run(*GPT2, "train", "quickstart", timeout=280)
    assert "★" in whole.stdout
    # Now with an MLflow that nobody answers for, whose address holds a password: every stage that talks to it complains.
    clone.environment |= {
        "MLFLOW_TRACKING_URI": f"http://user:{PLANTED[3]}@127.0.0.1:{free_port()}",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }
    broken = clone.run(*GPT2, "train", "again", "--set", "training.max_steps=20", check=False, timeout=280)
    assert broken.returncode != 0
    assert "error: " in broken.stderr
    # And with a password where it does not belong: refused before anything is recorded.
    place = f"data.path=http://user:{PLANTED[3]}@127.0.0.1:{free_port()}/x.parquet"
    refused = clone.run(*GPT2, "train", "samples2m", "--set", place, check=False)
    assert refused.returncode == EXIT_USER
    assert "samples2m.data.path: holds a password" in refused.stderr
    printed = "".join(done.stdout + done.stderr for done in (whole, broken, refused))
    (clone.root.parent / "printed").write_text(printed)
    assert list(leaks(clone.root.parent)) == []
    shutil.rmtree(clone.root)
