"""How a flow run ends that somebody else ended: a real training in a terminal, a real Prefect server."""

from __future__ import annotations

import pytest

from model.errors import EXIT_STOPPED
from tests.end_to_end.conftest import GPT2, Clone, clone, until_it_trains, until_left  # noqa: F401 (a fixture)
from tests.flows.prefect_server import PrefectServer

pytestmark = pytest.mark.slow


def test_a_training_that_was_taken_for_dead_lets_go_and_stays_crashed(clone: Clone, server: PrefectServer) -> None:  # noqa: F811
    """Were it Failed in the end, nobody would begin it again (flows/resume.py), and the cause would be lost."""
    clone.environment |= server.environment
    training = clone.start(*GPT2, "train", "samples2m")
    until_it_trains(clone, "samples2m")
    (run,) = server.ask("flow_runs/filter", {"flow_runs": {"name": {"like_": "samples2m"}, "state": {"type": {"any_": ["RUNNING"]}}}})
    crash = {"type": "CRASHED", "name": "Crashed", "message": "no sign of life"}
    assert server.ask(f"flow_runs/{run['id']}/set_state", {"state": crash})["status"] == "ACCEPT"
    until_left(clone)
    assert training.wait(60) == EXIT_STOPPED
    assert "Crashed in Prefect (no sign of life), all saved; the same command goes on" in clone.said_by(training)
    assert clone.journal("samples2m")[-1]["event"] == "stopped"
    state = server.ask(f"flow_runs/{run['id']}")["state"]
    assert (state["name"], state["message"]) == ("Crashed", "no sign of life")
