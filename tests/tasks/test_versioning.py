"""The adapter against the real DVC, with the repository's own dvc.yaml; only what the stages do is made simple here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from model.errors import Stopped, UserError
from tasks import versioning
from tasks.project import Project
from tasks.versioning import STAGES, StageFailed, run_stage, stage_states, up_to_date

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STEP = """
import json, os, signal, sys, time
from pathlib import Path

step, name = Path(__file__).stem, sys.argv[1]
behaviour = json.loads(Path("behaviour.json").read_text()).get(f"{step} {name}", "")
folder = Path("runs") / name
folder.mkdir(parents=True, exist_ok=True)

def on_signal(number, frame):
    print("error: stopped: saved", file=sys.stderr, flush=True)
    sys.exit(75)

signal.signal(signal.SIGTERM, on_signal)  # before the line that tells the test that a stop may come

with Path(f"ran-{name}.txt").open("a") as log:
    log.write(f"{step} {os.getpid()}\\n")
print(f"{step} says hello, watched by {os.environ['GPT2_WATCH_PID']}", flush=True)
if behaviour == "sleep":
    time.sleep(120)
elif behaviour == "wait":
    while not Path("go").exists():
        time.sleep(0.05)
elif behaviour:
    print("noise")
    print("error: what went wrong", file=sys.stderr)
    sys.exit(int(behaviour))

def write(path, text):
    path = folder / path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").replace(path)

if step == "build_config":
    for out in ("config.yaml", "dataset.json", "evaluation.yaml"):
        write(out, Path("overrides.yaml").read_text())
elif step == "stream_and_train":
    write("checkpoints/step_00000001/model", "x" * 100_000)
    write("journal.jsonl", "{}\\n")
    write("metrics.json", '{"loss": 1.0}')
    for curve in ("loss", "validation_loss", "tokens_per_s"):
        write(f"curves/{curve}.csv", f"step,{curve}\\n")
elif step == "checkpoint_register":
    write("registered.json", "[]")
else:
    write("evaluation/scores.json", "{}")
    write("scores.json", "{}")
"""
STEPS = ("build_config", "stream_and_train", "checkpoint_register", "evaluate_each_checkpoint")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """Two experiments, `a` and `b`, under the repository's dvc.yaml and .dvc/config."""
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    root = tmp_path / "project"
    (root / ".dvc").mkdir(parents=True)
    (root / "tasks").mkdir()
    for step in STEPS:
        (root / "tasks" / f"{step}.py").write_text(STEP)
    for name in ("dvc.yaml", ".dvcignore", ".gitignore", ".dvc/config", ".dvc/.gitignore"):
        shutil.copy(ROOT / name, root / name)
    data = {"data": {"path": "somewhere"}}
    (root / "params.yaml").write_text(yaml.safe_dump({"defaults": data, "experiments": {"a": {"seed": 1}, "b": {"seed": 2}}}))
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    project = Project(root)
    for name in ("a", "b"):
        project.record_overrides(name, {})
    behave(project, {})
    yield project
    for name in ("a", "b"):
        assert not [pid for _, pid in ran(project, name) if lives(pid)], "a stage was left behind"


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def behave(project: Project, behaviour: dict[str, str]) -> None:
    (project.root / "behaviour.json").write_text(json.dumps(behaviour))


def ran(project: Project, name: str) -> list[tuple[str, int]]:
    """Which steps really ran, and as which process."""
    log = project.root / f"ran-{name}.txt"
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    return [(line.split()[0], int(line.split()[1])) for line in lines]


def run(
    project: Project, stage: str, name: str = "a", stop: threading.Event | None = None, patience: float = 60.0
) -> tuple[bool, list[str]]:
    lines: list[str] = []
    did_run = run_stage(
        project, stage, name, on_line=lines.append, stop=stop or threading.Event(), watch_pid=os.getpid(), grace=5, patience=patience
    )
    return did_run, lines


def dvc(project: Project, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=project.root, capture_output=True, text=True)


def until_running(project: Project, name: str) -> psutil.Process:
    """The process of the stage that runs now."""
    deadline = time.monotonic() + 60
    while not ran(project, name):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return psutil.Process(ran(project, name)[-1][1])


def test_each_stage_runs_once_and_dvc_agrees(project: Project) -> None:
    assert stage_states(project, "a") == dict.fromkeys(STAGES, "never run")
    for stage in STAGES:
        assert run(project, stage) == (True, [f"{STEPS[STAGES.index(stage)]} says hello, watched by {os.getpid()}"])
    assert up_to_date(project, "a") == list(STAGES)
    assert stage_states(project, "a") == dict.fromkeys(STAGES, "done")
    assert run(project, "train") == (False, [])
    assert "up to date" in dvc(project, "repro", "evaluate@a").stdout
    assert [step for step, _ in ran(project, "a")] == list(STEPS)
    weights = project.run_folder("a").checkpoints / "step_00000001" / "model"
    assert weights.stat().st_nlink == 2, "the cache and the workspace share the bytes"

    project.record_overrides("a", {"seed": 5})
    assert up_to_date(project, "a") == []
    assert stage_states(project, "a") == {"build-config": "changed", "train": "done", "register": "done", "evaluate": "done"}
    assert run(project, "build-config")[0]
    assert up_to_date(project, "a") == ["build-config"]


