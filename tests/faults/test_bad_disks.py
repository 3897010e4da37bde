"""Disks that are full, limited, read-only or elsewhere: training goes on, says so, and saves as soon as it can. Nothing is lost."""

import contextlib
import json
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from model.checkpoint.store import CheckpointStore
from model.run_folder import RunFolder
from model.training.journal import read_all
from tests.faults.conftest import consumed, said, warnings
from tests.faults.warm import wait_until
from tests.model.training.conftest import final

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="limits, name spaces and capabilities are Linux's")]

MIB = 1 << 20
SOON = {"GPT2_LAST_SAVE_S": "2"}
"""A trainer that gives its last checkpoint up after seconds, not minutes."""


def save_was_refused(folder):
    return "warning: step_" in said(folder)


def lift_limit(process):
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def wait_for_end(process, folder, code=0):
    try:
        ended = process.wait(60)
    finally:
        process.kill()
    assert ended == code, said(folder)


def check_warned(folder, kind, *words):
    told = [event["message"] for event in warnings(folder) if event["kind"] == kind]
    assert any(all(word in message for word in words) for message in told), told
    assert any(line.startswith("warning: ") for line in said(folder).splitlines())


def test_a_checkpoint_that_grows_over_a_limit_is_tried_again(trainer, undisturbed, new_run):
    """RLIMIT_FSIZE below the size of the weights, for a while."""
    folder = new_run("plain")
    process = trainer.start(folder, prepare=[("limit_file_size", MIB)])
    wait_until(lambda: save_was_refused(folder) or process.poll() is not None, 60, "a checkpoint was refused")
    assert process.poll() is None, said(folder)
    lift_limit(process)
    wait_for_end(process, folder)
    check_warned(folder, "checkpoint", "step_00000004", "File too large")
    undisturbed("plain").check_ends_alike(folder)


def test_a_last_checkpoint_that_is_never_taken_is_a_fault_in_one_line(trainer, undisturbed, new_run):
    folder = new_run("plain")
    process = trainer.start(folder, prepare=[("limit_file_size", MIB)], environment=SOON)
    wait_for_end(process, folder, code=1)
    *told, last = said(folder).splitlines()
    assert last.startswith("error: ")
    assert "step_00000024" in last
    assert all(line.startswith("warning: ") for line in told)
    assert not CheckpointStore(folder.checkpoints).folders()
    assert not list(folder.checkpoints.glob(".*"))
    trainer.train(folder)
    undisturbed("plain").check_ends_alike(folder)


def test_a_stop_whose_checkpoint_is_refused_keeps_the_one_before(trainer, undisturbed, new_run):
    folder = new_run("long", train=False)
    process = trainer.start(folder)
    wait_until(lambda: CheckpointStore(folder.checkpoints).folders() or process.poll() is not None, 60, "a checkpoint is there")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (MIB, resource.RLIM_INFINITY))
    wait_until(lambda: save_was_refused(folder) or process.poll() is not None, 60, "a checkpoint was refused")
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    wait_for_end(process, folder, code=75)
    assert time.monotonic() - began < 30
    check_warned(folder, "checkpoint", "File too large")
    assert read_all(folder.journal)[-1]["event"] == "stopped"
    assert CheckpointStore(folder.checkpoints).newest_whole(pytest.fail) is not None


@pytest.mark.parametrize("size", [500, 2000, 4000])
def test_a_journal_that_cannot_be_written_comes_later_and_whole(trainer, undisturbed, new_run, size):
    """RLIMIT_FSIZE below the size of the journal: within its first line, or a later one."""
    folder = new_run("plain")
    shutil.copy(undisturbed("plain").folder.validation_windows, folder.path)  # so that the journal is the first to be refused
    process = trainer.start(folder)
    wait_until(lambda: folder.journal.exists() or process.poll() is not None, 60, "the journal is opened")
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    wait_until(lambda: process.poll() is not None or not growing(folder.journal), 60, "the journal stands still")
    assert process.poll() is None, said(folder)
    lift_limit(process)
    wait_for_end(process, folder)
    events = read_all(folder.journal)
    assert [event["seq"] for event in events] == list(range(len(events)))
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, 25))
    undisturbed("plain").check_ends_alike(folder)


