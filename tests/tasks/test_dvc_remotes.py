"""DVC's remotes as they are used: a folder, an SSH server, an S3 server, each a real one on this machine; and what links and `dvc gc` do.

What is pushed is read back by a fresh clone, by `dvc pull` and by `gpt2 restore`; a flipped bit is refused by both.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from model.checkpoint.store import MODEL, Checkpoint
from model.errors import UserError
from model.training.journal import Journal
from tasks import tracking, versioning
from tasks.curves import write_curves
from tasks.lease import open_place
from tasks.project import Project
from tasks.restore import restore
from tests.tasks.conftest import NAME, make_project, write_checkpoint

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
GIT = ("git", "-c", "user.name=t", "-c", "user.email=t@t")


@pytest.fixture(scope="module")
def ssh_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a folder behind an SSH server that lets in whoever has the key of this HOME."""
    import asyncssh

    home, folder = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("behind ssh")
    (home / ".ssh").mkdir()
    key = asyncssh.generate_private_key("ssh-ed25519")
    key.write_private_key(home / ".ssh" / "id_ed25519")
    key.write_public_key(home / ".ssh" / "id_ed25519.pub")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def listen() -> Any:
        own = asyncssh.generate_private_key("ssh-ed25519")
        allowed = str(home / ".ssh" / "id_ed25519.pub")
        return await asyncssh.listen("127.0.0.1", 0, server_host_keys=[own], authorized_client_keys=allowed, sftp_factory=True)

    async def end() -> None:
        server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    server = asyncio.run_coroutine_threadsafe(listen(), loop).result(30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.delenv("SSH_AUTH_SOCK", raising=False)
        yield f"ssh://somebody@127.0.0.1:{server.get_port()}{folder}"
    asyncio.run_coroutine_threadsafe(end(), loop).result(30)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    """The URL of a bucket of an S3 server, with the environment that names the server and its keys."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    given = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "something"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**given, "AWS_DEFAULT_REGION": "us-east-1"}.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield "s3://bucket/a folder"
    server.stop()


Trained = tuple[Project, list[Checkpoint]]


@pytest.fixture(scope="module", autouse=True)
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path_factory.mktemp("site")))
        patch.setenv("DVC_NO_ANALYTICS", "1")
        yield


@pytest.fixture(scope="module")
def on_a_disk(tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Trained:
    """Trained with a folder as its storage, which is all that others know of it: the registry lies there, too."""
    home = tmp_path_factory.mktemp("one machine")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return train(home / "a project", str(home / "a disk"), empty_store, home / "a disk" / "mlflow")


@pytest.fixture(params=["folder", "ssh", "s3"])
def trained(request: pytest.FixtureRequest, tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Trained:
    """Trained with each kind of `storage.base_folder`."""
    if request.param == "folder":
        return request.getfixturevalue("on_a_disk")  # type: ignore[no-any-return]
    url = request.getfixturevalue(f"{request.param}_server")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    return train(tmp_path / "a project", url, empty_store, tmp_path)


def train(root: Path, storage: str, empty_store: Path, registry: Path) -> Trained:
    """A project with what a training leaves behind, recorded by DVC, committed, registered and pushed."""
    project = make_project(root)
    for name in ("dvc.yaml", ".dvcignore", ".gitignore", ".dvc/config", ".dvc/.gitignore"):
        (project.root / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, project.root / name)
    params = yaml.safe_load((project.root / "params.yaml").read_text())
    params["defaults"]["storage"] = {"base_folder": storage}
    (project.root / "params.yaml").write_text(yaml.safe_dump(params))
    project.record_overrides(NAME, {})
    run(project, "git", "init", "-q")
    journal = Journal(project.run_folder(NAME).journal)
    journal.append("step", step=1, loss=1.0, tokens_per_s=1)
    journal.close()
    checkpoints = [write_checkpoint(project, step) for step in (10, 20)]
    registry.mkdir(parents=True, exist_ok=True)
    shutil.copy(empty_store, registry / "mlflow.db")
    client = tracking.connect(project, project.experiment(NAME))
    client.create_registered_model(NAME)
    for checkpoint in checkpoints:
        client.create_model_version(NAME, str(checkpoint.path), tags={tracking.DIGEST_TAG: checkpoint.digest})
    client.set_registered_model_alias(NAME, tracking.CHAMPION, "1")
    commit(project)
    versioning.configure_remote(project, project.experiment(NAME))
    push(project)
    return project, checkpoints


def run(project: Project, *command: str, fails: bool = False) -> str:
    done = subprocess.run(command, cwd=project.root, capture_output=True, text=True, timeout=120)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


def dvc(project: Project, *arguments: str, fails: bool = False) -> str:
    return run(project, sys.executable, "-m", "dvc", *arguments, fails=fails)


def commit(project: Project) -> None:
    """What lies there becomes what the training stage made, and that a commit."""
    folder = project.run_folder(NAME)
    write_curves(folder)
    folder.metrics.write_text("{}")
    dvc(project, "commit", "-q", "-f", f"train@{NAME}")
    run(project, *GIT, "add", "-A")
    run(project, *GIT, "commit", "-qm", "trained")


def push(project: Project) -> list[str]:
    """Push one experiment; the lines that were said."""
    lines: list[str] = []
    versioning.push(project, NAME, on_line=lines.append, stop=threading.Event())
    return lines


def clone_of(project: Project, name: str) -> Project:
    clone = Project(project.root.parent / name)
    run(project, "git", "clone", "-q", str(project.root), str(clone.root))
    versioning.configure_remote(clone, clone.experiment(NAME))
    return clone


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stored(project: Project, content: bytes) -> tuple[Any, str]:
    """The file system of the storage, and the path in it under which DVC keeps a content."""
    fs, root = open_place(project.storage(project.experiment(NAME)))
    md5 = hashlib.md5(content).hexdigest()
    return fs, f"{root}/dvc/files/md5/{md5[:2]}/{md5[2:]}"


def flip_a_bit(project: Project, content: bytes, back: bool = False) -> str:
    """In DVC's object of `content` in the storage, whose path is returned; `back`: make it whole again."""
    fs, path = stored(project, content)
    if Path(path).exists():
        Path(path).chmod(0o644)
    damaged = bytearray(content)
    damaged[len(damaged) // 2] ^= not back
    fs.pipe_file(path, bytes(damaged))
    return path


def cache(project: Project) -> dict[str, bytes]:
    """By name, every object of DVC's cache."""
    return contents(project.root / ".dvc" / "cache" / "files" / "md5")


def test_what_is_pushed_comes_back_equal_and_a_flipped_bit_is_refused(trained: Trained) -> None:
    project, (first, second) = trained
    everything = contents(project.run_folder(NAME).checkpoints)

    pulled = clone_of(project, "pulled")
    dvc(pulled, "pull", f"train@{NAME}")
    assert contents(pulled.run_folder(NAME).checkpoints) == everything

    restored = clone_of(project, "restored")
    (restored.root / "dvc.lock").unlink()  # nothing here says any more what was pushed
    back = restore(restored, f"{NAME}@champion")
    assert contents(back.checkpoint.path) == contents(first.path)
    assert restore(restored, f"{NAME}/2").checkpoint.digest == second.digest

    rotten = first.path / "state.json"
    path = flip_a_bit(project, rotten.read_bytes())
    shutil.rmtree(pulled.run_folder(NAME).checkpoints)
    shutil.rmtree(pulled.root / ".dvc" / "cache")
    dvc(pulled, "pull", f"train@{NAME}", fails=True)
    there = pulled.run_folder(NAME).checkpoints / first.name / rotten.name
    assert not there.exists() or there.read_bytes() == rotten.read_bytes()
    shutil.rmtree(restored.run_folder(NAME).path)
    with pytest.raises(UserError, match=r"no whole copy") as refused:
        restore(restored, f"{NAME}@champion")
    assert f"{path} is damaged" in str(refused.value)
    assert contents(restored.run_folder(NAME).path) == {}
    flip_a_bit(project, rotten.read_bytes(), back=True)
    assert restore(restored, f"{NAME}@champion").checkpoint.digest == first.digest


def test_a_file_that_the_storage_lost_is_pushed_again(on_a_disk: Trained) -> None:
    project, (first, _) = on_a_disk
    fs, path = stored(project, (first.path / MODEL).read_bytes())
    fs.rm_file(path)
    assert "pushing again" in "".join(push(project)), "DVC itself does not look"
    assert Path(path).read_bytes() == (first.path / MODEL).read_bytes()


def test_a_linked_file_takes_its_space_once_and_is_never_written_through(on_a_disk: Trained) -> None:
    project, (first, _) = on_a_disk
    clone = clone_of(project, "linked")
    dvc(clone, "pull", f"train@{NAME}")
    for each in (project, clone):
        folder = each.run_folder(NAME)
        for path in (folder.checkpoints / first.name / MODEL, folder.journal, folder.metrics, folder.curves / "loss.csv"):
            md5 = hashlib.md5(path.read_bytes()).hexdigest()
            cached = each.root / ".dvc" / "cache" / "files" / "md5" / md5[:2] / md5[2:]
            assert path.samefile(cached), f"{path} does not share its bytes with the cache"
            assert path.stat().st_mode & 0o222 == 0, f"{path} can be written"
        before = cache(each)
        journal = Journal(folder.journal)  # the one file that grows
        journal.append("step", step=2, loss=0.5, tokens_per_s=1)
        journal.close()
        write_curves(folder)
        assert b'"step": 2' in folder.journal.read_bytes()
        assert "2,0.5" in (folder.curves / "loss.csv").read_text()
        assert cache(each) == before


def test_collecting_garbage_as_advised_keeps_the_champion(on_a_disk: Trained) -> None:
    project, (first, second) = on_a_disk
    shutil.rmtree(first.path)
    shutil.rmtree(second.path)
    write_checkpoint(project, 30)
    commit(project)
    push(project)
    nobodys = b"a candidate's that was removed"
    fs, path = stored(project, nobodys)
    fs.makedirs(path.rpartition("/")[0], exist_ok=True)
    fs.pipe_file(path, nobodys)

    dvc(project, "gc", "--force", "--workspace", "--all-commits", "--cloud")
    assert not Path(path).exists(), "nothing was collected"
    clone = clone_of(project, "after the garbage")
    assert restore(clone, f"{NAME}@champion").checkpoint.digest == first.digest

    shutil.rmtree(clone.run_folder(NAME).path)
    dvc(project, "gc", "--force", "--workspace", "--cloud")  # what docs/dvc.md warns of
    with pytest.raises(UserError, match="no whole copy"):
        restore(clone, f"{NAME}@champion")


def test_a_host_key_that_is_not_known_is_refused_where_it_is_asked_for(ssh_server: str, tmp_path: Path) -> None:
    """docs/dvc.md: FSSPEC_SSH_KNOWN_HOSTS makes the lease, the copies and `gpt2 restore` look at it."""
    (tmp_path / "known_hosts").write_text("")
    look = "import sys; from tasks.lease import open_place; fs, root = open_place(sys.argv[1]); print(fs.ls(root))"

    def ask(**environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", look, ssh_server]
        return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60)

    assert ask().returncode == 0
    asked = ask(FSSPEC_SSH_KNOWN_HOSTS=str(tmp_path / "known_hosts"))
    assert asked.returncode != 0
    assert "Host key" in asked.stderr