@pytest.mark.parametrize(("code", "error"), [("1", StageFailed), ("2", UserError), ("75", Stopped)])
def test_what_a_stage_says_comes_back_as_what_it_is(project: Project, code: str, error: type[Exception]) -> None:
    behave(project, {"build_config a": code})
    with pytest.raises(error, match="what went wrong") as raised:
        run(project, "build-config")
    assert "\n" not in str(raised.value)


def test_a_stop_reaches_the_stage_and_dvc_lets_go_of_its_locks(project: Project) -> None:
    run(project, "build-config")
    behave(project, {"stream_and_train a": "sleep"})
    stop = threading.Event()
    threading.Thread(target=lambda: (until_step(project, "stream_and_train"), stop.set())).start()
    with pytest.raises(Stopped, match="saved"):
        run(project, "train", stop=stop)
    assert json.loads((project.root / ".dvc/tmp/rwlock").read_text()) in ({"write": {}}, {})
    behave(project, {})
    assert run(project, "train")[0]


def until_step(project: Project, step: str) -> None:
    deadline = time.monotonic() + 60
    while step not in [name for name, _ in ran(project, "a")] and time.monotonic() < deadline:
        time.sleep(0.05)


def test_the_stages_shell_is_the_plain_one(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELL", "/usr/sbin/nologin")  # as for a service's account
    assert run(project, "build-config")[0]


def test_a_stop_before_the_stage_begins_nothing(project: Project) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        run(project, "build-config", stop=stop)
    assert ran(project, "a") == []


def test_when_dvc_is_killed_the_next_run_goes_on(project: Project) -> None:
    behave(project, {"build_config a": "sleep"})

    def kill_dvc() -> None:
        stage = until_running(project, "a")
        next(parent for parent in stage.parents() if "dvc" in parent.cmdline()).kill()

    threading.Thread(target=kill_dvc).start()
    with pytest.raises(StageFailed):
        run(project, "build-config")
    behave(project, {})
    assert run(project, "build-config")[0]


def test_another_process_on_the_same_run_is_waited_for(project: Project) -> None:
    behave(project, {"build_config a": "wait"})
    other = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "build-config@a"], cwd=project.root, env={**os.environ, "GPT2_WATCH_PID": "0"}
    )
    until_running(project, "a")
    assert stage_states(project, "a")["build-config"] == "running"
    with pytest.raises(UserError, match="another process works on it"):
        run(project, "build-config", patience=0)
    threading.Timer(3, (project.root / "go").touch).start()
    did_run, lines = run(project, "build-config")
    assert other.wait(60) == 0
    assert not did_run, "the other one did it"
    assert lines[0].startswith("waiting for another process")


def test_two_experiments_at_once_are_both_recorded(project: Project) -> None:
    behave(project, {"build_config a": "wait", "build_config b": "wait"})
    results: dict[str, bool] = {}
    threads = [
        threading.Thread(target=lambda name=name: results.update({name: run(project, "build-config", name)[0]})) for name in ("a", "b")
    ]
    for thread in threads:
        thread.start()
    for name in ("a", "b"):
        until_running(project, name)
    (project.root / "go").touch()
    for thread in threads:
        thread.join()
    assert results == {"a": True, "b": True}
    for name in ("a", "b"):
        assert stage_states(project, name)["build-config"] == "done"


def test_what_is_pushed_comes_back_and_rot_is_found(project: Project) -> None:
    for stage in ("build-config", "train"):
        run(project, stage)
    versioning.push(project, "a", on_line=print, stop=threading.Event())
    weights = project.run_folder("a").checkpoints / "step_00000001" / "model"
    before = weights.read_bytes()
    shutil.rmtree(project.run_folder("a").path)
    shutil.rmtree(project.root / ".dvc/cache")
    assert dvc(project, "pull", "train@a").returncode == 0
    assert weights.read_bytes() == before

    shutil.rmtree(project.run_folder("a").path)
    shutil.rmtree(project.root / ".dvc/cache")
    stored = next(path for path in (project.root / "storage/dvc").rglob("*") if path.is_file() and path.stat().st_size == len(before))
    stored.chmod(0o644)
    stored.write_bytes(before[:-1] + b"y")
    pulled = dvc(project, "pull", "train@a")
    assert pulled.returncode != 0
    assert not weights.exists() or weights.read_bytes() == before


def test_a_push_to_nowhere_fails_alone(project: Project) -> None:
    run(project, "build-config")
    (project.root / "storage").write_text("a file where the folder should be")
    with pytest.raises(StageFailed, match="dvc push"):
        versioning.push(project, "a", on_line=print, stop=threading.Event())


def test_the_remote_follows_the_storage(project: Project, tmp_path: Path) -> None:
    local = project.root / ".dvc" / "config.local"
    versioning.configure_remote(project, project.experiment("a"))
    assert not local.exists()
    elsewhere = tmp_path / "a disk"
    versioning.configure_remote(project, project.with_overrides("a", {"storage": {"base_folder": str(elsewhere)}}))
    run(project, "build-config")
    versioning.push(project, "a", on_line=print, stop=threading.Event())
    assert any((elsewhere / "dvc").rglob("*"))
    assert not (project.root / "storage").exists()
    versioning.configure_remote(project, project.with_overrides("a", {"storage": {"base_folder": "s3://bucket/path"}}))
    assert "s3://bucket/path/dvc" in local.read_text()
    versioning.configure_remote(project, project.experiment("a"))
    assert "url" not in local.read_text()
