from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model.training.journal import Journal, read_all
from tasks import lease, machine_metrics, tracking
from tasks.journal_sender import CURSOR, POINTS_A_CALL, WARNINGS, Forwarder, NoLease
from tasks.machine_metrics import MachineMetrics
from tasks.project import Project
from tests.tasks.conftest import NAME, Server, write_config

ROOT = Path(__file__).parents[2]


class Training:
    """Writes a journal as the trainer does."""

    def __init__(self, project: Project, digest: str | None = None) -> None:
        self.folder = project.run_folder(NAME)
        self.digest = digest or tracking.read_config(self.folder).digest
        self.journal = Journal(self.folder.journal)

    def start(self, step: int = 0) -> None:
        resumed = f"step_{step:08d}" if step else None
        self.journal.append("started", step=step, config_digest=self.digest, resumed_from=resumed, device="cpu", precision="fp32")

    def steps(self, first: int, last: int, loss: float = 1.0) -> None:
        for step in range(first, last + 1):
            self.journal.append("step", step=step, epoch=0, loss=loss + step, learning_rate=0.1, gradient_norm=None, tokens=16 * step)

    def end(self, event: str, step: int) -> None:
        self.journal.append(event, step=step)


def forwarder(project: Project) -> Forwarder:
    config = tracking.read_config(project.run_folder(NAME))
    client = tracking.connect(project, project.experiment(NAME))
    return Forwarder(client, tracking.training_run(client, project, NAME, config), project.run_folder(NAME), config.digest)


def points(project: Project, metric: str = "train/loss") -> list[tuple[int, float, int]]:
    """(step, value, ms) of every point that MLflow has, in the order of time."""
    client = tracking.connect(project, project.experiment(NAME))
    run_id = tracking.training_run(client, project, NAME, tracking.read_config(project.run_folder(NAME)))
    return sorted(((p.step, p.value, p.timestamp) for p in client.get_metric_history(run_id, metric)), key=lambda p: (p[2], p[0]))


def told(project: Project, field: str = "loss") -> list[tuple[int, float, int]]:
    """The same, from the journal."""
    return [(e["step"], e[field], round(e["time"] * 1000)) for e in read_all(project.run_folder(NAME).journal) if e["event"] == "step"]


def run_of(project: Project) -> Any:
    client = tracking.connect(project, project.experiment(NAME))
    return client.get_run(tracking.training_run(client, project, NAME, tracking.read_config(project.run_folder(NAME))))


def test_every_event_arrives_once_with_its_own_time_and_step(project: Project) -> None:
    training = Training(project)
    training.start()
    training.steps(1, 20)
    training.journal.append("validation", step=20, loss=3.5, bits_per_byte=1.25, windows=8)
    training.journal.append("sample", step=20, prompt="Q: 1 + 1?", text=" A: 2 ✓")
    training.journal.append("warning", step=20, kind="disk", message="nearly full")
    forwarder(project).send_new()
    assert forwarder(project).send_new() == []
    assert points(project) == told(project)
    assert points(project, "train/tokens") == told(project, "tokens")
    run = run_of(project)
    assert run.data.metrics["validation/bits_per_byte"] == 1.25
    assert "train/gradient_norm" not in run.data.metrics  # it was not finite
    assert run.data.tags["last_warning"] == "step 20: nearly full"
    assert run.data.tags["device"] == "cpu"
    client = tracking.connect(project, project.experiment(NAME))
    sample = client.download_artifacts(run.info.run_id, "samples/step_00000020.txt", str(project.root))
    assert Path(sample).read_text(encoding="utf-8") == "Q: 1 + 1? A: 2 ✓"


