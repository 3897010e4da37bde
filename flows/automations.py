"""The automations that `gpt2 deploy` makes on a Prefect server, and the events that they wait for."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from prefect.automations import AutomationCore, ChangeFlowRunState, EventTrigger, Posture, SendNotification
from prefect.client.schemas.filters import FlowFilter, FlowFilterName, FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import StateType
from prefect.context import FlowRunContext
from prefect.events import Event, RelatedResource, emit_event
from prefect.events.schemas.events import Resource

from tasks.news import News, Standing, news, standing
from tasks.project import Project
from tasks.recheck import Rotten

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient

FLOWS = ("train-gpt2", "post-train", "stream-and-train", "re-evaluate", "evaluate-new", "resume")
"""The flows of this project: of other flows on the same server nothing is said, and none is touched."""

DEADLINE = timedelta(seconds=300)
"""So long without a heartbeat, and a flow run is crashed. Deployments have one every 30 s: a server that was away for less than this less
one heartbeat crashes nobody."""

CHAMPION_MOVED = "gpt2.champion.moved"
ROTTEN = "gpt2.checkpoint.rotten"
LEFT = "gpt2.flow-run.left"
"""A paused run has ended its process: no heartbeat is to be waited for, although some came after the pause."""
WATCHED = "gpt2.flow-run.watched"
"""From now on a run is waited for as if it had just had a heartbeat."""

DEAD = "gpt2: a run without a sign of life is crashed"
FAILED = "gpt2: tell when a run failed or crashed"
NEW_CHAMPION = "gpt2: tell of a new champion"
ROT = "gpt2: tell of a rotten checkpoint"

_ENDS = ("Completed", "Failed", "TimedOut", "Crashed", "Cancelled", "Paused", "Suspended")
_OF_OURS: dict[str, str | list[str]] = {"prefect.resource.role": "flow", "prefect.resource.name": list(FLOWS)}


def crash_the_dead(deadline: timedelta = DEADLINE) -> AutomationCore:
    """A flow run of ours of which nothing was heard for `deadline` (10 s at least) after a heartbeat is crashed. One that never had a
    heartbeat is not looked at (`watch` does). One that is over or being cancelled stays so: Prefect's server refuses to crash it."""
    return AutomationCore(
        name=DEAD,
        description="Its worker or its machine is gone. The deployment resume/crashed begins it again.",
        trigger=EventTrigger(
            after={"prefect.flow-run.heartbeat", WATCHED},
            expect={"prefect.flow-run.heartbeat", LEFT, *(f"prefect.flow-run.{state}" for state in _ENDS)},
            match={"prefect.resource.id": "prefect.flow-run.*"},
            match_related=_OF_OURS,
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=deadline,
        ),
        actions=[
            ChangeFlowRunState(
                name=None,
                force=False,
                state=StateType.CRASHED,
                message=f"no sign of life for {deadline.total_seconds():.0f} s: its worker or its machine is gone",
            )
        ],
    )


def alerts(block: UUID) -> list[AutomationCore]:
    """What is told to a notification block (the id of its document): failures and crashes, new champions, rot."""
    return [
        _alert(
            FAILED,
            EventTrigger(
                expect={"prefect.flow-run.*"},
                match={"prefect.resource.id": "prefect.flow-run.*", "prefect.state-type": ["FAILED", "CRASHED"]},
                match_related=_OF_OURS,
                posture=Posture.Reactive,
                threshold=1,
            ),
            block,
            "{{ flow.name }} {{ flow_run.name }}: {{ flow_run.state.name }}",
            "{{ flow_run.state.message }}\n{{ flow_run|ui_url or '' }}",
        ),
        _alert(
            NEW_CHAMPION,
            _on(CHAMPION_MOVED),
            block,
            "{{ event.resource['gpt2.experiment'] }}: {{ event.resource['gpt2.checkpoint'] }} is champion",
            "{{ event.payload['reason'] }}\nbefore: {{ event.payload['before'] or 'none' }}",
        ),
        _alert(
            ROT,
            _on(ROTTEN),
            block,
            "{{ event.resource['gpt2.experiment'] }}: {{ event.resource['gpt2.checkpoint'] }} is rotten in {{ event.payload['place'] }}",
            "{{ event.payload['problem'] }}\n{{ event.payload['cure'] }}",
        ),
    ]


def _on(event: str) -> EventTrigger:
    return EventTrigger(expect={event}, match={"prefect.resource.id": "gpt2.checkpoint.*"}, posture=Posture.Reactive, threshold=1)


