"""How a flow run ends: in bounded time, whether or not Prefect's server takes the news, and as its user asked for in Prefect's UI.

Prefect's server may go while a flow runs: no stage waits for it. Only at its end does a flow need the server, and it waits for that so long
as is said here.
"""

import contextlib
import contextvars
import functools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec
from uuid import UUID

from prefect import State, runtime
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import Abort, Pause
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelled

from flows.automations import tell_left
from flows.stop import STOP
from model.errors import EXIT_FAULT, EXIT_STOPPED, EXIT_USER, Stopped, UserError

SECONDS_TO_REPORT = 30.0
"""How long a flow in a terminal waits at its end for a Prefect server that is gone: a restart takes 10 to 30 s."""

SECONDS_TO_REPORT_UNDER_A_WORKER = 600.0

SECONDS_BETWEEN_LOOKS = 3.0

P = ParamSpec("P")


def ends_by_itself(flow: Callable[P, State[Any]], may_pause: bool = True) -> Callable[P, State[Any]]:
    """For the function of a flow: a pause or a cancellation in Prefect's UI stops it resumably, and once it is over, the process ends in
    bounded time. Where it may not pause, a pause is a cancellation.

    Left alone, Prefect's engine tries for minutes to reach a server that is gone, calls a run that went well crashed, prints tracebacks,
    and does not leave while its queues hold anything.
    """

    @functools.wraps(flow)
    def run(*arguments: P.args, **options: P.kwargs) -> State[Any]:
        if not under_a_worker():  # which keeps the complaints about an outage in its log; in a terminal they are noise
            logging.raiseExceptions = False
            logging.getLogger("prefect._internal.concurrency").disabled = True
        with _obeying() as asked:
            try:
                state = flow(*arguments, **options)
            except Pause:  # of Prefect's own, between two tasks
                if may_pause:
                    tell_left()
                else:
                    _cancel(_stopped_by("paused"))
                raise
            except Exception as error:
                found = _as_asked(asked, may_pause) if isinstance(error, Stopped) else None
                if found is None:
                    code = EXIT_USER if isinstance(error, UserError) else EXIT_STOPPED if isinstance(error, Stopped) else EXIT_FAULT
                    _leave_unless_reported(code, f"error: {error}")
                    raise
                state = found
            else:
                if not state.is_completed():
                    state = _as_asked(asked, may_pause) or state
        if state.is_completed():
            _leave_unless_reported(0, state.message or "")
        else:
            stopped = state.is_cancelled() or state.is_crashed()
            _leave_unless_reported(EXIT_STOPPED if stopped else EXIT_FAULT, f"error: {state.message}")
        return state

    return run


def under_a_worker() -> bool:
    """Whether a worker started this process for one flow run."""
    return "PREFECT__FLOW_RUN_ID" in os.environ


@contextlib.contextmanager
def _obeying() -> Iterator[list[State[Any]]]:
    """Meanwhile, look now and then at the flow run's own state in Prefect, and stop resumably if somebody paused it, cancelled it, or took
    it for dead: its successor waits. Yields a list, into which that state is put."""
    asked: list[State[Any]] = []
    context = FlowRunContext.get()
    flow_run = context.flow_run if context else None
    done = threading.Event()

    def look() -> None:
        while flow_run is not None and not done.wait(SECONDS_BETWEEN_LOOKS):
            with contextlib.suppress(Exception), get_client(sync_client=True) as client:  # a server that is away asks for nothing
                state = client.read_flow_run(flow_run.id).state
                if state is not None and (state.is_paused() or state.is_cancelling() or state.is_final()):
                    asked.append(state)
                    STOP.set()
                    return

    thread = threading.Thread(target=contextvars.copy_context().run, args=(look,), name="obeying", daemon=True)
    thread.start()
    try:
        yield asked
    finally:
        done.set()


def _as_asked(asked: list[State[Any]], may_pause: bool) -> State[Any] | None:
    """The state in which a run ends that was stopped as its user asked in Prefect; None if nobody did.

    Raises:
        Abort: it is over in Prefect, as one that was taken for dead is, and stays so: another state would hide the cause, and from a
            crash to begin again from.
        Pause: a deployed run leaves without a new state: it is paused, and to resume it in the UI starts it again.
    """
    if not asked:
        return None
    if asked[0].is_final():
        raise Abort(f"{asked[0].name} in Prefect ({asked[0].message}), all saved; the same command goes on")
    if asked[0].is_paused() and may_pause and under_a_worker():
        tell_left()
        raise Pause(state=asked[0])
    end = _stopped_by("paused" if asked[0].is_paused() else "cancelled")
    if asked[0].is_paused():
        _cancel(end)
    return end


def _stopped_by(what: str) -> State[Any]:
    return Cancelled(message=f"{what} in Prefect, all saved; the same command goes on")


def _cancel(end: State[Any]) -> None:
    """Prefect's engine leaves a paused run paused, whatever its function returns."""
    flow_run_id = runtime.flow_run.id
    if flow_run_id is not None:
        with contextlib.suppress(Exception), get_client(sync_client=True) as client:
            client.set_flow_run_state(UUID(flow_run_id), end, force=True)


def _leave_unless_reported(code: int, outcome: str) -> None:
    """From now on the engine reports to Prefect how the flow ended. If it cannot, say so and leave with the flow's own exit code."""
    context = FlowRunContext.get()
    flow_run = context.flow_run if context else None
    if flow_run is None:
        return
    patience = SECONDS_TO_REPORT_UNDER_A_WORKER if under_a_worker() else SECONDS_TO_REPORT
    server = PREFECT_API_URL.value()

    def watch() -> None:
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            if flow_run.state is not None and flow_run.state.is_final():
                return
            time.sleep(0.2)
        if sys.stdout.isatty():
            print("\x1b[?25h", end="", flush=True)  # the cursor, which the progress bar hides
        print(" ".join(outcome.split()), file=sys.stderr)
        print(f"warning: Prefect at {server} is gone: its page of this run stays as it is; nothing else is missing", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_FAULT if under_a_worker() else code)  # a worker has to notice

    threading.Thread(target=watch, name="ending", daemon=True).start()
