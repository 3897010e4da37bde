from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml

from model.errors import Stopped
from tasks import lease
from tasks.lease import Lease, NotOurs, fence, lease_file, may_write, open_place, read_holder, tokens
from tasks.project import Project
from tests.tasks.conftest import NAME, make_project

On = Callable[[str], Lease]


@pytest.fixture(params=["folder", "memory://"])
def on(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[On]:
    """Gives the lease as a clone on a host of that name sees it; all clones have one storage."""
    monkeypatch.setattr(lease, "TTL_S", 0.6)
    base = str(tmp_path / "disk") if request.param == "folder" else f"memory://bucket-{uuid.uuid4().hex}"

    def lease_on(host: str) -> Lease:
        project = make_project(tmp_path / host)
        params = yaml.safe_load((project.root / "params.yaml").read_text())
        params["defaults"]["storage"] = {"base_folder": base}
        (project.root / "params.yaml").write_text(yaml.safe_dump(params))
        monkeypatch.setenv("GPT2_HOST", host)
        return Lease.of(project, NAME)

    yield lease_on
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def long_lease(on: On, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for a sign of life is late."""
    monkeypatch.setattr(lease, "TTL_S", 60.0)


@pytest.fixture
def kept() -> Iterator[Callable[[Lease], threading.Event]]:
    """Keeps leases as a stage does, each until its event is set or the test ends."""
    threads: list[tuple[threading.Event, threading.Thread]] = []

    def keep(held: Lease) -> threading.Event:
        done = threading.Event()
        threads.append((done, threading.Thread(target=held.keep, args=(done,))))
        threads[-1][1].start()
        return done

    yield keep
    for done, thread in threads:
        done.set()
        thread.join()


def until(true: Callable[[], Any], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def dead(held: Lease) -> Lease:
    """The same clone in a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return dataclasses.replace(held, holder=dataclasses.replace(held.holder, pid=process.pid))


@pytest.mark.usefixtures("long_lease")
def test_the_first_one_has_it_at_once(on: On) -> None:
    held = on("a")
    began = time.monotonic()
    held.take()
    assert held.token == 1
    held.renew()
    assert time.monotonic() - began < 10


def test_while_its_holder_lives_a_second_one_is_refused_and_told_who_and_since_when(on: On, kept: Any) -> None:
    held = on("a")
    held.take()
    kept(held)
    with pytest.raises(NotOurs, match=rf"{NAME} is in use by process {os.getpid()} on a since 20..-..-.. ..:..:.. UTC") as refused:
        on("b").take()
    assert "\n" not in str(refused.value)
    assert held.lost is None


@pytest.mark.usefixtures("long_lease")
def test_what_was_given_back_is_taken_at_once(on: On, kept: Any) -> None:
    held = on("a")
    held.take()
    kept(held).set()
    until(lambda: held.token is None)
    began = time.monotonic()
    second = on("b")
    second.take()
    assert second.token == 2
    assert time.monotonic() - began < 10


@pytest.mark.usefixtures("long_lease")
def test_from_a_dead_process_of_this_machine_it_is_taken_at_once(on: On) -> None:
    dead(on("a")).take()
    began = time.monotonic()
    second = on("a")
    second.take()
    assert second.token == 2
    assert time.monotonic() - began < 10


@pytest.mark.usefixtures("long_lease")
def test_a_process_that_has_a_dead_ones_number_is_not_taken_for_it(on: On) -> None:
    held = on("a")
    held.holder = dataclasses.replace(held.holder, started=held.holder.started - 1000)
    held.take()
    began = time.monotonic()
    on("a").take()
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("another", ["host", "machine"])
def test_a_number_says_nothing_on_another_machine_and_silence_does(on: On, another: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A machine may have the same name: cloned ones and containers often do."""
    first = dead(on("a"))
    first.holder = dataclasses.replace(first.holder, **{another: "other"})
    first.take()
    began = time.monotonic()
    second = on("a")
    second.take()
    assert second.token == 2
    assert time.monotonic() - began >= lease.TTL_S
    assert "silent" in capsys.readouterr().err


def test_who_was_taken_over_loses_it_for_good(on: On, kept: Any) -> None:
    first, second = on("a"), on("b")
    told = threading.Event()
    first.when_lost = told.set
    first.take()
    second.take()  # nobody renews: as if the first were paused
    kept(second)
    assert not may_write(first.folder)  # it expired before anybody could take over
    with pytest.raises(NotOurs, match=f"was taken over by process {os.getpid()} on b since 20"):
        first.check()
    kept(first)
    assert told.wait(5)
    until(lambda: not may_write(first.folder))
    assert isinstance(first.lost, NotOurs)
    time.sleep(lease.TTL_S)
    assert second.lost is None
    assert may_write(second.folder)


def test_of_two_that_wait_for_a_dead_one_only_one_gets_it(on: On) -> None:
    on("a").take()
    contenders = [on(host) for host in ("b", "c")]
    refused: list[NotOurs] = []

    def contend(contender: Lease) -> None:
        try:
            contender.take()
        except NotOurs as error:
            refused.append(error)
        else:
            contender.keep(done)

    done = threading.Event()
    threads = [threading.Thread(target=contend, args=(contender,)) for contender in contenders]
    for thread in threads:
        thread.start()
    until(lambda: refused)
    held = [contender for contender in contenders if contender.token is not None]
    done.set()
    for thread in threads:
        thread.join()
    assert len(held) == 1
    assert held[0].lost is None


def contend_for(root: Path, host: str, barrier: Any, won: Any) -> None:
    os.environ["GPT2_HOST"] = host
    held = Lease.of(Project(root), NAME)
    fs, folder = open_place(held.url)
    barrier.wait()
    for token in range(1, 101):
        if held._create(fs, folder, token):
            won.put((token, held.holder.id))


@pytest.mark.parametrize("on", ["folder"], indirect=True)
def test_processes_that_race_for_a_token_never_get_the_same(on: On, tmp_path: Path) -> None:
    """Fresh processes: a fork of this one would have what other tests left running in it, without its threads."""
    context = multiprocessing.get_context("spawn" if os.name == "nt" else "forkserver")
    barrier, won = context.Barrier(3), context.SimpleQueue()
    leases = [on(host) for host in "abc"]
    processes = [context.Process(target=contend_for, args=(tmp_path / host, host, barrier, won)) for host in "abc"]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    winners = []
    while not won.empty():
        winners.append(won.get())
    numbers = [token for token, _ in winners]
    assert len(numbers) == len(set(numbers))
    fs, root = open_place(leases[0].url)
    assert sorted(tokens(fs, root)) == list(range(1, 101))
    for token, holder_id in winners:
        holder = read_holder(fs, root, token)
        assert holder is not None
        assert holder.id == holder_id


def test_a_token_below_the_highest_is_not_taken_even_where_it_is_free(on: On) -> None:
    """Whoever looked before an older lease was tidied away comes too late."""
    held = on("a")
    held.take()
    fs, root = open_place(held.url)
    fs.mv(lease_file(root, 1), lease_file(root, 5))
    late = on("b")
    assert not late._create(fs, root, 4)
    assert late.token is None


def test_a_half_written_lease_counts_until_it_has_been_silent(on: On) -> None:
    second = on("b")
    fs, root = open_place(second.url)
    fs.makedirs(root)
    fs.pipe_file(lease_file(root, 1), b"")
    began = time.monotonic()
    second.take()
    assert second.token == 2
    assert time.monotonic() - began >= lease.TTL_S


def test_waiting_ends_when_asked(on: On, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "TTL_S", 60)
    on("a").take()
    began = time.monotonic()
    with pytest.raises(Stopped):
        on("b").take(lambda: time.monotonic() - began > 0.1)
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("on", ["folder"], indirect=True)
def test_a_storage_that_is_away_for_a_while_costs_nothing(on: On, kept: Any, capsys: pytest.CaptureFixture[str]) -> None:
    held = on("a")
    held.take()
    disk = Path(held.url.partition("/checkpoints/")[0])
    kept(held)
    disk.rename(disk.with_name("away"))
    disk.write_text("a file where the folder should be")
    time.sleep(3 * lease.TTL_S)
    assert may_write(held.folder)
    disk.unlink()
    disk.with_name("away").rename(disk)
    until(lambda: json.loads((Path(held.url) / "heartbeat_00000001.json").read_text() or "{}").get("beats", 0) > held._beats - 1)
    assert (held.token, held.lost) == (1, None)
    assert capsys.readouterr().err.count("training goes on") == 1


@pytest.mark.parametrize("on", ["folder"], indirect=True)
def test_what_expired_is_renewed_by_the_storage_only(on: On, kept: Any) -> None:
    """A process that was paused does not know yet whether it was taken over, and now it cannot ask."""
    held = on("a")
    held.take()
    disk = Path(held.url.partition("/checkpoints/")[0])
    disk.rename(disk.with_name("away"))
    time.sleep(lease.TTL_S)  # paused
    assert not may_write(held.folder)
    kept(held)
    time.sleep(lease.TTL_S)
    assert not may_write(held.folder)
    disk.with_name("away").rename(disk)
    until(lambda: may_write(held.folder))


def test_a_file_that_says_nothing_allows_nothing_and_none_allows(new_project: Project) -> None:
    folder = new_project.run_folder(NAME)
    assert may_write(folder)
    for content in ("", "[]", "{}", '{"valid_until": null}', f'{{"valid_until": {time.time() - 1}}}'):
        fence(folder).write_text(content)
        assert not may_write(folder)
    fence(folder).write_text(f'{{"valid_until": {time.time() + 9}}}')
    assert may_write(folder)


def test_a_stage_holds_it_to_its_end(new_project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "TTL_S", 0.4)
    with lease.holding(new_project, NAME) as held:
        assert held.token == 1
        time.sleep(2 * lease.TTL_S)
        assert may_write(held.folder)
        assert fence(held.folder).exists()
    assert not fence(held.folder).exists()
    with lease.holding(new_project, NAME) as again:
        assert again.token == 2
    with pytest.raises(ZeroDivisionError), lease.holding(new_project, NAME):
        raise ZeroDivisionError
    with lease.holding(new_project, NAME) as again:
        assert again.token == 4


def test_without_a_storage_a_stage_goes_on_and_takes_the_lease_when_there_is_one(
    new_project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lease, "TTL_S", 0.4)
    storage = new_project.root / "storage"
    storage.write_text("a file where the folder should be")
    with lease.holding(new_project, NAME) as held:
        assert held.token is None
        assert may_write(held.folder)
        time.sleep(lease.TTL_S)
        storage.unlink()
        until(lambda: held.token is not None)
    assert capsys.readouterr().err.count("training goes on") == 1


def test_who_began_without_a_storage_gives_way_to_who_holds_the_lease(on: On, kept: Any) -> None:
    held, late = on("a"), on("b")
    held.take()
    kept(held)
    kept(late)
    until(lambda: late.lost is not None)
    assert "is in use by" in str(late.lost)
    assert not may_write(late.folder)
    assert held.lost is None