def test_losses_have_a_curve_over_tokens(project: Project) -> None:
    training = Training(project)
    training.start()
    training.steps(1, 10)
    training.journal.append("validation", step=10, loss=3.5, bits_per_byte=1.25, windows=8)
    forwarder(project).send_new()
    training.journal.append("step", step=11, loss=2.0)  # it says nothing of tokens
    training.journal.append("validation", step=11, loss=3.0, bits_per_byte=1.0, windows=8)
    training.start(10)
    training.steps(11, 12)
    training.journal.append("validation", step=12, loss=3.25, bits_per_byte=1.125, windows=8)
    forwarder(project).send_new()
    told_of = [e for e in read_all(training.folder.journal) if "tokens" in e]
    assert points(project, "by_tokens/train_loss") == [(e["tokens"], e["loss"], round(e["time"] * 1000)) for e in told_of]
    assert [point[:2] for point in points(project, "by_tokens/validation_loss")] == [(160, 3.5), (192, 3.25)]
    assert [point[:2] for point in points(project, "by_tokens/validation_bits_per_byte")] == [(160, 1.25), (192, 1.125)]
    assert [point[:2] for point in points(project, "validation/loss")] == [(10, 3.5), (11, 3.0), (12, 3.25)]
    assert "validation/tokens" not in run_of(project).data.metrics


def test_the_code_that_trains_is_the_runs_source(project: Project) -> None:
    training, digest = Training(project), "a" * 40
    training.journal.append("started", step=0, config_digest=training.digest, code={"commit": digest, "diff_sha256": None})
    sender = forwarder(project)
    sender.send_new()
    tags = run_of(project).data.tags
    source = {key.removeprefix("mlflow.source."): value for key, value in tags.items() if key.startswith("mlflow.source.")}
    assert source == {"type": "LOCAL", "name": "gpt2 train tiny", "git.commit": digest, "git.dirty": "false"}
    training.journal.append("started", step=0, config_digest=training.digest, code={"commit": digest, "diff_sha256": "b" * 64})
    sender.send_new()
    assert run_of(project).data.tags["mlflow.source.git.dirty"] == "true"


def measured(project: Project) -> list[tuple[int, float, int]]:
    return points(project, "system/cpu_utilization_percentage")


