"""Who is champion: the rule of model/evaluation/comparison.py, held against the registry as it stands, under a lock of our own.

The registry can set an alias and cannot compare before it does. So whoever wants to move one takes `tracking.alias_lock`, reads the alias,
judges against the version that it marks, and sets it; what takes long (scoring a champion that was not known here, putting the challenger's
weights into the registry) is done without the lock, and then the alias is read and judged anew. So a checkpoint that arrives late meets the
champion of that moment, whoever made it one and where.

What the lock does not keep out (another machine at an MLflow server) is found by reading the alias again after it was set, and is judged
again. Two of those within the same few milliseconds can still pass each other by: then the later one stands until the next evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from model.evaluation.comparison import Evidence, Verdict, challenge
from tasks import tracking
from tasks.tracking import BEST, CHAMPION, Version

if TYPE_CHECKING:
    from mlflow import MlflowClient

ROUNDS = 20
"""How often an alias may be moved by others under our hands before this is an error."""

Entry = Mapping[str, Any]
"""A checkpoint of `registered.json`: name, step, digest, version, …"""


class NotComparable(Exception):
    """Why a champion that this run does not know cannot be measured against ours; `replaceable`: it holds the alias no longer."""

    def __init__(self, why: str, replaceable: bool) -> None:
        super().__init__(why)
        self.replaceable = replaceable


def crown(
    client: MlflowClient,
    lock: FileLock,
    name: str,
    entries: Sequence[Entry],
    evidence: dict[str, Evidence],
    unknown: Callable[[Version], Evidence],
    materialise: Callable[[Entry], None],
) -> tuple[Version | None, dict[str, Verdict]]:
    """Let every checkpoint challenge the champion in turn. Returns the version that the alias marks now, and the verdicts by digest.

    Args:
        client: of the registry.
        lock: `tracking.alias_lock`.
        name: of the registered model.
        entries: the checkpoints, in their order.
        evidence: theirs, by digest; a champion from elsewhere is added.
        unknown: the evidence of a champion that is none of `entries`; raises NotComparable.
        materialise: puts a winner's weights into the registry.

    Raises:
        RuntimeError: others go on moving the alias without our lock.
    """
    strangers: dict[str, NotComparable] = {}
    ready: set[str] = set()
    for _ in range(ROUNDS):
        with lock:
            standing = tracking.version_with(client, name, CHAMPION)
            stranger = strangers.get(standing.version) if standing else None
            if standing is None or standing.digest in evidence or stranger is not None or not entries:
                winner, verdicts = compete(entries, evidence, standing, stranger)
                if winner is None:
                    return standing, verdicts
                if winner["digest"] in ready:
                    client.set_registered_model_alias(name, CHAMPION, winner["version"])
                    now = tracking.version_with(client, name, CHAMPION)
                    if now is not None and now.version == winner["version"]:
                        return now, verdicts
                    continue
            else:
                winner = None
        if winner is not None:
            materialise(winner)
            ready.add(winner["digest"])
        elif standing is not None:
            try:
                evidence[str(standing.digest)] = unknown(standing)
            except NotComparable as why:
                strangers[standing.version] = why
    raise RuntimeError(f"the alias {CHAMPION} of {name} is moved by others all the time; no checkpoint was made champion")


def compete(
    entries: Sequence[Entry], evidence: Mapping[str, Evidence], standing: Version | None, stranger: NotComparable | None = None
) -> tuple[Entry | None, dict[str, Verdict]]:
    """Who takes the alias from `standing` (None: nobody does), and the verdict on each of the entries by digest.

    `stranger`: why `standing` is not among the evidence.
    """
    incumbent = standing.digest if standing else None
    challengers = sum(entry["digest"] != incumbent for entry in entries) - (standing is None)
    verdicts: dict[str, Verdict] = {}
    winner: Entry | None = None
    for entry in entries:
        digest = entry["digest"]
        if standing is not None and digest == incumbent:
            verdicts[digest] = Verdict(True, standing.tags.get(REASON_TAG, "the champion before this evaluation"))
        elif winner is None and standing is not None and stranger is not None:
            verdicts[digest] = _against_a_stranger(standing, stranger)
        elif winner is None and standing is None:
            verdicts[digest] = Verdict(True, "takes over: the first to be evaluated")
        else:
            champion = winner["digest"] if winner is not None else str(incumbent)
            verdicts[digest] = challenge(evidence[digest], evidence[champion], challengers)
        if verdicts[digest].promoted and digest != incumbent:
            winner = entry
    for digest, verdict in verdicts.items():
        if verdict.promoted and winner is not None and digest != winner["digest"]:
            verdicts[digest] = Verdict(False, f"beaten by {winner['name']}; before: {verdict.reason}")
    return winner, verdicts


REASON_TAG = "champion.reason"
"""The tag of a version that says why it is champion, or not."""


def _against_a_stranger(standing: Version, why: NotComparable) -> Verdict:
    if why.replaceable:
        return Verdict(True, f"takes over: the champion before, version {standing.version}, {why}")
    cure = f"to choose a champion anew, remove the alias {CHAMPION} in MLflow"
    return Verdict(False, f"stays: the champion, version {standing.version}, cannot be compared with: {why}; {cure}")


def mark_best(client: MlflowClient, lock: FileLock, name: str, entries: Sequence[Entry], losses: Mapping[int, float]) -> Entry | None:
    """Let the alias `best` mark the checkpoint with the lowest loss (the earliest of equal ones); returns it, None if none has a loss.

    `losses`: on the run's validation windows, by step. No rule and no interval: a figure for those who want that one.
    """
    best = min((entry for entry in entries if entry["step"] in losses), key=lambda entry: losses[entry["step"]], default=None)
    if best is not None:
        with lock:
            standing = tracking.version_with(client, name, BEST)
            if standing is None or standing.version != best["version"]:
                client.set_registered_model_alias(name, BEST, best["version"])
    return best
