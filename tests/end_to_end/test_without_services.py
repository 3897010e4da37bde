"""Without any server: interrupted in every way, a training ends with the same weights; DVC and the flow agree; storage gives all back."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from model.errors import EXIT_STOPPED
from tasks.versioning import STAGES
from tests.end_to_end.conftest import DVC, GPT2, PYTHON, Clone, contents, until, until_it_trains, until_left
from tests.tasks.conftest import free_port

pytestmark = pytest.mark.slow


def test_interrupted_in_three_ways_it_ends_with_the_same_weights(clone: Clone) -> None:
    whole = clone.run(*GPT2, "train", "quickstart")
    assert "step_00000240" in whole.stdout
    assert "★" in whole.stdout
    assert f"report        {Path('runs/quickstart/report/report.html')}" in whole.stdout
    assert "finished" in (clone.folder("quickstart").report / "report.html").read_text()

    flow = clone.start(*GPT2, "train", "again")
    until_it_trains(clone, "again")
    os.killpg(flow.pid, signal.SIGINT)  # as a terminal does it
    assert flow.wait(60) == EXIT_STOPPED
    assert clone.trainers() == []
    assert clone.status("again")["state"] == "stopped"

    flow = clone.start(*GPT2, "train", "again")
    until_it_trains(clone, "again")
    flow.kill()
    flow.wait()
    until_left(clone)

    repro = clone.start(*DVC, "repro", "train@again")
    until_it_trains(clone, "again")
    repro.kill()
    repro.wait()
    until_left(clone)

    clone.run(*DVC, "repro", "evaluate@again")
    assert len([event for event in clone.journal("again") if event["event"] == "started"]) == 4
    uninterrupted, interrupted = clone.checkpoints("quickstart")[-1], clone.checkpoints("again")[-1]
    assert interrupted["name"] == uninterrupted["name"] == "step_00000240"
    assert interrupted["model_sha256"] == uninterrupted["model_sha256"]


def test_after_dvc_repro_the_flow_skips_everything(clone: Clone) -> None:
    done = clone.run(*GPT2, "train", "again")
    assert done.stdout.count("up to date, skipped") == len(STAGES)
    assert "up to date" in clone.run(*DVC, "repro").stdout


def test_what_was_pushed_comes_back_bit_for_bit(clone: Clone) -> None:
    folder = clone.folder("again").path
    before = contents(folder)
    shutil.rmtree(folder)
    clone.run(*DVC, "checkout")
    assert contents(folder) == before
    shutil.rmtree(folder)
    shutil.rmtree(clone.root / ".dvc" / "cache")
    clone.run(*DVC, "pull")
    assert contents(folder) == before
    assert "up to date" in clone.run(*DVC, "status").stdout


def test_a_champion_learns_to_answer_and_is_registered_and_served(clone: Clone) -> None:
    flow = clone.start(*GPT2, "post-train", "quickstart")
    until_it_trains(clone, "quickstart-tuned")
    os.killpg(flow.pid, signal.SIGINT)
    assert flow.wait(60) == EXIT_STOPPED
    said = " ".join(clone.run(*GPT2, "post-train", "quickstart").stdout.split())
    begun = [event["step"] for event in clone.journal("quickstart-tuned") if event["event"] == "started"]
    assert begun[0] == 0
    assert begun[1] > 0
    champion = next(row for row in clone.checkpoints("quickstart") if row["champion"])
    rows = clone.checkpoints("quickstart-tuned")
    assert [row["step"] for row in rows] == [0, 120, 240]
    assert rows[0]["base"]
    assert [rows[0][key] for key in ("model_sha256", "answer_bits_per_byte")] == [
        champion[key] for key in ("model_sha256", "answer_bits_per_byte")
    ]
    (best,) = [row for row in rows if row["champion"]]
    assert ("What it began with is still the champion" if best["base"] else "Against its base, on the same items: answer -") in said

    again = clone.run(*GPT2, "post-train", "quickstart")
    assert again.stdout.count("up to date, skipped") == len(STAGES)
    assert set(clone.status("quickstart-tuned")["stages"].values()) == {"done"}
    assert "up to date" in clone.run(*DVC, "repro").stdout
    report = (clone.folder("quickstart-tuned").report / "report.html").read_text()
    assert "Base and tuned" in report
    assert f"It began with {champion['name']} of quickstart" in report

    ask = "import mlflow; print(mlflow.pyfunc.load_model('models:/quickstart-tuned@champion').predict(['Q: What is 1 + 1?']))"
    environment = {**clone.environment, "MLFLOW_TRACKING_URI": f"sqlite:///{clone.root / 'storage' / 'mlflow' / 'mlflow.db'}"}
    served = subprocess.run([PYTHON, "-c", ask], cwd=clone.root.parent, env=environment, capture_output=True, text=True, timeout=120)
    assert served.returncode == 0, served.stderr
    told = subprocess.run(
        [*GPT2, "chat", "quickstart"], cwd=clone.root, env=clone.environment, input="What is 1 + 1?\n", capture_output=True, text=True
    )
    own = clone.run(*GPT2, "generate", "quickstart-tuned", "Q: What is 1 + 1?\n\nReasoning:\n")
    assert told.stdout.split() == own.stdout.partition("Reasoning:")[2].split(), "whoever was taught to answer answers"


def test_another_number_of_questions_is_asked_without_training_again(clone: Clone) -> None:
    before = len(clone.journal("again"))
    clone.run(*GPT2, "evaluate", "again", "--questions", "2")
    assert len(clone.journal("again")) == before
    assert "questions: 2" in (clone.root / "overrides.yaml").read_text()
    assert {row["questions"] for row in clone.checkpoints("again")} == {2}


def test_another_setting_trains_anew_and_keeps_the_old_checkpoints_aside(clone: Clone) -> None:
    old = clone.checkpoints("again")[-1]["model_sha256"]
    clone.run(*GPT2, "train", "again", "--set", "training.max_steps=10", "--set", "training.learning_rate=0.001")
    rows = clone.checkpoints("again")
    assert [row["step"] for row in rows] == [10]
    assert rows[0]["model_sha256"] != old
    assert any(clone.folder("again").aside.rglob("step_00000240"))
    assert clone.status("again")["stages"] == dict.fromkeys(STAGES, "done")


def test_a_second_ctrl_c_leaves_at_once_and_the_training_follows(clone: Clone) -> None:
    flow = clone.start(*GPT2, "train", "samples2m")
    until_it_trains(clone, "samples2m")
    os.killpg(flow.pid, signal.SIGINT)
    time.sleep(0.2)
    os.killpg(flow.pid, signal.SIGINT)
    assert flow.wait(5) == EXIT_STOPPED
    until_left(clone)
    assert clone.checkpoints("samples2m")[-1]["whole"]


def test_services_that_are_not_up_yet_end_on_ctrl_c(clone: Clone) -> None:
    ports = ("--prefect-port", str(free_port()), "--mlflow-port", str(free_port()))
    desk = clone.start(*GPT2, "services", *ports)
    until(lambda: "MLflow starts" in clone.said_by(desk), 60)
    desk.send_signal(signal.SIGINT)
    assert desk.wait(60) == 0
    assert clone.end() == [], "these were left behind"
