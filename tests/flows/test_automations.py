"""The automations at work, on a real Prefect server: who is found dead and who is not, and who is told."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.events import emit_event
from prefect.flows import Flow
from prefect.states import Cancelling, Running

from flows.automations import DEAD, FLOWS, crash_the_dead, ensure, watch
from tests.end_to_end.conftest import until
from tests.flows.prefect_server import PrefectServer

pytestmark = pytest.mark.slow

DEADLINE = timedelta(seconds=14)
SCRIPT = Path(__file__).with_name("tiny_flow.py")


def nothing() -> None: ...


class Runs:
    """Flow runs as processes of their own."""

    def __init__(self, server: PrefectServer) -> None:
        self._environment = server.environment | {"PYTHONPATH": os.pathsep.join(sys.path)}
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, *modes: str) -> list[subprocess.Popen[str]]:
        """All at once."""
        new = [
            subprocess.Popen(
                [sys.executable, str(SCRIPT), mode], env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            for mode in modes
        ]
        self.processes += new
        return new

    @staticmethod
    def id_of(process: subprocess.Popen[str]) -> str:
        """Of its flow run, which has begun."""
        assert process.stdout is not None
        return process.stdout.readline().strip()


@pytest.fixture
def runs(server: PrefectServer) -> Iterator[Runs]:
    runs = Runs(server)
    yield runs
    for process in runs.processes:
        process.kill()
        process.wait()


def test_an_automation_is_made_once_and_changed_only_if_it_is_another(client: SyncPrefectClient) -> None:
    rule = crash_the_dead(timedelta(seconds=100))
    assert [ensure(client, rule), ensure(client, rule)] == ["made", "as it was"]
    (there,) = client.read_automations_by_name(DEAD)
    client.pause_automation(there.id)
    assert ensure(client, rule) == "as it was"
    assert ensure(client, crash_the_dead(timedelta(seconds=200))) == "changed"
    (now,) = client.read_automations_by_name(DEAD)
    assert (now.id, now.enabled, now.trigger.within) == (there.id, False, timedelta(seconds=200)), "who switched it off had a reason"
    client.create_automation(rule)
    ensure(client, rule)
    assert len(client.read_automations_by_name(DEAD)) == 1


def test_who_is_dead_is_crashed_and_nobody_else(server: PrefectServer, client: SyncPrefectClient, runs: Runs) -> None:
    """One that is killed, one that had died before anybody watched, one that lives while the server is away for a while, one that
    completes, one that left its process because it was paused, one that is being cancelled, and one of a flow that is not ours."""
    assert ensure(client, crash_the_dead(DEADLINE)) == "made"
    old = {name: client.create_flow_run(Flow(nothing, name=name), state=Running()).id for name in (FLOWS[0], "somebody-elses")}
    cancelled = client.create_flow_run(Flow(nothing, name=FLOWS[0]), state=Running()).id
    assert watch(client) == 2
    client.set_flow_run_state(cancelled, Cancelling())
    stranger = {"prefect.resource.role": "flow", "prefect.resource.name": "somebody-elses", "prefect.resource.id": "prefect.flow.x"}
    emit_event("prefect.flow-run.heartbeat", {"prefect.resource.id": f"prefect.flow-run.{old['somebody-elses']}"}, related=[stranger])
    living, killed, done, left = runs.start("live", "live", "done", "paused")
    begun = {process: runs.id_of(process) for process in (living, killed, done, left)}
    done.wait()
    left.wait()
    time.sleep(2)
    killed.kill()
    killed_at = time.monotonic()
    server.away_for(5)
    until(lambda: server.state(begun[killed]) == "Crashed", 60, "the killed run is found dead")
    assert time.monotonic() - killed_at < DEADLINE.total_seconds() + 15
    until(lambda: server.state(str(old[FLOWS[0]])) == "Crashed", 15, "so is the one that had died before")
    time.sleep(6)  # the others' turn would have been
    assert "no sign of life for 14 s" in server.ask(f"flow_runs/{begun[killed]}")["state"]["message"]
    assert server.state(begun[living]) == "Running"
    assert server.state(begun[done]) == "Completed"
    assert server.state(begun[left]) == "Running", "as it was left; in the UI it would be Suspended"
    assert server.state(str(cancelled)) == "Cancelling"
    assert server.state(str(old["somebody-elses"])) == "Running"
