"""What became of an experiment between two looks: which checkpoints were registered and scored, and whether another is champion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from model.errors import UserError
from tasks.project import Project, read_json


@dataclass(frozen=True)
class Champion:
    """The version that the champion rule marks, as the last evaluation left it."""

    digest: str
    name: str
    """Of its checkpoint; `version 7` for one that is none of this run's."""
    reason: str
    """Why it is champion."""


@dataclass(frozen=True)
class Standing:
    """What is known of an experiment's checkpoints now."""

    registered: Mapping[str, str]
    """Names of the checkpoints that are registered, by digest."""
    scored: Mapping[str, str]
    """Names of the checkpoints that are scored, by evaluation key: one whose key changed counts as new."""
    champion: Champion | None
    damaged: bool = False
    """One of the files that say it cannot be read; its stage will write it anew."""


@dataclass(frozen=True)
class News:
    """The difference of two standings; names in their order."""

    registered: list[str]
    scored: list[str]
    before: Champion | None
    after: Champion | None
    champion_moved: bool
    """Whether another checkpoint is champion now; False if it is not known which one was."""


def standing(project: Project, name: str) -> Standing:
    """What `registered.json` and `scores.json` of the run say."""
    folder = project.run_folder(name)
    try:
        entries, scores = read_json(folder.registered) or [], read_json(folder.scores) or {}
    except UserError:
        return Standing({}, {}, None, damaged=True)
    registered = {entry["digest"]: entry["name"] for entry in entries}
    rows = scores.get("checkpoints", [])
    champion = scores.get("champion") or {}
    digest = champion.get("digest")
    reason = next((row["reason"] for row in rows if row["digest"] == digest), "chosen elsewhere")
    return Standing(
        registered,
        {row["key"]: row["name"] for row in rows if "key" in row},
        Champion(digest, champion.get("name") or f"version {champion.get('version')}", reason) if digest else None,
    )


def news(before: Standing, after: Standing) -> News:
    """What is new since `before`."""
    return News(
        [name for digest, name in after.registered.items() if digest not in before.registered],
        [name for key, name in after.scored.items() if key not in before.scored],
        before.champion,
        after.champion,
        after.champion is not None and not before.damaged and (before.champion is None or before.champion.digest != after.champion.digest),
    )
