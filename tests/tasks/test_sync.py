"""`gpt2 sync`: what MLflow and the storage missed, against the real ones."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from model.errors import Stopped, UserError
from tasks import lease, mirror
from tasks.forwarder import tracking_lock
from tasks.project import Project
from tasks.sync import Part, sync, sync_tracking
from tests.tasks.conftest import NAME, make_project, write_checkpoint, write_config
from tests.tasks.test_forwarder import Training, points, run_of, told

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A started experiment under the repository's dvc.yaml; MLflow is a database beside the storage."""
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    project = make_project(tmp_path / "a project")
    for name in ("dvc.yaml", ".dvcignore", ".gitignore", ".dvc/config", ".dvc/.gitignore"):
        (project.root / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, project.root / name)
    subprocess.run(["git", "init", "-q"], cwd=project.root, check=True)
    project.record_overrides(NAME, {})
    (tmp_path / "mlflow").mkdir()
    shutil.copy(empty_store, tmp_path / "mlflow" / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow' / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)  # where MLflow's database puts its artifacts
    return project


def trained(project: Project, steps: int = 10, finished: bool = True) -> Training:
    training = Training(project)
    training.start()
    training.steps(1, steps)
    if finished:
        training.end("finished", steps)
    training.journal.close()
    return training


def test_what_was_missed_is_sent_once(project: Project) -> None:
    trained(project)
    parts = sync(project, NAME, threading.Event())
    assert parts == [Part("MLflow", 12, "12 events sent"), Part("storage", 0, "up to date")]
    assert points(project) == told(project)
    assert sync(project, NAME, threading.Event())[0] == Part("MLflow", 0, "up to date")
    assert run_of(project).info.status == "FINISHED"


def test_a_dead_mlflow_is_named_with_the_cure_and_the_rest_is_done(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(project, finished=False)
    checkpoint = write_checkpoint(project, 10)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somebody:secret@127.0.0.1:9")
    dead, copied, pushed = sync(project, NAME, threading.Event())
    assert dead.problem is not None
    assert "MLflow at http://" in dead.problem
    assert "gpt2 sync tiny" in dead.problem
    assert "secret" not in dead.problem
    assert "\n" not in dead.problem
    assert copied == Part("storage", 1, "1 checkpoint copied")
    assert pushed.problem is None
    shutil.rmtree(checkpoint.path)
    back = mirror.bring_back(project, NAME)
    assert back is not None
    assert back.digest == checkpoint.digest


def test_a_silent_mlflow_is_given_up_in_time(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(project)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        part = sync_tracking(project, NAME, threading.Event(), silence=4)
        assert time.monotonic() - began < 8
    assert part.problem is not None
    assert "no answer within 4 s" in part.problem


def test_while_a_training_sends_it_nobody_else_does(project: Project) -> None:
    trained(project)
    with tracking_lock(project, NAME):
        part = sync_tracking(project, NAME, threading.Event())
    assert part == Part("MLflow", 0, "the training that runs sends it")


def test_only_checkpoints_that_are_not_there_are_copied(project: Project) -> None:
    trained(project, finished=False)
    write_checkpoint(project, 10)
    assert sync(project, NAME, threading.Event())[1].sent == 1
    assert sync(project, NAME, threading.Event())[1] == Part("storage", 0, "has every checkpoint of the unfinished run")
    write_checkpoint(project, 20)
    assert sync(project, NAME, threading.Event())[1].sent > 0
    assert run_of(project).info.status == "FAILED", "there is no trainer, and it left no last word"


def test_of_a_finished_training_too_what_the_storage_lacks_is_copied(project: Project) -> None:
    """Another machine waits for it, whose DVC is to record it; here, DVC knows nothing."""
    trained(project)
    checkpoint = write_checkpoint(project, 10)
    assert sync(project, NAME, threading.Event())[2] == Part("storage", 1, "1 checkpoint copied")
    assert [part.message for part in sync(project, NAME, threading.Event())] == ["up to date", "up to date"]
    shutil.rmtree(checkpoint.path)
    back = mirror.bring_back(project, NAME)
    assert back is not None
    assert back.digest == checkpoint.digest


def test_a_storage_that_is_spoiled_is_named_and_mlflow_gets_its_part(project: Project) -> None:
    trained(project, finished=False)
    write_checkpoint(project, 10)
    (project.root / "storage").mkdir()
    (project.root / "storage" / "checkpoints").write_text("a file where the folder should be")
    sent, copied, _ = sync(project, NAME, threading.Event())
    assert sent == Part("MLflow", 11, "11 events sent")
    assert copied.problem is not None
    assert copied.problem.startswith("storage.base_folder: ")
    assert "gpt2 sync tiny" in copied.problem
    (project.root / "storage" / "checkpoints").unlink()
    assert [part.problem for part in sync(project, NAME, threading.Event())] == [None, None, None]


def test_a_killed_stage_leaves_nothing_that_keeps_it_from_sending(project: Project) -> None:
    training = trained(project, finished=False)
    lease.fence(training.folder).write_text(json.dumps({"valid_until": time.time() - 5, "token": 1}))
    assert sync(project, NAME, threading.Event())[0] == Part("MLflow", 11, "11 events sent")


def test_a_request_to_stop_is_obeyed(project: Project) -> None:
    trained(project)
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        sync(project, NAME, stop)


def test_an_experiment_that_was_never_trained_has_nothing_to_send(project: Project) -> None:
    with pytest.raises(UserError, match="gpt2 train tiny"):
        sync(make_project(project.root.parent / "another"), NAME, threading.Event())
    write_config(project)
    assert sync(project, NAME, threading.Event())[0] == Part("MLflow", 0, "no journal yet")
