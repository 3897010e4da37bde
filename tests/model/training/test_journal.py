"""The journal: append-only, readable while it is written, whole after a kill."""

import json
import os

from model.training.journal import Journal, read_all, read_current


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
    cached.write_text(json.dumps({"seq": 0, "time": 0, "event": "started", "step": 0}) + "\n")
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
