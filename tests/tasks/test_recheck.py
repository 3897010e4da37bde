"""Rot, as disks make it: bytes that flip, files that end early or are gone. The storage is filled by DVC itself and by the mirror."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from model.checkpoint.store import MANIFEST, MODEL, OPTIMIZER, STATE, Checkpoint, CheckpointStore
from model.errors import Stopped
from tasks import lease
from tasks.mirror import Mirror
from tasks.project import Project
from tasks.recheck import Rotten, recheck_local, recheck_stored
from tests.tasks.conftest import NAME, make_project, write_config

ROOT = Path(__file__).parents[2]
GO_ON = threading.Event()
DVC_YAML = f"""\
stages:
  train:
    foreach: {{{NAME}: {{}}}}
    do:
      cmd: python -c ""
      outs:
        - runs/${{key}}/checkpoints: {{persist: true}}
"""


def dvc(project: Project, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=project.root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def pushed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose two checkpoints DVC has pushed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path_factory.mktemp("site")))
        project = make_project(tmp_path_factory.mktemp("pushed") / "a project")
        shutil.copytree(ROOT / ".dvc", project.root / ".dvc", ignore=shutil.ignore_patterns("tmp", "cache", "config.local"))
        (project.root / "dvc.yaml").write_text(DVC_YAML)
        subprocess.run(["git", "init", "-q"], cwd=project.root, check=True)
        for step in (10, 20):
            write(project, step)
        dvc(project, "commit", "-q", "-f", f"train@{NAME}")
        dvc(project, "push", "-q")
    return project.root


@pytest.fixture
def project(pushed_once: Path, tmp_path: Path) -> Project:
    root = tmp_path / "a project"
    shutil.copytree(pushed_once, root, ignore=shutil.ignore_patterns("cache"))
    return Project(root)


def write(project: Project, step: int) -> None:
    """A checkpoint of which no file is another's."""
    state = json.dumps({"step": step, "config_digest": write_config(project).digest}).encode()
    weights, moments = (save({"w": torch.full((1000,), float(number))}) for number in (step, step + 1))
    store = CheckpointStore(project.run_folder(NAME).checkpoints)
    store.write(step, {MODEL: [weights], OPTIMIZER: [moments], STATE: [state]})


def checkpoints(project: Project) -> list[Checkpoint]:
    return CheckpointStore(project.run_folder(NAME).checkpoints).checkpoints()


def pushed_object(project: Project, checkpoint: str, file: str) -> Path:
    """The file in DVC's remote."""
    remote = project.root / "storage" / "dvc" / "files" / "md5"
    (listing,) = remote.rglob("*.dir")
    md5 = next(entry["md5"] for entry in json.loads(listing.read_text()) if entry["relpath"] == f"{checkpoint}/{file}")
    return remote / md5[:2] / md5[2:]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)


def rotten(project: Project, **options: int | bool) -> list[Rotten]:
    budget = options.pop("budget", None)
    return recheck_stored(project, NAME, budget, GO_ON, **options).rotten  # type: ignore[arg-type]


def test_what_is_whole_is_read_and_found_whole(project: Project) -> None:
    local = recheck_local(project, NAME, GO_ON)
    assert (local.local, local.rotten) == (2, [])
    stored = recheck_stored(project, NAME, None, GO_ON)
    sizes = sum(path.stat().st_size for checkpoint in checkpoints(project) for path in checkpoint.path.iterdir())
    assert (stored.stored, stored.read, stored.left, stored.rotten) == (8, sizes, 0, [])


def test_a_flipped_bit_here(project: Project) -> None:
    first, second = checkpoints(project)
    registered = [{"name": each.name, "digest": each.digest, "version": each.name[-2]} for each in (first, second)]
    project.run_folder(NAME).registered.write_text(json.dumps(registered))
    flip_a_bit(second.path / MODEL)
    (found,) = recheck_local(project, NAME, GO_ON).rotten
    assert (found.checkpoint, found.digest, found.place) == ("step_00000020", second.digest, "the run folder")
    assert MODEL in found.problem
    assert found.cure.startswith("gpt2 restore tiny/2; ")


def test_what_rots_in_dvcs_cache_with_it_comes_back_as_the_cure_says(pushed_once: Path, tmp_path: Path) -> None:
    """The file and its object in the cache are one: `dvc checkout` sees nothing wrong."""
    project = Project(Path(shutil.copytree(pushed_once, tmp_path / "a project")))
    shutil.rmtree(project.root / ".dvc" / "cache")
    shutil.rmtree(project.run_folder(NAME).checkpoints)
    dvc(project, "pull", "-q", f"train@{NAME}")
    second = checkpoints(project)[1]
    path = second.path / MODEL
    before = path.read_bytes()
    (cached,) = (each for each in (project.root / ".dvc" / "cache").rglob("*") if each.is_file() and each.samefile(path))
    written = path.stat().st_mtime_ns
    flip_a_bit(path)
    path.chmod(0o444)
    os.utime(path, ns=(written, written))  # rot changes no times
    dvc(project, "checkout", "-q", "--force", f"train@{NAME}")
    (found,) = recheck_local(project, NAME, GO_ON).rotten
    assert "then dvc pull train@tiny" in found.cure
    path.unlink()
    cached.unlink()
    dvc(project, "pull", "-q", f"train@{NAME}")
    assert path.read_bytes() == before
    assert recheck_local(project, NAME, GO_ON).rotten == []


