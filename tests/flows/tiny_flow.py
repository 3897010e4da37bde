"""A flow under the name of a real one, as a process of its own, for a test that kills or pauses it: `python tiny_flow.py live`."""

import sys
import time

from prefect import flow, runtime
from prefect.events import emit_event
from prefect.exceptions import Pause
from prefect.states import Paused

from flows.automations import tell_left


@flow(name="stream-and-train")
def tiny(mode: str) -> None:
    """`live` for ever, be `done` at once, `fail`, or leave `paused` without another state, as one that was paused in the UI does.

    To live is to have heartbeats more often than Prefect lets anybody ask for: 30 s would be a long time for a test.
    """
    print(runtime.flow_run.id, flush=True)
    if mode == "fail":
        raise ValueError("it broke on purpose")
    if mode == "paused":
        time.sleep(1)  # a server takes two events of the same millisecond in any order
        tell_left()
        raise Pause(state=Paused())
    while mode == "live":
        flow_of = {"prefect.resource.role": "flow", "prefect.resource.name": "stream-and-train", "prefect.resource.id": "prefect.flow.x"}
        emit_event("prefect.flow-run.heartbeat", {"prefect.resource.id": f"prefect.flow-run.{runtime.flow_run.id}"}, related=[flow_of])
        time.sleep(2)


if __name__ == "__main__":
    tiny(sys.argv[1])