def test_the_machine_is_measured_only_while_it_trains_and_may_tell(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    monkeypatch.setattr(machine_metrics, "SECONDS_BETWEEN_STARTS", 0.1)
    training, sender, machine = Training(project), forwarder(project), MachineMetrics()
    machine.keep_going(sender)
    assert machine._thread is None, "it does not train yet"
    training.start()
    sender.send_new()
    machine.keep_going(sender)
    wait_for(lambda: len(measured(project)) > 2)
    assert {"system/system_memory_usage_percentage", "system/disk_usage_percentage", "system/network_receive_megabytes"} <= set(
        run_of(project).data.metrics
    )
    fence = lease.fence(training.folder)
    fence.write_text(json.dumps({"valid_until": time.time() - 1, "token": 1}))  # another machine has the run
    wait_for(lambda: not machine._thread.is_alive())
    there = measured(project)
    machine.keep_going(sender)
    assert not machine._thread.is_alive()
    fence.unlink()
    time.sleep(0.1)
    machine.keep_going(sender)
    wait_for(lambda: len(measured(project)) > len(there) + 2)
    steps = [step for step, _, _ in measured(project)]
    assert steps == list(range(len(steps))), "it goes on from where it was"
    machine.end()
    wait_for(lambda: not machine._thread.is_alive())
    machine.keep_going(sender)
    assert not machine._thread.is_alive()


def test_a_lost_cursor_adds_nothing_twice(project: Project) -> None:
    training = Training(project)
    training.start()
    training.steps(1, 30)
    sender = forwarder(project)
    sender.send_new()
    training.steps(31, 40)
    sender._client.delete_tag(sender._run_id, CURSOR)
    assert len(forwarder(project).send_new()) == 41
    assert points(project) == told(project)


def test_a_kill_in_the_middle_loses_nothing_and_adds_nothing_twice(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(project)
    training.start()
    training.steps(1, 700)
    sender = forwarder(project)
    calls: list[str] = []
    log_batch = type(sender._client).log_batch

    def second_one_kills(self: Any, *arguments: Any, **options: Any) -> None:
        calls.append("log_batch")
        if len(calls) == 2:
            raise KeyboardInterrupt
        log_batch(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(sender._client), "log_batch", second_one_kills)
        with pytest.raises(KeyboardInterrupt):
            sender.send_new()
    there = len(points(project))
    assert 0 < there < 700
    assert len(forwarder(project).send_new()) == 700 - there
    assert points(project) == told(project)


def test_a_long_journal_goes_in_calls_that_mlflow_takes(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(project)
    training.start()
    training.steps(1, 700)
    sender = forwarder(project)
    sizes: list[int] = []
    log_batch = type(sender._client).log_batch
    monkeypatch.setattr(
        type(sender._client),
        "log_batch",
        lambda self, run, metrics=(), **k: (sizes.append(len(metrics)), log_batch(self, run, metrics, **k)),
    )
    sender.send_new()
    assert max(sizes) <= POINTS_A_CALL
    assert len(sizes) == 4  # 4 figures a step
    assert points(project) == told(project)


@pytest.mark.parametrize("figures", [997, 998, 999, 1000])
def test_the_cursor_is_never_ahead_of_the_points(project: Project, monkeypatch: pytest.MonkeyPatch, figures: int) -> None:
    """MLflow's client makes several calls of one batch that is too large for one, and the tags go with the first."""
    training = Training(project)
    training.start()
    sender = forwarder(project)
    sender.send_new()
    training.journal.append("step", step=1, **{f"figure_{n}": float(n) for n in range(figures)})
    calls: list[tuple[int, bool]] = []
    store = type(sender._client._tracking_client.store)
    log_batch = store.log_batch

    def noted(self: Any, run_id: str, metrics: Any, params: Any, tags: Any) -> None:
        calls.append((len(metrics), any(tag.key == CURSOR for tag in tags)))
        log_batch(self, run_id, metrics, params, tags)

    monkeypatch.setattr(store, "log_batch", noted)
    sender.send_new()
    assert sum(size for size, _ in calls) == figures
    assert [size for size, with_cursor in calls if not with_cursor] == [POINTS_A_CALL]
    assert calls[-1] == (figures - POINTS_A_CALL, True)


def test_mlflow_that_goes_between_two_questions_loses_nothing(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    training, sender = Training(project), forwarder(project)
    training.start()
    training.steps(1, 5)
    with monkeypatch.context() as patch:
        patch.setattr(type(sender._client), "get_run", lambda *arguments: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(OSError, match="gone"):
            sender.send_new()
    assert len(sender.send_new()) == 6
    assert points(project) == told(project)


def bad_events(training: Training) -> None:
    """Such as MLflow refuses, among such as it takes."""
    training.journal.append("started", step=10, config_digest=training.digest, device="x" * 10_000)
    training.steps(11, 20)
    training.journal.append("step", step=21, **{"loss": 1.0, "a name; it has: what MLflow\n refuses": 2.0})
    training.journal.append("step", step=2**70, loss=1.0)
    training.journal.append("step", step="many", loss=1.0)
    training.journal.append("step", step=23, loss=10**400)
    training.steps(24, 30)


def test_one_event_that_mlflow_refuses_holds_up_nothing(project: Project) -> None:
    training = Training(project)
    training.start()
    training.steps(1, 10)
    bad_events(training)
    said: list[str] = []
    sender = forwarder(project)
    sender._report = said.append
    sender.send_new()
    good = [*range(1, 21), *range(24, 31)]
    assert [step for step, _, _ in points(project)] == good
    assert len(said) == 4
    assert all("passed over" in line for line in said)
    assert "step 21" in said[0]
    assert "a name" in said[0]
    assert "last_refused" in run_of(project).data.tags
    assert forwarder(project).send_new() == []


def test_when_mlflow_refuses_everything_nothing_is_passed_over(project: Project) -> None:
    training = Training(project)
    training.start()
    training.steps(1, 10)
    sender = forwarder(project)
    sender.send_new()
    sender._client.delete_run(sender._run_id)
    training.steps(11, 20)
    with pytest.raises(Exception, match="active"):
        sender.send_new()
    sender._client.restore_run(sender._run_id)
    sender.send_new()
    assert points(project) == told(project)


def test_a_rotten_line_is_told_of_and_passed_over(project: Project) -> None:
    training, said = Training(project), []
    training.start()
    training.steps(1, 5)
    with training.folder.journal.open("ab") as file:
        file.write(b"\x00\x00rot\n[]\n{}\n" + b'{"seq": 1, "time": NaN, "event": "step"}\n')
    training.steps(6, 9)
    sender = forwarder(project)
    sender._report = said.append
    sender.send_new()
    assert len(said) == 4
    assert points(project) == told_of_lines(project)


def told_of_lines(project: Project) -> list[tuple[int, float, int]]:
    """`told`, from a journal of which not every line can be read."""
    found = []
    for line in project.run_folder(NAME).journal.read_bytes().splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            event = json.loads(line)
            if event["event"] == "step" and event["time"] == event["time"]:
                found.append((event["step"], event["loss"], round(event["time"] * 1000)))
    return found


def test_every_warning_can_be_read_in_mlflow(project: Project) -> None:
    training, sender = Training(project), forwarder(project)
    training.start()
    for step in (3, 5):
        training.journal.append("warning", step=step, kind="disk", message=f"{step} GB\nleft")
        sender.send_new()
    training.journal.append("warning", step=7, kind="spike", message="of the gradient")
    forwarder(project).send_new()  # another process: it tells of the earlier ones, too
    run = run_of(project)
    assert (run.data.tags["warnings"], run.data.tags["last_warning"]) == ("3", "step 7: of the gradient")
    client = tracking.connect(project, project.experiment(NAME))
    lines = Path(client.download_artifacts(run.info.run_id, WARNINGS, str(project.root))).read_text(encoding="utf-8").splitlines()
    assert [line.partition("UTC  ")[2] for line in lines] == [
        "step 3  disk: 3 GB left",
        "step 5  disk: 5 GB left",
        "step 7  spike: of the gradient",
    ]


def test_files_that_cannot_be_stored_delay_no_curve(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    training, sender = Training(project), forwarder(project)
    training.start()
    training.journal.append("sample", step=0, prompt="Q", text="A")
    training.steps(1, 5)
    training.end("finished", 5)
    began = time.time() - 60
    with monkeypatch.context() as patch:
        patch.setattr(type(sender._client), "log_text", lambda *arguments: (_ for _ in ()).throw(PermissionError("no bucket")))
        with pytest.raises(PermissionError):
            sender.send_new()
    assert points(project) == told(project)
    assert sender.ended_since(began)
    forwarder(project).send_new()
    client = tracking.connect(project, project.experiment(NAME))
    assert Path(client.download_artifacts(run_of(project).info.run_id, "samples/step_00000000.txt", str(project.root))).read_text() == "QA"


def test_a_machine_without_the_lease_sends_nothing_until_it_has_it(project: Project) -> None:
    training, sender = Training(project), forwarder(project)
    training.start()
    training.steps(1, 5)
    fence = lease.fence(training.folder)
    fence.write_text(json.dumps({"valid_until": time.time() - 1, "token": 1}))
    with pytest.raises(NoLease, match="trained elsewhere"):
        sender.send_new()
    assert points(project) == []
    fence.write_text(json.dumps({"valid_until": time.time() + 60, "token": 3}))
    sender.send_new()
    assert points(project) == told(project)


def test_after_a_resume_both_curves_stay_and_the_final_figures_are_the_later_ones(project: Project) -> None:
    training = Training(project)
    training.start()
    training.steps(1, 30, loss=100)
    sender = forwarder(project)
    sender.send_new()
    time.sleep(0.002)
    training.start(20)
    training.steps(21, 30, loss=200)
    training.end("finished", 30)
    sender.send_new()
    assert sorted(points(project)) == sorted(told(project))
    run = run_of(project)
    assert run.data.metrics["train/loss"] == 230
    assert run.data.tags["resumed_from"] == "step_00000020"


def test_the_runs_status_follows_the_journal(project: Project) -> None:
    training, sender = Training(project), forwarder(project)
    seen = []
    for change in (training.start, lambda: training.end("stopped", 5), lambda: training.start(5), lambda: training.end("finished", 9)):
        change()
        sender.send_new()
        seen.append(run_of(project).info.status)
    assert seen == ["RUNNING", "KILLED", "RUNNING", "FINISHED"]
    assert run_of(project).info.end_time == round(read_all(training.folder.journal)[-1]["time"] * 1000)


def test_a_journal_that_went_on_under_another_config_goes_to_two_runs(project: Project) -> None:
    old = Training(project)
    old.start()
    old.steps(1, 5)
    forwarder(project).send_new()
    old_points = points(project)
    old.digest = write_config(project, learning_rate=1e-3).digest
    old.start()
    old.steps(1, 3)
    forwarder(project).send_new()
    assert len(old_points) == 5
    assert points(project) == told(project)[5:]


def test_a_journal_that_was_replaced_is_sent_from_its_start(project: Project) -> None:
    first, sender = Training(project), forwarder(project)
    first.start()
    first.steps(1, 3)
    sender.send_new()
    before = points(project)
    first.folder.journal.rename(first.folder.path / "aside.jsonl")
    second = Training(project)
    second.start()
    second.steps(1, 8)  # longer than the one before
    sender.send_new()
    assert points(project) == before + told(project)


def test_a_torn_line_waits_until_it_is_whole(project: Project) -> None:
    training, sender = Training(project), forwarder(project)
    training.start()
    training.steps(1, 2)
    text = training.folder.journal.read_bytes()
    training.folder.journal.write_bytes(text[:-10])
    assert len(sender.send_new()) == 2
    with training.folder.journal.open("ab") as file:
        file.write(text[-10:])
    assert [event["step"] for event in sender.send_new()] == [2]


# --- the process ---


def start(project: Project, *options: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
    environment["MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL"] = "0.5"
    command = [sys.executable, "-m", "tasks.forwarder", NAME, *options]
    return subprocess.Popen(command, cwd=project.root, env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)


@pytest.mark.slow
def test_following_ends_with_the_training(project: Project) -> None:
    training = Training(project)
    training.start()
    training.end("stopped", 0)  # the ending of an earlier start is not the one to wait for
    process = start(project, "--follow")
    wait_for(lambda: run_of(project).info.status == "KILLED")
    assert process.poll() is None
    training.start()
    training.steps(1, 10)
    training.end("finished", 10)
    _, errors = process.communicate(timeout=30)  # communicate closes stdin, but it had ended by itself
    assert process.returncode == 0, errors
    assert points(project) == told(project)
    assert run_of(project).info.status == "FINISHED"


@pytest.mark.slow
def test_a_trainer_that_died_leaves_a_failed_run(project: Project) -> None:
    training = Training(project)
    training.start()
    training.steps(1, 10)
    process = start(project, "--follow")
    _, errors = process.communicate(timeout=60)  # closes its standard input, as the stage does when the trainer is gone
    assert process.returncode == 0, errors
    assert points(project) == told(project)
    assert run_of(project).info.status == "FAILED"


@pytest.mark.slow
def test_a_closed_mlflow_delays_the_curve_and_loses_nothing(project: Project, server: Server) -> None:
    training = Training(project)
    training.start()
    training.steps(1, 50)
    process = start(project, "--follow")
    wait_for(lambda: len(points(project)) == 50)
    wait_for(lambda: len(measured(project)) > 1)
    server.stop()
    training.steps(51, 80)
    assert process.stderr is not None
    assert "trying again" in process.stderr.readline()
    training.steps(81, 100)
    server.start()
    back = 1000 * time.time()
    wait_for(lambda: any(at > back for _, _, at in measured(project)))
    training.end("finished", 100)
    ended = time.monotonic()
    assert process.wait(90) == 0
    assert time.monotonic() - ended < 10, "measuring keeps nobody waiting"
    assert points(project) == told(project)
    assert run_of(project).info.status == "FINISHED"
    _, errors = process.communicate()
    assert all(line.startswith("tracking: ") for line in errors.splitlines()), errors


@pytest.mark.slow
def test_without_mlflow_one_line_says_so_and_the_next_start_catches_up(project: Project, server: Server) -> None:
    training = Training(project)
    training.start()
    training.steps(1, 50)
    server.stop()
    began = time.monotonic()
    process = start(project)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert [line for line in errors.splitlines() if line.startswith("tracking: ")] == errors.splitlines()
    assert "next start" in errors
    assert time.monotonic() - began < 60
    server.start()
    process = start(project)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert points(project) == told(project)
