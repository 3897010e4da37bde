"""benchmarks/optimizers.py compares the recipes on equal terms and says where each reaches the reference's loss."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.optimizers import RECIPES, Curve, Size, main, summarise
from model.config import ModelConfig
from model.stream.quickstart import write_corpus

ROOT = Path(__file__).parents[2]


def run(*options):
    return subprocess.run([sys.executable, "-m", "benchmarks.optimizers", *options], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    """Rows in the dataset's columns."""
    folder = tmp_path_factory.mktemp("text")
    write_corpus(folder, seed=0, rows=2000)
    return folder


@pytest.mark.slow
def test_each_recipe_is_trained_and_drawn(text_folder, tmp_path):
    done = run("--quick", "--seeds", "2", "--data", str(text_folder), "--json", str(tmp_path / "f.json"), "--plot", str(tmp_path / "f.svg"))
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "f.json").read_text())
    reference = figures["adamw"]
    assert reference["token_ratio"] == reference["time_ratio"] == 1.0
    assert reference["tokens_to_reference_loss"] == reference["tokens"][-1]
    for name in RECIPES:
        found = figures[name]
        assert found["label"] in done.stdout
        assert found["label"] in (tmp_path / "f.svg").read_text()
        assert len(found["tokens"]) == len(found["seconds"]) == len(found["loss"]) == len(found["losses"][1]) > 2
        assert [losses[0] for losses in found["losses"]] == [losses[0] for losses in reference["losses"]], "the same initial weights"
        assert found["losses"][0] != found["losses"][1]
        assert found["final_loss"] < found["loss"][0]
        assert found["seconds"] == sorted(found["seconds"])
        assert 0 < found["optimizer_share"] < 1
        assert found["tokens"][-1] == round(figures["size"]["steps"] * RECIPES[name].share) * 4 * 32
        assert found["tokens_to_reference_loss"] is None or found["tokens_to_reference_loss"] <= found["tokens"][-1]
    assert figures["seeds"] == 2


@pytest.mark.slow
def test_the_sweep_tries_each_recipes_own_rates_and_those_beside_them(text_folder):
    done = run("--quick", "--sweep", "--data", str(text_folder))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(set(lines)) == len(lines) == sum(1 + sum(len(tried) for tried in recipe.sweep.values()) for recipe in RECIPES.values())
    for recipe in RECIPES.values():
        assert sum(line.startswith(f"{recipe.label}: learning_rate {recipe.fields['learning_rate']:g}") for line in lines) >= 1


def test_data_that_are_not_there_are_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as fault:
        main(["--data", str(tmp_path / "none")])
    assert fault.value.code == 2
    assert f"--data {tmp_path / 'none'}: no parquet files there" in capsys.readouterr().err.splitlines()[-1]


def curves(*runs):
    return [Curve([0, 100, 200], [0.0, *seconds], list(losses)) for seconds, losses in runs]


def test_where_a_curve_comes_down_to_the_reference():
    size = Size(ModelConfig(preset="nano"), 1, 2, 2, 1)
    runs = {name: curves(((1.0, 2.0), (9.0, 6.0, 4.0)), ((1.0, 2.0), (9.0, 6.0, 5.0))) for name in RECIPES}
    runs["muon"] = curves(((3.0, 6.0), (9.0, 5.0, 3.0)), ((3.0, 6.0), (9.0, 5.0, 3.0)))
    runs["adamw_split"] = curves(((1.0, 2.0), (9.0, 3.0, 2.0)), ((1.0, 2.0), (9.0, 8.0, 5.01)))
    found = summarise(runs, size)
    assert found["muon"]["tokens_to_reference_loss"] == 125  # half way to 4 in one seed, at the first validation in the other
    assert found["muon"]["token_ratio"] == 1.6
    assert found["muon"]["seconds_to_reference_loss"] == 3.75
    assert found["muon"]["time_ratio"] == pytest.approx(2 / 3.75, abs=1e-3)
    assert found["adamw"]["token_ratio"] == found["adamw"]["time_ratio"] == 1.0
    assert found["adamw_split"]["token_ratio"] is None
    assert found["adamw_split"]["tokens_to_reference_loss"] is None