def test_a_flipped_bit_in_what_dvc_pushed(project: Project) -> None:
    second = checkpoints(project)[1]
    path = pushed_object(project, second.name, MODEL)
    flip_a_bit(path)
    (found,) = rotten(project)
    assert (found.checkpoint, found.digest, found.place) == (second.name, second.digest, str(project.root / "storage"))
    assert f"{second.name}/{MODEL}" in found.problem
    assert str(path) in found.cure
    assert recheck_local(project, NAME, GO_ON).rotten == [], "a copy of its own"


def test_an_object_that_ends_early_or_is_gone_is_found_without_reading(project: Project) -> None:
    first, second = checkpoints(project)
    short = pushed_object(project, first.name, MODEL)
    short.chmod(0o644)
    short.write_bytes(short.read_bytes()[:-1])
    pushed_object(project, second.name, MODEL).unlink()
    seldom = {"budget": 1, "day": 0}
    assert {(found.checkpoint, found.problem.split()[-1]) for found in rotten(project, **seldom)} == {
        (first.name, f"{short.stat().st_size + 1:,}"),
        (second.name, "missing"),
    }
    assert [found.checkpoint for found in rotten(project, **seldom, pushed=False)] == [first.name], "not pushed yet is not lost"


def test_dvcs_own_list_is_checked(project: Project) -> None:
    (listing,) = (project.root / "storage").rglob("*.dir")
    flip_a_bit(listing)
    assert ["MD5 differs" in found.problem for found in rotten(project)] == [True]
    listing.unlink()
    assert ["missing" in found.problem for found in rotten(project)] == [True]
    assert rotten(project, pushed=False) == []


def test_what_is_large_is_read_in_turns(project: Project) -> None:
    """Each file within as many days as its budget takes, whatever the first day; none twice."""
    sizes = [path.stat().st_size for checkpoint in checkpoints(project) for path in checkpoint.path.iterdir()]
    budget = sum(sizes) // 4
    days = -(-sum(sizes) // budget)
    shares = [recheck_stored(project, NAME, budget, GO_ON, day=day) for day in range(17, 17 + days)]
    assert sum(share.read for share in shares) == sum(sizes)
    assert all(share.read + share.left == sum(sizes) for share in shares)
    assert all(share.left > 0 for share in shares)
    flip_a_bit(pushed_object(project, "step_00000010", MODEL))
    found = [day for day in range(17, 17 + days) if rotten(project, budget=budget, day=day)]
    assert len(found) == 1


def test_a_checkpoint_of_the_same_name_that_was_trained_since_is_no_measure(project: Project) -> None:
    second = checkpoints(project)[1]
    shutil.rmtree(second.path)
    CheckpointStore(second.path.parent).write(20, {MODEL: [b"x"], OPTIMIZER: [b"y"], STATE: [b"{}"]})
    assert rotten(project) == []


def test_the_copies_of_a_training_that_is_not_pushed(project: Project) -> None:
    (project.root / "dvc.lock").unlink()
    with lease.holding(project, NAME) as held:
        Mirror.of(project, NAME, held).copy_new()
    stored = recheck_stored(project, NAME, None, GO_ON)
    assert (stored.stored, stored.rotten) == (6, [])
    first, second = checkpoints(project)
    copies = project.root / "storage" / "checkpoints" / NAME
    (weights,) = copies.rglob(f"{first.name}/{MODEL}")
    flip_a_bit(weights)
    (optimizer,) = copies.rglob(f"{second.name}/{OPTIMIZER}")
    optimizer.unlink()
    assert {(found.checkpoint, found.digest) for found in rotten(project)} == {(each.name, each.digest) for each in (first, second)}
    (manifest,) = copies.rglob(f"{first.name}/{MANIFEST}")
    flip_a_bit(manifest)
    (found,) = (found for found in rotten(project) if found.checkpoint == first.name)
    assert f"{MANIFEST} cannot be read" in found.problem
    (manifest,) = copies.rglob(f"{second.name}/{MANIFEST}")
    manifest.unlink()
    assert [found.checkpoint for found in rotten(project)] == [first.name], "without a manifest it is none"


def test_a_storage_that_was_never_used_holds_nothing_rotten(project: Project) -> None:
    shutil.rmtree(project.root / "storage")
    assert recheck_stored(project, NAME, None, GO_ON).stored == 0


def test_a_request_to_stop_is_obeyed(project: Project) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        recheck_local(project, NAME, stop)
    with pytest.raises(Stopped):
        recheck_stored(project, NAME, None, stop)
