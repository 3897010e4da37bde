"""The nightly round, with a real Prefect server, DVC, MLflow and a training; and its report."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from flows.night_page import Night, line, page
from model.errors import EXIT_FAULT
from tasks.news import Champion, News
from tasks.project import Project
from tasks.recheck import Rechecked, Rotten
from tests.end_to_end.conftest import DVC, PYTHON, Clone, clone, until  # noqa: F401 (a fixture)
from tests.flows.prefect_server import PrefectServer

FIRST, SECOND = Champion("d1", "step_00000010", "the first"), Champion("d2", "step_00000020", "better in 0.1 bits")
ROTTEN = Rotten("step_00000010", "d1", "/storage", "step_00000010/model.safetensors is missing", "push it: gpt2 sync small")


def test_the_report_of_a_quiet_night_is_short() -> None:
    nights = [
        Night("small", News([], [], FIRST, FIRST, False), rechecked=[Rechecked(local=2), Rechecked(stored=8, read=3 * 10**9, left=10**9)])
    ]
    assert line(nights) == "evaluated: small"
    assert line([]) == "evaluated: no experiment has checkpoints"
    assert page(nights).splitlines()[2:] == [
        "| small | none | none | step_00000010 | all of 2 checkpoints here; in the storage 8 files seen, 3.0 GB of 4.0 GB read |"
    ]


def test_the_report_says_what_is_new_what_moved_what_rotted_and_what_is_in_the_way() -> None:
    nights = [
        Night("small", News(["step_00000020"], ["step_00000020"], FIRST, SECOND, True), rechecked=[Rechecked(local=2, rotten=[ROTTEN])]),
        Night("busy", busy="busy: another flow works on it"),
        Night("broken", problems=["no whole checkpoint\nto register"]),
        Night("late", News([], [], None, None, False), problems=["MLflow does not answer; gpt2 sync late"]),
    ]
    assert line(nights) == (
        "evaluated: small, late; new champion: small step_00000020; rotten: small; left to another flow: busy; not evaluated: broken; "
        "in the way: late"
    )
    text = page(nights)
    row = next(row for row in text.splitlines() if row.startswith("| small"))
    assert row.startswith("| small | step_00000020 | step_00000020 | **step_00000020**, before: step_00000010; better in 0.1 bits |")
    assert "- **small/step_00000010** in /storage: step_00000010/model.safetensors is missing. Push it: gpt2 sync small." in text
    assert "- **broken**: no whole checkpoint to register\n" in text
    assert "- **busy**: busy: another flow works on it\n" in text


@pytest.fixture(scope="module")
def trained(clone: Clone) -> Clone:  # noqa: F811
    """One that is trained, registered and pushed, and one of which there is but a checkpoint: nothing can be made of that."""
    params = yaml.safe_load((clone.root / "params.yaml").read_text())
    params["defaults"]["training"] |= {"max_steps": 4, "eval_freq": 4}
    params["defaults"]["checkpoint"] = {"save_every_n_iterations": 4}
    (clone.root / "params.yaml").write_text(yaml.safe_dump(params))
    for name in ("quickstart", "again"):
        Project(clone.root).record_overrides(name, {})
    clone.run(*DVC, "repro", "register@quickstart")
    clone.run(*DVC, "push", "train@quickstart")
    shutil.copytree(clone.folder("quickstart").checkpoints, clone.folder("again").checkpoints)
    return clone


@pytest.mark.slow
def test_the_round_does_all_there_is_to_do_and_fails_for_rot(trained: Clone, server: PrefectServer) -> None:
    remote = trained.root / "storage" / "dvc" / "files" / "md5"
    rotten = max((path for path in remote.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(rotten.read_bytes())
    content[-1] ^= 1
    rotten.unlink()  # not through a link into the run folder
    rotten.write_bytes(content)
    trained.environment |= server.environment | {"PREFECT_LOGGING_LEVEL": "INFO"}
    done = trained.run(PYTHON, "-c", "from flows.re_evaluate import re_evaluate; re_evaluate()", check=False)
    assert done.returncode == EXIT_FAULT, done.stdout + done.stderr

    (run,) = server.ask("flow_runs/filter", {"flows": {"name": {"any_": ["re-evaluate"]}}})
    champion = json.loads(trained.folder("quickstart").scores.read_text())["champion"]
    assert (run["name"], run["state"]["type"]) == ("every experiment", "FAILED")
    assert (
        run["state"]["message"]
        == f"evaluated: quickstart; new champion: quickstart {champion['name']}; rotten: quickstart; not evaluated: again"
    )
    (report,) = server.ask("artifacts/filter", {"artifacts": {"key": {"any_": ["nightly"]}}})
    assert f"| quickstart | none | {champion['name']} | **{champion['name']}**, before: none" in report["data"]
    assert f"**quickstart/{champion['name']}** in " in report["data"]
    assert str(rotten) in report["data"], "the cure names it"
    assert "- **again**: " in report["data"]

    resource = f"gpt2.checkpoint.{champion['digest']}"

    def told() -> dict[str, dict[str, str]]:
        events = server.ask("events/filter", {"filter": {"event": {"prefix": ["gpt2."]}, "resource": {"id": [resource]}}})["events"]
        return {event["event"]: event["resource"] for event in events}

    of = {"gpt2.experiment": "quickstart", "gpt2.checkpoint": champion["name"]}
    until(lambda: set(told()) >= {"gpt2.champion.moved", "gpt2.checkpoint.rotten"}, 30, "both events")
    assert told()["gpt2.champion.moved"].items() >= of.items()
    assert told()["gpt2.checkpoint.rotten"].items() >= of.items()
    assert "up to date" in trained.run(*DVC, "status", "register@quickstart", "evaluate@quickstart").stdout
