"""benchmarks/generation.py writes with each on the same weights, says which is how fast, and fails if they disagree about a token."""

import json

import pytest
import torch

from benchmarks import generation

SMALL = ["--preset", "nano", "--batch", "3", "--prompt", "20", "--tokens", "40", "--rounds", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def settings_of_torch():
    threads, products = torch.get_num_threads(), torch.backends.mkldnn.matmul.fp32_precision
    yield
    torch.set_num_threads(threads)
    torch.backends.mkldnn.matmul.fp32_precision = products


@pytest.mark.slow
def test_each_writes_the_same_and_is_measured(tmp_path, capsys):
    pytest.importorskip("transformers")
    generation.main([*SMALL, "--json", str(tmp_path / "figures.json")])
    out = capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures.keys() == {"ours", "transformers", "recomputing", "settings", "device", "machine"}
    for row in ("ours", "transformers", "recomputing"):
        assert row in out
        assert figures[row]["equal_texts"] + figures[row]["parted_at_ties"] == 3
        assert figures[row]["tokens_per_s"] > 0
        assert figures[row]["different_tokens"] > 20, "texts that repeat one token are equal too easily"
        assert len(figures[row]["seconds"]) == (1 if row == "recomputing" else 2)
    assert figures["recomputing"]["ratio_to_recomputing"] == figures["transformers"]["ratio_to_transformers"] == 1


@pytest.mark.slow
def test_a_wrong_token_fails_it(monkeypatch, capsys):
    pytest.importorskip("transformers")
    right = generation._recomputing

    def wrong(model):
        write = right(model)
        return lambda prompts_BT, count: write(prompts_BT, count).index_fill(1, torch.tensor([count - 1]), 0)

    monkeypatch.setattr(generation, "_recomputing", wrong)
    with pytest.raises(SystemExit, match="not equal"):
        generation.main(SMALL)
    assert "0 of 3" in capsys.readouterr().out


def test_more_than_the_context_holds_is_the_users_mistake(capsys):
    with pytest.raises(SystemExit) as ended:
        generation.main(["--preset", "nano", "--tokens", "100"])
    assert ended.value.code == 2
    assert "a context of 128" in capsys.readouterr().err
