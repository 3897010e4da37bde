"""What a killed process left half-written goes; what a living one is writing stays."""

import os
import subprocess
import sys

from model import disk


def test_what_dead_processes_were_writing_is_swept_and_nothing_else(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    dead = [f".{name}.{child.pid}.140000000000000.partial" for name in (".aliases.json", "scores.json")]
    others = [f".scores.json.{os.getppid()}.1.partial", "notes.partial", ".lock", f".{child.pid}.partial"]
    for name in [*dead, *others]:
        (tmp_path / name).write_text("half")
    disk.sweep_files(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)


def test_the_next_write_of_a_file_sweeps_its_own(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    (tmp_path / f".scores.json.{child.pid}.1.partial").write_text("half")
    disk.write_file(tmp_path / "scores.json", b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]
