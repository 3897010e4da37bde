"""The commands as people and scripts meet them: what they print, and their exit codes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from flows import cli
from model.errors import EXIT_FAULT, EXIT_USER
from tasks.project import Project
from tests.tasks.conftest import NAME, make_project, write_checkpoint

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "train",
    "post-train",
    "evaluate",
    "checkpoints",
    "status",
    "data",
    "plan",
    "benchmark",
    "generate",
    "export",
    "sync",
    "restore",
    "services",
    "worker",
    "deploy",
    "report",
    "compare",
)
Answer = tuple[int, str, str]
"""Exit code, standard output, standard error."""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    project = make_project(tmp_path / "a project")
    shutil.copy(ROOT / "dvc.yaml", project.root)
    shutil.copytree(ROOT / ".dvc", project.root / ".dvc", ignore=shutil.ignore_patterns("tmp", "cache", "config.local"))
    subprocess.run(["git", "init", "-q"], cwd=project.root, check=True)
    monkeypatch.chdir(project.root)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    return project


@pytest.fixture
def gpt2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    def run(*arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["gpt2", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(gpt2: Callable[..., Answer], command: str) -> None:
    code, out, _ = gpt2(command, "--help")
    assert code == 0
    assert f"Example: gpt2 {command}" in out


def test_help_lists_every_command(gpt2: Callable[..., Answer]) -> None:
    code, out, _ = gpt2("--help")
    assert code == 0
    assert all(f"\n  {command} " in out for command in COMMANDS)


def test_help_waits_for_no_heavy_import() -> None:
    program = "import sys, flows.cli; print(sorted({'torch', 'prefect', 'mlflow', 'dvc', 'datasets', 'pyarrow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["train", "nothing"], "nothing"),
        (["train", "../elsewhere"], "experiment"),
        (["train", NAME, "--set", "training.max_stepz=3"], "training.max_stepz"),
        (["train", NAME, "--set", "training.max_steps=many"], "training.max_steps"),
        (["train", NAME, "--set", "training.max_steps"], "--set"),
        (["train", NAME, "--set", "storage.base_folder=/not/there/at/all"], "storage.base_folder"),
        (["train"], "NAME"),
        (["post-train", "nothing"], "nothing"),
        (["post-train", NAME], "no post-training begins with it"),
        (["post-train"], "NAME"),
        (["fly"], "fly"),
        (["evaluate", NAME, "--questions", "many"], "--questions"),
        (["evaluate", NAME], "no checkpoints"),
        (["generate", NAME, "Q:"], "no checkpoints"),
        (["status", "nothing"], "nothing"),
        (["checkpoints", "nothing"], "nothing"),
        (["data", "nothing"], "nothing"),
        (["data", NAME], "data.path: somewhere"),
        (["data", NAME, "--show", "-1"], "--show"),
        (["report", "nothing"], "nothing"),
        (["report", NAME], "has not begun to train"),
        (["sync", "nothing"], "nothing"),
        (["sync", NAME], "nothing to send yet"),
        (["plan", "nothing"], "nothing"),
        (["plan", NAME, "--set", "training.max_stepz=3"], "training.max_stepz"),
        (["plan", NAME, "--gpu", "H101"], "H101"),
        (["plan", NAME, "--price", "H100"], "--price H100"),
        (["plan", NAME, "--mfu", "40"], "--mfu"),
        (["benchmark", "--preset", "huge"], "--preset"),
        (["benchmark", "--preset", "nano", "--window", "129"], "--window"),
        (["benchmark", "--preset", "nano", "--batch", "many"], "--batch"),
    ],
)
def test_a_mistake_is_one_line_that_names_it_and_changes_nothing(
    project: Project, gpt2: Callable[..., Answer], arguments: list[str], field: str
) -> None:
    before = files(project.root)
    code, out, err = gpt2(*arguments)
    assert (code, out) == (EXIT_USER, "")
    assert field in err
    assert err.count("\n") == 1
    assert files(project.root) == before


def test_each_kind_of_training_has_its_command(project: Project, gpt2: Callable[..., Answer]) -> None:
    params = yaml.safe_load((project.root / "params.yaml").read_text())
    params["experiments"]["tuned"] = {"post_training": {"base": f"models:/{NAME}@champion"}, "data": {"path": "somewhere"}}
    (project.root / "params.yaml").write_text(yaml.safe_dump(params))
    assert gpt2("train", "tuned") == (EXIT_USER, "", "error: tuned begins with a trained network: gpt2 post-train tuned\n")
    code, _, err = gpt2("evaluate", "tuned")
    assert (code, err) == (EXIT_USER, "error: tuned has no checkpoints yet; train it first: gpt2 post-train tuned\n")
    code, _, err = gpt2("post-train", NAME, "--set", "post_training.packing=perhaps")
    assert code == EXIT_USER
    assert err.startswith("error: experiments.tuned.post_training.packing: ")


def test_outside_a_project(tmp_path: Path, gpt2: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = gpt2("train", "quickstart")
    assert code == EXIT_USER
    assert "params.yaml" in err


def test_a_machine_without_what_it_takes_is_told_all_of_it_before_anything_changes(
    project: Project, gpt2: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = "mps" if torch.cuda.is_available() else "cuda"
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    before = files(project.root)
    code, out, err = gpt2("train", NAME, "--set", f"hardware.device={missing}", "--set", "data.path=PleIAs/SYNTH")
    assert (code, out) == (EXIT_USER, "")
    assert err.count("\n") == 1
    assert "hardware.device" in err
    assert "data.path" in err
    assert files(project.root) == before
    assert not (project.root.parent / "prefect").exists(), "no server was started"


def test_the_list_of_checkpoints_for_scripts(project: Project, gpt2: Callable[..., Answer]) -> None:
    first, second = write_checkpoint(project, 10), write_checkpoint(project, 20)
    folder = project.run_folder(NAME)
    folder.registered.write_text(json.dumps([{"name": first.name, "digest": first.digest, "version": "3"}]))
    folder.scores.write_text(json.dumps({"champion": {"digest": first.digest}, "checkpoints": []}))
    code, out, _ = gpt2("checkpoints", NAME, "--json")
    rows = json.loads(out)
    assert code == 0
    assert [row["name"] for row in rows] == ["step_00000010", "step_00000020"]
    expected = {"step": 10, "digest": first.digest, "model_sha256": first.model_sha256, "whole": True, "champion": True, "version": "3"}
    assert rows[0].items() >= expected.items()
    assert rows[1].items() >= {"digest": second.digest, "whole": True, "champion": False, "version": None}.items()


def test_verify_finds_the_flipped_bit(project: Project, gpt2: Callable[..., Answer]) -> None:
    checkpoint = write_checkpoint(project, 10)
    weights = checkpoint.path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert json.loads(gpt2("checkpoints", NAME, "--json")[1])[0]["whole"] is True, "its size is right"
    code, out, err = gpt2("checkpoints", NAME, "--verify", "--json")
    assert code == EXIT_FAULT
    assert json.loads(out)[0]["whole"] is False
    assert "step_00000010/model.safetensors" in err


def test_the_status_of_a_run_that_has_not_begun(project: Project, gpt2: Callable[..., Answer]) -> None:
    code, out, _ = gpt2("status", NAME, "--json")
    assert code == 0
    status = json.loads(out)
    assert (status["experiment"], status["state"], status["step"], status["tokens"]) == (NAME, "not started", 0, 0)
    assert status["stages"] == dict.fromkeys(("build-config", "train", "register", "evaluate"), "never run")


def test_what_an_experiment_trains_on(project: Project, gpt2: Callable[..., Answer]) -> None:
    text = "A long walk. " * 90 + "\x1b[31mred"
    rows = [{"synth_id": f"row {n}", "query": "Why?", "synthetic_reasoning": text, "synthetic_answer": "So."} for n in range(40)]
    (project.root / "stories").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), project.root / "stories/part.parquet")
    project.record_overrides(NAME, {"data": {"path": "stories", "filter": None, "article_column": None}})
    code, out, err = gpt2("data", NAME, "--show", "2")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("tiny")
    assert "1 file," in lines[1]
    assert out.count("\nsample row ") == 2
    assert out.count("  │ Q: Why?\n") == 2
    assert out.count("characters left out…]") == 2
    assert "\x1b" not in out, "a text does not command the terminal"
    assert out.count("\\x1b[31mred") == 2
    assert max(map(len, out.splitlines())) <= 160
    assert "gpt2 train tiny --set training.max_steps=20" in out
    assert f"runs{os.sep}tiny{os.sep}report{os.sep}document_lengths.svg" in lines[-1]

    code, out, err = gpt2("data", NAME, "--show", "0", "--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert (report["samples"], report["shown"], report["built"]) == (40, [], False)
    assert Path(report["plot"]).is_file()


def test_what_an_experiment_will_take(project: Project, gpt2: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    before = files(project.root)
    code, out, err = gpt2("plan", NAME, "--set", "training.max_steps=10", "--gpu", "H100", "--gpu", "T4", "--price", "H100=9.87")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == f"{NAME:<10}  1,637,792 parameters"
    assert max(map(len, lines)) <= 80
    assert not any(line.endswith(" ") for line in lines)
    assert "10 steps of the 15 that all epochs take: 1,280 tokens" in out, "100 samples of 20 tokens, 90 of them to train on, in 8 x 16"
    assert "9.87" in next(line for line in lines if line.strip().startswith("H100"))
    assert "B200" not in out

    code, out, err = gpt2("plan", NAME, "--set", "training.max_steps=10", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["parameters"], found["steps"], found["tokens"]["total"]) == (1_637_792, 10, 1280)
    assert files(project.root) == before


@pytest.mark.slow
def test_how_fast_this_machine_trains(gpt2: Callable[..., Answer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ("benchmark", "--preset", "nano", "--window", "16", "--batch", "2", "--seconds", "0.1")
    code, out, _ = gpt2(*arguments, "--json")
    assert code == 0
    (row,) = json.loads(out)
    assert (row["parameters"], row["window"], row["batch"]) == (1_637_792, 16, 2)
    assert row["tokens_per_s"] > 0
    assert row["steps"] >= 1
    assert row["memory_mb"] > 4 * 4 * 1.637792, "weights, gradients and two moments"
    if not torch.cuda.is_available():
        assert (row["precision"], row["mfu"]) == ("fp32", None)
    code, out, _ = gpt2(*arguments)
    assert code == 0
    assert "nano, 1,637,792 parameters, windows of 16" in out


def test_the_champion_writes_on_and_is_exported(project: Project, gpt2: Callable[..., Answer]) -> None:
    champion, newer = write_checkpoint(project, 10), write_checkpoint(project, 20)
    (newer.path / "model.safetensors").unlink()  # whoever uses it fails
    project.run_folder(NAME).scores.write_text(json.dumps({"champion": {"digest": champion.digest}, "checkpoints": []}))
    code, text, _ = gpt2("generate", NAME, "Q: How", "--max-new-tokens", "5")
    assert code == 0
    assert text.startswith("Q: How")
    assert len(text) > len("Q: How\n")
    assert gpt2("generate", NAME, "Q: How", "--max-new-tokens", "5", "--checkpoint", "step_00000010")[1] == text
    assert gpt2("generate", NAME, "Q: How", "--checkpoint", "step_00000020")[0] == EXIT_USER
    code, _, err = gpt2("generate", NAME, "Q: How", "--checkpoint", "step_00000030")
    assert code == EXIT_USER
    assert "step_00000010, step_00000020" in err

    assert gpt2("export", NAME, "out")[0] == 0
    assert {"config.json", "model.safetensors", "vocab.json", "merges.txt"} <= {path.name for path in Path("out").iterdir()}
    assert gpt2("export", NAME, "out")[0] == EXIT_USER


def test_too_few_questions_are_refused_before_anything_starts(project: Project, gpt2: Callable[..., Answer]) -> None:
    write_checkpoint(project, 10)
    before = files(project.root)
    code, _, err = gpt2("evaluate", NAME, "--questions", "0")
    assert code == EXIT_USER
    assert "evaluation.questions" in err
    assert files(project.root) == before


def test_damage_is_refused(project: Project, gpt2: Callable[..., Answer]) -> None:
    checkpoint = write_checkpoint(project, 10)
    weights = checkpoint.path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    code, _, err = gpt2("generate", NAME, "Q: How")
    assert code == EXIT_USER
    assert "model.safetensors" in err


def test_a_configured_server_that_is_not_there_is_named(
    project: Project, gpt2: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    done = subprocess.run([sys.executable, "-c", "from flows.cli import main; main()", "train", NAME], capture_output=True, text=True)
    assert done.returncode == EXIT_FAULT
    assert done.stderr.count("\n") == 1
    assert "PREFECT_API_URL" in done.stderr
