"""`gpt2 compare`: two checkpoints on the same held-out items, and nothing changed by it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save

from flows import cli
from model.checkpoint.store import MODEL, OPTIMIZER, STATE, Checkpoint, CheckpointStore
from model.errors import EXIT_USER, UserError
from model.gpt2 import GPT2
from model.huggingface import METADATA, to_hugging_face
from model.stream.quickstart import write_corpus
from model.tokenizer import END_OF_TEXT, encode
from tasks import tracking
from tasks.build_config import build_config
from tasks.compare import compare
from tasks.project import Project, read_json

FIGURES = ("text_bits_per_byte", "answer_bits_per_byte", "distractor_accuracy", "format_adherence")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Three experiments on one corpus: `a`, `b` with a longer window, `c` with another seed. `b` has a better network."""
    root = tmp_path_factory.mktemp("compare")
    write_corpus(root / "corpus", seed=1, rows=600, files=1)
    data = {"path": str(root / "corpus"), "max_length": 32, "buffer_size": 64, "lanes": 1, "train_ratio": 0.5}
    common = {
        "model": {"preset": "nano"},
        "data": data,
        "evaluation": {"items": 40, "questions": 2, "max_new_tokens": 4, "prompts": ["So?"]},
    }
    longer = {**common, "data": {**data, "max_length": 48}, "evaluation": {**common["evaluation"], "questions": 1}}
    experiments = {"a": common, "b": longer, "c": {**common, "seed": 7, "data": {**data, "train_ratio": 0.6}}}
    (root / "params.yaml").write_text(json.dumps({"defaults": {}, "experiments": experiments}))
    (root / "dvc.yaml").write_text("stages: {}\n")
    project = Project(root)
    for name in experiments:
        build_config(project, name)
    plant(project, "a", 10)
    plant(project, "a", 20)
    better = plant(project, "b", 10, taught=8)
    plant(project, "c", 10)
    project.run_folder("b").scores.write_text(json.dumps({"champion": {"digest": better.digest}, "checkpoints": []}))
    return project


def plant(project: Project, name: str, step: int, taught: int = 0) -> Checkpoint:
    """A random network, which has seen so many batches of answers."""
    config = tracking.read_config(project.run_folder(name))
    network = GPT2(config.model, seed=step)
    answers = pq.read_table(next((project.root / "corpus").iterdir()), columns=["synthetic_answer"]).column(0).to_pylist()
    tokens = [token for answer in answers for token in (*encode(f"A: {answer}"), END_OF_TEXT)]
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for batch in range(taught):
        windows_BT = torch.tensor(tokens[160 * batch : 160 * batch + 160]).view(8, 20)
        network(windows_BT[:, :-1], windows_BT[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = {key: value.detach() for key, value in to_hugging_face(dict(network.named_parameters())).items()}
    state = {"step": step, "config_digest": config.digest, "config": config.model_dump(mode="json")}
    contents = {MODEL: [save(weights, metadata=METADATA)], OPTIMIZER: [save({"m": torch.zeros(1)})], STATE: [json.dumps(state).encode()]}
    return CheckpointStore(project.run_folder(name).checkpoints).write(step, contents)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_rival_of_the_same_data_is_measured_item_by_item(project: Project) -> None:
    before = files(project.root / "runs")
    found = compare(project, "a/step_00000010", "b")
    assert (found.a, found.b) == ("a/step_00000010", "b/step_00000010")
    figures = {figure.key: figure for figure in found.figures}
    assert set(FIGURES) <= set(figures)
    answer = figures["answer_bits_per_byte"]
    assert answer.a is not None
    assert answer.b is not None
    assert answer.difference == pytest.approx(answer.b - answer.a)
    assert answer.low is not None
    assert answer.high is not None
    assert answer.low < answer.difference < answer.high < 0
    assert (answer.items, figures["format_adherence"].items) == (40, 2), "A's settings hold for both"
    assert found.winner == "b"
    assert "takes over: -" in found.reason
    assert files(project.root / "runs") == before, "what DVC versions is left alone"
    assert not (project.root / "storage" / "mlflow").exists(), "no registry is asked, no alias moved"


def test_the_other_way_round_is_the_mirror_image(project: Project) -> None:
    one, other = compare(project, "a/step_00000010", "a/step_00000020"), compare(project, "a/step_00000020", "a/step_00000010")
    for figure, mirrored in zip(one.figures, other.figures, strict=True):
        assert (figure.a, figure.b) == (mirrored.b, mirrored.a)
        assert figure.difference == pytest.approx(-(mirrored.difference or 0.0), abs=1e-12)
    assert {one.winner, other.winner} in ({None}, {"a", "b"})


def test_a_checkpoint_against_itself_wins_nothing(project: Project) -> None:
    found = compare(project, "b", "b/step_00000010")
    assert found.winner is None
    assert all(figure.difference == 0.0 for figure in found.figures)
    assert "whichever is champion stays" in found.reason


def test_what_was_scored_is_not_scored_again(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compare(project, "a/step_00000010", "b")

    def again(*_: object) -> None:
        raise AssertionError("scored again")

    monkeypatch.setattr("model.evaluation.scoring.score", again)
    assert compare(project, "a/step_00000010", "b") == first


@pytest.mark.parametrize(
    ("a", "b", "names"),
    [
        ("a/step_00000010", "c/step_00000010", ("seed: 42, 7", "data.train_ratio: 0.5, 0.6")),
        ("a", "b", ("a has no champion yet", "gpt2 evaluate a")),
        ("a/step_00000030", "b", ("step_00000030", "step_00000010, step_00000020")),
        ("a/newest", "b", ("'a/newest'", "step_00001000")),
        ("nothing", "b", ("nothing",)),
        ("../a", "b", ("experiment",)),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(project: Project, a: str, b: str, names: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as refused:
        compare(project, a, b)
    assert all(name in str(refused.value) for name in names)


@pytest.fixture
def gpt2(project: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(project.root)
        monkeypatch.setattr(sys, "argv", ["gpt2", "compare", *arguments])
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def test_the_command_shows_both_the_difference_and_who_wins(project: Project, gpt2: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = gpt2("a/step_00000010", "b")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert "B wins by the champion rule" in out
    assert "No alias was moved." in out
    code, out, _ = gpt2("a/step_00000010", "b", "--json")
    assert code == 0
    assert json.loads(out) == compare(project, "a/step_00000010", "b").as_json()
    code, out, err = gpt2("a/step_00000010", "c/step_00000010")
    assert (code, out) == (EXIT_USER, "")
    assert err.count("\n") == 1
    assert read_json(project.run_folder("b").scores)["checkpoints"] == []
