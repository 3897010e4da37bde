"""benchmarks/checkpoint.py says of every way to make checkpoints what it costs, and what it does with a flipped bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import checkpoint

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_contestant_is_measured_and_only_ours_finds_a_flipped_bit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "in_own_process", lambda module, task, env: checkpoint.turn(**task))  # torch is imported once only
    options = ["--preset", "nano", "--repeat", "1", "--threads", "1", "--folder", str(tmp_path)]
    checkpoint.main([*options, "--json", str(tmp_path / "figures.json")])

    figures, table = json.loads((tmp_path / "figures.json").read_text()), capsys.readouterr().out
    assert figures.keys() == {"ours", "torch.save", "dcp.async", "dcp.async cached", "settings", "machine"}
    for name in checkpoint.CONTESTANTS:
        found = figures[name]
        assert name.split()[0] in table
        assert found["first_stall_s"] > 0
        assert found["stall_s"] > 0
        assert found["durable_s"] > 0
        assert found["extra_mb"] >= 0
        assert found["load_s"] > 0
        assert found["times_less_stall"] > 0
        assert found["flipped_bit"] == ("finds it" if name == "ours" else "loads it")
        assert (found["verify_s"] is not None) == (name == "ours")
        assert (found["steps_beside"] is None) == (name == "torch.save")
        assert (found["load_mapped_s"] is not None) == (name == "torch.save")
    assert "SHA-256 differs" in figures["ours"]["flipped_bit_error"]
    assert figures["torch.save"]["times_less_stall"] == 1
    assert 0 < figures["settings"]["stall_share"] < 1
    assert figures["settings"]["gigabytes"] == pytest.approx(4.9e6 / 3 * 12 / 1e9, rel=0.05)
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


@pytest.mark.slow
def test_a_turn_is_a_process_of_its_own(tmp_path):
    options = ["--preset", "nano", "--repeat", "2", "--threads", "1", "--only", "ours", "--folder", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.checkpoint", *options, "--json", str(tmp_path / "figures.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures.keys() == {"ours", "settings", "machine"}
    assert len(figures["ours"]["turns"]) == 2
    assert figures["ours"]["times_less_stall"] is None
    assert "A checkpoint" in done.stdout
