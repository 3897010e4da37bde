"""benchmarks/loss_parity.py: today's code still makes the stored losses, and a change of the numbers is found."""

import json
import math

import pytest
import torch

from benchmarks import loss_parity
from model.gpt2 import MLP, Block

pytestmark = pytest.mark.slow


@pytest.fixture
def reference(tmp_path):
    """A copy of what the repository stores, and a way to change it."""
    path = tmp_path / "reference.json"
    stored = json.loads(loss_parity.REFERENCE.read_text())
    path.write_text(json.dumps(stored))

    def change(case, step, factor):
        stored["losses"][case][step - 1] *= factor
        path.write_text(json.dumps(stored))

    return path, change


def test_the_code_still_makes_the_stored_losses(capsys):
    assert loss_parity.main([]) == 0
    assert "loss parity: equal" in capsys.readouterr().out


def test_a_loss_that_differs_ends_with_one_line_that_names_it(reference, capsys):
    path, change = reference
    change("without dropout", 7, 1 + 3e-4)
    assert loss_parity.main(["--reference", str(path)]) == 1
    line = capsys.readouterr().err.strip()
    assert line.startswith("loss parity: without dropout, step 7: ")
    assert "3.0e-04 relative, 3e-06 is tolerated" in line
    assert "\n" not in line


def test_rounding_of_another_processor_is_tolerated(reference, capsys):
    path, change = reference
    change("without dropout", 20, 1 + 1e-6)
    assert loss_parity.main(["--reference", str(path)]) == 0
    assert "equal within 3e-06" in capsys.readouterr().out


def test_losses_that_are_not_numbers_are_not_equal(monkeypatch, capsys):
    monkeypatch.setattr(loss_parity, "training_losses", lambda dropout: [math.nan] * loss_parity.STEPS)
    assert loss_parity.main([]) == 1
    assert "step 1: nan instead of" in capsys.readouterr().err


def test_update_stores_what_the_next_comparison_finds_equal_to_the_last_bit(tmp_path, capsys):
    path = tmp_path / "new.json"
    assert loss_parity.main(["--update", "--reference", str(path)]) == 0
    assert loss_parity.main(["--reference", str(path)]) == 0
    assert "equal to the last bit" in capsys.readouterr().out


def test_a_slightly_wrong_network_is_found(monkeypatch, capsys):
    """LayerNorm's epsilon of 1e-6 instead of GPT-2's 1e-5 is the kind of slip that trains well and is wrong."""
    build = Block.__init__

    def with_another_epsilon(self, config):
        build(self, config)
        self.ln_1.eps = 1e-6

    monkeypatch.setattr(Block, "__init__", with_another_epsilon)
    assert loss_parity.main([]) == 1
    assert "loss parity: without dropout, step" in capsys.readouterr().err


def test_another_gelu_is_found(monkeypatch, capsys):
    """nanoGPT's is exact, GPT-2's is the approximation by tanh."""
    monkeypatch.setattr(MLP, "forward", lambda self, x_BTD: self.c_proj(torch.nn.functional.gelu(self.c_fc(x_BTD))))
    assert loss_parity.main([]) == 1
    assert "loss parity: without dropout, step" in capsys.readouterr().err


def test_the_number_of_threads_is_put_back():
    before = torch.get_num_threads()
    loss_parity.training_losses(0.0)
    assert torch.get_num_threads() == before