def growing(path):
    before = path.stat().st_size
    time.sleep(0.3)
    return path.stat().st_size > before


def test_warnings_that_nobody_takes_end_no_training(trainer, undisturbed, new_run):
    """Standard error goes to the full disk, too, or to a pipe whose reader has died."""
    folder = new_run("plain")
    process = trainer.start(folder, prepare=[("limit_file_size", MIB)], stderr=Path("/dev/full"))
    wait_until(lambda: warnings(folder) or process.poll() is not None, 60, "a checkpoint was refused")
    time.sleep(0.2)
    assert process.poll() is None
    lift_limit(process)
    assert process.wait(60) == 0
    undisturbed("plain").check_ends_alike(folder)


class TinyDisk:
    """A real file system of a few MB, in a user and mount namespace: no privileges needed."""

    def __init__(self, place, size):
        self.place = place
        place.mkdir()
        script = f"mount -t tmpfs -o size={size},mode=755 none '{place}' && echo mounted && exec cat"
        self._holder = subprocess.Popen(
            ["unshare", "-U", "-r", "-m", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if self._holder.stdout.readline().strip() != "mounted":
            reason = self._holder.communicate(timeout=30)[1].strip()
            pytest.skip(f"this system lets nobody mount a file system in a name space of their own: {reason}")
        self.seen_from_outside = Path(f"/proc/{self._holder.pid}/root{place}")
        self.enter = ("enter_namespaces", self._holder.pid)

    def fill(self, but_for):
        """Leave so many bytes free."""
        free = shutil.disk_usage(self.seen_from_outside).free
        with (self.seen_from_outside / "ballast").open("wb") as file:
            file.write(bytes(max(0, free - but_for)))

    def free(self):
        (self.seen_from_outside / "ballast").unlink()

    def close(self):
        self._holder.stdin.close()
        self._holder.wait(30)
        self._holder.stdout.close()
        self._holder.stderr.close()


@pytest.fixture
def tiny_disk(tmp_path):
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare here")
    disk = TinyDisk(tmp_path / "disk", "40m")
    yield disk
    disk.close()


@pytest.mark.parametrize("room", [7.5 * MIB, 1.2 * MIB, 100_000, 20_000], ids=lambda room: f"{room / MIB:.2f} MiB")
def test_a_disk_that_is_full_for_a_while(trainer, undisturbed, tiny_disk, tmp_path, room):
    """Full after the first checkpoint, within it, at once, and so that there is hardly room for the journal."""
    outside = undisturbed("plain").copy_beginning(tiny_disk.seen_from_outside / "run")
    tiny_disk.fill(but_for=int(room))
    log = tmp_path / "said"
    process = trainer.start(RunFolder(tiny_disk.place / "run"), prepare=[tiny_disk.enter], stderr=log)
    wait_until(lambda: "warning: " in log.read_text() or process.poll() is not None, 60, "the disk is full")
    assert process.poll() is None, log.read_text()
    tiny_disk.free()
    assert process.wait(60) == 0, log.read_text()
    told = [event["message"] for event in warnings(outside)]
    assert any("No space left on device" in message for message in told), told
    assert "No space left on device" in log.read_text()
    undisturbed("plain").check_ends_alike(outside)


def test_a_disk_that_stays_full_loses_nothing(trainer, undisturbed, tiny_disk, tmp_path):
    outside = undisturbed("plain").copy_beginning(tiny_disk.seen_from_outside / "run")
    tiny_disk.fill(but_for=int(7.5 * MIB))
    log = tmp_path / "said"
    inside = RunFolder(tiny_disk.place / "run")
    process = trainer.start(inside, prepare=[tiny_disk.enter], stderr=log, environment=SOON)
    assert process.wait(60) == 1, log.read_text()
    assert log.read_text().splitlines()[-1].startswith("error: ")
    assert "Traceback" not in log.read_text()
    store = CheckpointStore(outside.checkpoints)
    assert store.newest_whole(pytest.fail).step == 4
    assert not list(outside.checkpoints.glob(".*"))
    tiny_disk.free()
    process = trainer.start(inside, prepare=[tiny_disk.enter], stderr=log)
    assert process.wait(60) == 0, log.read_text()
    assert [event["step"] for event in read_all(outside.journal) if event["event"] == "started"] == [0, 4]
    assert final(outside) == final(undisturbed("plain").folder)
    assert consumed(outside) == consumed(undisturbed("plain").folder)


@contextlib.contextmanager
def read_only(*folders):
    modes = [folder.stat().st_mode for folder in folders]
    for folder in folders:
        folder.chmod(stat.S_IMODE(folder.stat().st_mode) & ~0o222)
    try:
        yield
    finally:
        for folder, mode in zip(folders, modes, strict=True):
            folder.chmod(mode)


def contents(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_folder_that_is_read_only_is_one_line(trainer, undisturbed, new_run):
    folder = new_run("plain")
    before = contents(folder.path)
    with read_only(folder.path):
        process = trainer.start(folder, prepare=[("obey_permissions",)])
        assert process.wait(60) in (1, 2), said(folder)
    (line,) = said(folder).splitlines()
    assert line.startswith("error: ")
    assert "Permission denied" in line or "read-only" in line
    assert str(folder.path) in line
    assert contents(folder.path) == before
    trainer.train(folder)
    undisturbed("plain").check_equal(folder)


def test_a_finished_run_that_became_read_only_is_left_as_it_is(trainer, undisturbed, tmp_path):
    folder = undisturbed("plain").copy(tmp_path / "run")
    before = contents(folder.path)
    everything = [folder.path, *folder.path.rglob("*")]
    with read_only(*everything):
        process = trainer.start(folder, prepare=[("obey_permissions",)])
        assert process.wait(60) in (0, 1, 2), said(folder)
    assert len(said(folder).splitlines()) <= 1
    assert contents(folder.path) == before


def test_checkpoints_that_are_read_only_for_a_while(trainer, undisturbed, new_run):
    folder = new_run("plain")
    folder.checkpoints.mkdir()
    with read_only(folder.checkpoints):
        process = trainer.start(folder, prepare=[("obey_permissions",)])
        wait_until(lambda: save_was_refused(folder) or process.poll() is not None, 60, "a checkpoint was refused")
        assert process.poll() is None, said(folder)
    wait_for_end(process, folder)
    check_warned(folder, "checkpoint", "Permission denied")
    undisturbed("plain").check_ends_alike(folder)


def test_a_token_cache_that_is_read_only_is_gone_without(trainer, undisturbed, new_run):
    folder = new_run("cache")
    folder.token_caches.mkdir()
    with read_only(folder.token_caches):
        process = trainer.start(folder, prepare=[("obey_permissions",)])
        wait_for_end(process, folder)
    check_warned(folder, "stream", "data.cache")
    assert final(folder) == final(undisturbed("cache").folder)
    assert consumed(folder) == consumed(undisturbed("cache").folder)


def test_temporary_files_may_lie_on_another_file_system(trainer, undisturbed, new_run):
    shared_memory = Path("/dev/shm")
    folder = new_run("cache")
    if not shared_memory.is_dir() or shared_memory.stat().st_dev == folder.path.stat().st_dev:
        pytest.skip("there is no other file system here")
    with tempfile.TemporaryDirectory(dir=shared_memory) as elsewhere:
        trainer.train(folder, environment={"TMPDIR": elsewhere})
        assert not any(Path(elsewhere).rglob("step_*"))
    undisturbed("cache").check_equal(folder)
    assert json.loads(folder.metrics.read_text())["step"] == 24


def test_temporary_files_may_have_no_place_at_all(trainer, undisturbed, new_run, tmp_path):
    """A training writes beside its place, never through a temporary folder."""
    nowhere = tmp_path / "nowhere"
    nowhere.mkdir()
    folder = new_run("plain")
    with read_only(nowhere):
        process = trainer.start(folder, prepare=[("obey_permissions",)], environment={"TMPDIR": str(nowhere)})
        wait_for_end(process, folder)
    undisturbed("plain").check_equal(folder)