def _alert(name: str, trigger: EventTrigger, block: UUID, subject: str, body: str) -> AutomationCore:
    return AutomationCore(name=name, trigger=trigger, actions=[SendNotification(block_document_id=block, subject=subject, body=body)])


def ensure(client: SyncPrefectClient, wanted: AutomationCore) -> Literal["made", "changed", "as it was"]:
    """Let there be one automation of this name, and let it be `wanted`; one that somebody switched off stays off.

    One that is right is left alone: Prefect gives the trigger of an updated automation a new id, and forgets what the old one waited for.
    """
    found = client.read_automations_by_name(wanted.name)
    if not found:
        client.create_automation(_complete(wanted))
        return "made"
    there, *others = found
    for other in others:  # of two who deployed at once
        client.delete_automation(other.id)
    if _essence(there) == _essence(wanted):
        return "as it was"
    client.update_automation(there.id, _complete(wanted.model_copy(update={"enabled": there.enabled})))
    return "changed"


def watch(client: SyncPrefectClient) -> int:
    """Wait for a sign of life of every run of ours that is said to be running, from now on; returns how many there are.

    For a server that was away for long: it forgets whom it waited for (PREFECT_SERVER_EVENTS_EXPIRED_BUCKET_BUFFER, a minute after the
    deadline), and a run that died with it would stay Running for ever.
    """
    running = client.read_flow_runs(
        flow_filter=FlowFilter(name=FlowFilterName(any_=list(FLOWS))),
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING]))),
        limit=200,
    )
    names = {flow.id: flow.name for flow in client.read_flows(flow_filter=FlowFilter(name=FlowFilterName(any_=list(FLOWS))))}
    events = [
        Event(
            event=WATCHED,
            resource=Resource({"prefect.resource.id": f"prefect.flow-run.{run.id}", "prefect.resource.name": run.name}),
            related=[_flow(run.flow_id, names[run.flow_id])],
        )
        for run in running
    ]
    if events:
        client.request("POST", "/events", json=[event.model_dump(mode="json") for event in events]).raise_for_status()
    return len(events)


def _flow(flow_id: UUID, name: str) -> RelatedResource:
    return RelatedResource(
        {"prefect.resource.id": f"prefect.flow.{flow_id}", "prefect.resource.role": "flow", "prefect.resource.name": name}
    )


def _complete(automation: AutomationCore) -> AutomationCore:
    """With every default spelt out: Prefect's client sends only what was set."""
    return AutomationCore(**automation.model_dump(exclude={"owner_resource"}))


def _essence(automation: AutomationCore) -> dict[str, Any]:
    return AutomationCore(**automation.model_dump()).model_dump(include={"name", "description", "trigger", "actions"})


def tell_champion(project: Project, experiment: str, before: Standing) -> News:
    """Emit `gpt2.champion.moved` if another checkpoint is champion than `before` (`tasks.news.standing` when the flow began). Returns all
    that is new since then.
    """
    new = news(before, standing(project, experiment))
    if new.champion_moved and new.after is not None:
        payload = {"before": new.before.name if new.before else None, "reason": new.after.reason}
        emit_event(CHAMPION_MOVED, resource=_checkpoint(experiment, new.after.name, new.after.digest), payload=payload)
    return new


def tell_rotten(experiment: str, found: Rotten) -> None:
    """Emit `gpt2.checkpoint.rotten`."""
    payload = {"place": found.place, "problem": found.problem, "cure": found.cure}
    emit_event(ROTTEN, resource=_checkpoint(experiment, found.checkpoint, found.digest), payload=payload)


def tell_left() -> None:
    """Emit `gpt2.flow-run.left`: the last thing that a paused flow run does in its process, or it would be crashed for its silence."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return
    resource = {"prefect.resource.id": f"prefect.flow-run.{context.flow_run.id}", "prefect.resource.name": context.flow_run.name}
    emit_event(LEFT, resource=resource, related=[_flow(context.flow_run.flow_id, context.flow.name if context.flow else "")])


def _checkpoint(experiment: str, name: str, digest: str | None) -> dict[str, str]:
    return {
        "prefect.resource.id": f"gpt2.checkpoint.{digest or f'{experiment}.{name}'}",
        "prefect.resource.name": f"{experiment} {name}",
        "gpt2.experiment": experiment,
        "gpt2.checkpoint": name,
    }
