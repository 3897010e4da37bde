"""The journal: append-only, readable while it is written, whole after a kill."""

import os
import random
import resource
import threading

import pytest

from model.training.journal import Journal, parse, read_all, read_current


def test_events_come_back_in_order_and_numbered(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append("started", step=0)
    journal.append("step", step=1, loss=2.5, text="naïve\n日本")
    assert [(e["seq"], e["event"]) for e in read_all(journal.path)] == [(0, "started"), (1, "step")]
    journal.close()
    Journal(journal.path).append("step", step=2)
    assert [e["seq"] for e in read_all(journal.path)] == [0, 1, 2]
    assert read_all(tmp_path / "absent.jsonl") == []


def test_a_torn_last_line_is_no_event_and_is_written_over(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.append("started", step=0)
    journal.append("step", step=1)
    journal.close()
    whole = path.read_bytes()
    for cut in range(1, len(whole.splitlines()[-1]) + 1):
        path.write_bytes(whole[:-cut])
        assert [e["event"] for e in read_all(path)] == ["started"]
        again = Journal(path)
        again.append("step", step=7)
        again.close()
        assert [(e["seq"], e["step"]) for e in read_all(path)] == [(0, 0), (1, 7)]


def test_what_a_resume_takes_back_is_superseded(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.append("started", step=0)
    for step in (1, 2, 3, 4):
        journal.append("step", step=step, run=1)
    journal.append("checkpoint", step=2)
    journal.append("started", step=2)
    journal.append("step", step=3, run=2)
    journal.append("started", step=2)
    journal.append("step", step=3, run=3)
    journal.close()
    current = [(e["event"], e["step"], e.get("run")) for e in read_current(path)]
    assert [c for c in current if c[0] == "step"] == [("step", 1, 1), ("step", 2, 1), ("step", 3, 3)]
    assert ("checkpoint", 2, None) in current
    assert len(read_all(path)) == 10


def test_never_writes_through_a_link(tmp_path):
    cached, path = tmp_path / "cached", tmp_path / "journal.jsonl"
    first = Journal(cached)
    first.append("started", step=0)
    first.close()
    before = cached.read_bytes()
    os.link(cached, path)
    journal = Journal(path)
    journal.append("step", step=1)
    journal.close()
    assert cached.read_bytes() == before
    path.unlink()
    path.symlink_to(cached)
    journal = Journal(path)
    journal.append("step", step=1)
    journal.close()
    assert cached.read_bytes() == before
    assert len(read_all(path)) == 2


def written(path, steps=8):
    journal = Journal(path)
    for step in range(steps):
        journal.append("step", step=step, loss=step / 3, text="naïve")
    journal.close()
    return path.read_bytes()


def test_every_flipped_bit_is_found(tmp_path):
    content = written(tmp_path / "journal.jsonl", steps=3)
    line = content.splitlines(keepends=True)[1]
    assert parse(line)["step"] == 1
    for position in range(len(line)):
        for bit in range(8):
            assert parse(line[:position] + bytes([line[position] ^ 1 << bit]) + line[position + 1 :]) is None


def test_damaged_lines_are_taken_out_and_told_of(tmp_path):
    path = tmp_path / "run" / "journal.jsonl"
    path.parent.mkdir()
    content = bytearray(written(path))
    content[random.Random(1).randrange(len(content) // 3, len(content) // 2)] ^= 16
    path.write_bytes(content)
    whole = read_all(path)
    assert 6 <= len(whole) < 8
    journal = Journal(path)
    assert "damaged lines" in journal.damage
    journal.append("step", step=8)
    journal.close()
    assert [e["step"] for e in read_all(path)] == [*(e["step"] for e in whole), 8]
    assert [e["seq"] for e in read_all(path)][-1] == 8
    (kept,) = (path.parent / "aside" / "damaged").iterdir()
    assert kept.read_bytes() == content
    assert Journal(path).damage is None


def test_a_disk_that_takes_nothing_costs_no_event(tmp_path, capsys):
    """The limit on a file's size is the kernel's own way to refuse a write half-way."""
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.append("started", step=0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 50, limits[1]))
    try:
        for step in range(1, 6):
            journal.append("step", step=step)
            assert [e["event"] for e in read_all(path)] == ["started"]
        with pytest.raises(OSError, match="cannot be written"):
            journal.sync()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    journal.append("step", step=6)
    journal.close()
    events = read_all(path)
    assert [e["step"] for e in events if e["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert [e["seq"] for e in events] == list(range(8))
    assert events[-1]["message"].startswith("journal.jsonl could not be written")
    assert capsys.readouterr().err.count("its events are kept") == 1


def test_threads_write_whole_lines(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    threads = [threading.Thread(target=lambda n=n: [journal.append("step", step=s, thread=n) for s in range(100)]) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal.close()
    events = read_all(journal.path)
    assert [e["seq"] for e in events] == list(range(400))
    for number in range(4):
        assert [e["step"] for e in events if e["thread"] == number] == list(range(100))


def test_a_fence_keeps_an_event_out(tmp_path):
    def taken_over():
        raise ValueError("taken over")

    journal = Journal(tmp_path / "journal.jsonl", taken_over)
    with pytest.raises(ValueError, match="taken over"):
        journal.append("step", step=1)
    assert read_all(journal.path) == []
