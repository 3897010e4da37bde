"""benchmarks/train_step.py measures every implementation that it is asked for, on the same tokens, and says which one is how fast."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import train_step

ROOT = Path(__file__).parents[2]
PEER = """
import time
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    block_size: int = 8
    vocab_size: int = 50304
    n_layer: int = 1
    n_head: int = 1
    n_embd: int = 8
    dropout: float = 0.0

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        print("a peer may print")
        self.logits = torch.nn.Parameter(torch.zeros(config.vocab_size))
        self.ballast = torch.ones(config.vocab_size * 1000)  # 200 MB

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.SGD(self.parameters(), lr=learning_rate)

    def forward(self, idx, targets):
        began = time.process_time()
        while time.process_time() - began < 2:  # CPU-seconds: slower than any other
            pass
        logits = self.logits.expand(targets.numel(), -1)
        return logits, torch.nn.functional.cross_entropy(logits, targets.view(-1))
"""


def test_a_peer_that_is_not_there_is_the_users_mistake(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        train_step.main(["--peer", str(tmp_path)])
    assert ended.value.code == 2
    assert "there is no model.py in it" in capsys.readouterr().err


def test_rows_of_a_peer_need_one(capsys):
    with pytest.raises(SystemExit) as ended:
        train_step.main(["--only", "peer.eager"])
    assert ended.value.code == 2
    assert "give --peer PATH" in capsys.readouterr().err


@pytest.mark.slow
def test_each_row_is_measured_beside_the_peer(tmp_path):
    (tmp_path / "model.py").write_text(PEER)
    rows = ["ours.eager", "transformers.eager", "peer.eager"]
    options = ["--preset", "nano", "--batch", "1", "--rounds", "3", "--only", *rows, "--peer", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.train_step", *options, "--json", str(tmp_path / "figures.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures.keys() == {*rows, "settings", "device", "machine"}
    assert figures["settings"]["context_length"] == 128
    for row in rows:
        assert row in done.stdout
        assert figures[row]["tokens_per_cpu_s"] > 0
        assert len(figures[row]["seconds"]) == 3
        assert figures[row]["first_loss"] == pytest.approx(math.log(50_257), abs=0.3)
    assert figures["peer.eager"]["tokens_per_cpu_s"] < 128 / 2
    assert figures["peer.eager"]["ratio_to_peer"] == 1
    assert figures["ours.eager"]["ratio_to_peer"] > 1
    assert figures["peer.eager"]["peak_rss_mb"] > 200
    assert figures["ours.eager"]["parameters"] == figures["transformers.eager"]["parameters"]
    if figures["device"] == "cpu":
        assert figures["ours.eager"]["mfu"] is None


@pytest.mark.slow
def test_a_worker_that_fails_ends_the_benchmark_with_its_error(tmp_path):
    (tmp_path / "model.py").write_text("raise OSError('this peer is broken')\n")
    command = [sys.executable, "-m", "benchmarks.train_step", "--quick", "--only", "peer.eager", "--peer", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "this peer is broken" in done.stderr
    assert "a worker ended with exit code 1" in done.stderr
