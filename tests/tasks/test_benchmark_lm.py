"""lm-evaluation-harness as it really is, on a task of this folder's own: nothing is downloaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from model.checkpoint.store import Checkpoint
from model.errors import UserError
from model.huggingface import load_model
from model.tokenizer import encode
from tasks import benchmark_lm as benchmarking
from tasks import tracking
from tasks.checkpoint_register import checkpoint_register
from tasks.project import Project, read_json
from tests.tasks.conftest import NAME, write_checkpoint

ROOT = Path(__file__).parents[2]
FIRST = [("apple", "winter"), ("day", "sea"), ("river", "tree"), ("sun", "cat"), ("green", "old"), ("seven", "iron"), ("stone", "boat")]
QUESTIONS = [
    *({"question": f"Q: Which is first, {' or '.join(pair)}?", "choices": pair, "label": n % 2} for n, pair in enumerate(FIRST)),
    *({"question": f"Q: Is {n} even or odd?", "choices": ["even", "odd"], "label": n % 2} for n in range(20, 37)),
]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "my tasks"
    folder.mkdir()
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    task = {
        "task": "local_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(folder / "questions.jsonl")}},
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "doc_to_text": "{{question}}\nA:",
        "doc_to_target": "label",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
    }
    (folder / "local_choice.yaml").write_text(yaml.safe_dump(task))
    return folder


def accuracies(checkpoint: Checkpoint) -> tuple[float, float]:
    """acc and acc_norm by our own network: the likeliest choice, and the likeliest a byte, given the question."""
    network = load_model(checkpoint.path)
    right, right_by_byte = 0, 0
    for question in QUESTIONS:
        begin = encode(f"{question['question']}\nA:")
        likelihoods = []
        for choice in question["choices"]:
            ids = torch.tensor([[*begin, *encode(f" {choice}")]])
            with torch.no_grad():
                log_probabilities = network.logits(network.hidden(ids))[0].log_softmax(-1)
            likelihoods.append(sum(float(log_probabilities[place - 1, ids[0, place]]) for place in range(len(begin), ids.shape[1])))
        right += likelihoods.index(max(likelihoods)) == question["label"]
        by_byte = [likelihood / len(choice) for likelihood, choice in zip(likelihoods, question["choices"], strict=True)]
        right_by_byte += by_byte.index(max(by_byte)) == question["label"]
    return right / len(QUESTIONS), right_by_byte / len(QUESTIONS)


@pytest.mark.slow
def test_the_figures_are_the_checkpoints_stored_logged_and_not_made_twice(
    project: Project, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    checkpoint = write_checkpoint(project, 10)
    checkpoint_register(project, NAME)
    said: list[str] = []

    def run() -> list[benchmarking.Benchmarked]:
        return benchmarking.benchmark_lm(project, NAME, [checkpoint], ["local_choice"], include_path=tasks, report=said.append)

    (found,) = run()
    assert said == []
    acc, acc_norm = accuracies(checkpoint)
    assert (found.results["local_choice"]["acc"], found.results["local_choice"]["acc_norm"]) == pytest.approx((acc, acc_norm))
    assert found.results["local_choice"]["acc_stderr"] > 0
    folder = project.run_folder(NAME).path / "benchmarks"
    assert read_json(folder / "step_00000010.json") == vars(found)
    assert (found.step, found.digest, found.limit) == (10, checkpoint.digest, None)
    log = (folder / "lm_eval.log").stat().st_mtime_ns
    assert run() == [found]
    assert (folder / "lm_eval.log").stat().st_mtime_ns == log  # lm_eval was not started
    client = tracking.connect(project, project.experiment(NAME))
    (entry,) = read_json(project.run_folder(NAME).registered)
    model = client.get_logged_model(entry["model_id"])
    assert [metric.value for metric in model.metrics if metric.key == "benchmark/local_choice/acc_norm"] == [pytest.approx(acc_norm)]
    assert len(client.get_metric_history(entry["run_id"], "benchmark/local_choice/acc")) == 1


def stored(project: Project, checkpoint: Checkpoint, **changes: object) -> Path:
    """What an earlier run left."""
    version = benchmarking._version(sys.executable)
    results = {"hellaswag": {"acc": 0.26, "acc_stderr": 0.004, "acc_norm": 0.2712, "acc_norm_stderr": 0.0044}}
    found = benchmarking.Benchmarked(checkpoint.name, checkpoint.step, checkpoint.digest, version, None, results)
    path = project.run_folder(NAME).path / "benchmarks" / f"{checkpoint.name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**vars(found), **changes}))
    return path


@pytest.mark.slow
def test_the_table_says_which_hellaswag_it_is_and_what_gpt2_has(project: Project) -> None:
    stored(project, write_checkpoint(project, 10))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    command = [sys.executable, "-m", "flows.cli", "benchmark-lm", NAME, "--tasks", "hellaswag"]
    answer = subprocess.run(command, cwd=project.root, env=environment, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    (row,) = [line.split() for line in answer.stdout.splitlines() if "step_00000010" in line]
    assert [cell for cell in row if cell != "│"] == ["step_00000010", "hellaswag", "acc_norm", "0.2712", "0.0044", "0.3114"]
    assert "HellaSwag is acc_norm here" in answer.stdout
    assert "step_00000010 is not registered" in answer.stderr


@pytest.mark.parametrize("changes", [{"digest": "0" * 64}, {"lm_eval_version": "0.4.0"}, {"limit": 3}])
def test_figures_of_other_bytes_versions_and_limits_do_not_stand_for_these(project: Project, changes: dict[str, object]) -> None:
    checkpoint = write_checkpoint(project, 10)
    path = stored(project, checkpoint)
    version = benchmarking._version(sys.executable)
    assert benchmarking._stored(path, checkpoint, version, None) is not None
    stored(project, checkpoint, **changes)
    assert benchmarking._stored(path, checkpoint, version, None) is None


def test_it_runs_on_the_champion_and_the_milestones(project: Project) -> None:
    checkpoints = {step: write_checkpoint(project, step) for step in (10, 20, 30)}
    params = yaml.safe_load((project.root / "params.yaml").read_text())
    params["experiments"][NAME]["evaluation"] = {"milestones": [10, 15]}
    (project.root / "params.yaml").write_text(yaml.safe_dump(params))
    said: list[str] = []
    chosen = benchmarking.chosen_checkpoints(project, NAME, None, said.append)
    assert [checkpoint.name for checkpoint in chosen] == ["step_00000010", "step_00000030"]  # no champion yet: the newest
    assert len(said) == 1
    assert said[0].startswith("evaluation.milestones: 15: step_00000015 is not in ")
    assert benchmarking.chosen_checkpoints(project, NAME, "step_00000020", said.append) == [checkpoints[20]]
    weights = checkpoints[10].path / "model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert [checkpoint.step for checkpoint in benchmarking.chosen_checkpoints(project, NAME, None, said.append)] == [30]
    assert any(line.startswith("evaluation.milestones: step_00000010") for line in said)


def test_without_lm_eval_one_line_has_the_cure(project: Project, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    python = next(path for path in (tmp_path / "bare").glob("*/python*") if path.stem == "python")
    monkeypatch.setenv(benchmarking.PYTHON, str(python))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(UserError, match=r"has no lm_eval transformers accelerate torch: pip install 'lm-eval\[hf\]'.*GPT2_LM_EVAL_PYTHON="):
        benchmarking.benchmark_lm(project, NAME, [write_checkpoint(project, 10)])
    monkeypatch.setenv(benchmarking.PYTHON, str(tmp_path / "nothing here"))
    with pytest.raises(UserError, match=r"GPT2_LM_EVAL_PYTHON: .*nothing here cannot be run"):
        benchmarking.benchmark_lm(project, NAME, [write_checkpoint(project, 10)])


@pytest.mark.parametrize("task", ["--model", "a b", "x;y", "../x"])
def test_what_is_no_tasks_name_reaches_no_command_line(project: Project, task: str) -> None:
    with pytest.raises(UserError, match=r"--tasks: .* is not a task's name"):
        benchmarking.benchmark_lm(project, NAME, [], [task])


def test_every_filter_of_a_task_keeps_its_figure() -> None:
    figures = {"alias": "x", "sample_len": 3, "exact_match,strict": 0.5, "exact_match,none": 0.25, "acc_stderr,none": "N/A"}
    assert benchmarking._read({"results": {"x": figures}}) == {"x": {"exact_match.strict": 0.5, "exact_match": 0.25}}


def test_what_lm_eval_says_becomes_one_line() -> None:
    """The words of lm_eval 0.4.13."""
    raised = '    raise ValueError(f"Tasks not found: {missing}")\n'
    trace = f"Traceback (most recent call last):\n{raised}ValueError: Tasks not found: hella, swag\n"
    unknown = benchmarking._fault(trace, 1, Path("a.log"))
    assert isinstance(unknown, UserError)
    assert str(unknown).startswith("--tasks: lm_eval knows no task hella, swag; ")
    offline = benchmarking._fault(
        "…\nConnectionError: Couldn't reach 'Rowan/hellaswag' on the Hub (OfflineModeIsEnabled)\n", 1, Path("a.log")
    )
    assert isinstance(offline, benchmarking.BenchmarkFault)
    assert str(offline) == (
        "lm_eval broke (exit code 1): ConnectionError: Couldn't reach 'Rowan/hellaswag' on the Hub (OfflineModeIsEnabled); all of it: a.log"
    )
