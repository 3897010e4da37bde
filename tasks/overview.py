"""What there is to see of a run without asking any server: its checkpoints, and how far it got."""

from __future__ import annotations

from typing import Any

import psutil

from model.checkpoint.store import CheckpointStore, NotWhole, open_checkpoint, step_of
from model.evaluation.score_store import stored_scores
from model.params import read_yaml, validated
from model.run_config import RunConfig
from model.run_folder import RunFolder
from model.training.identity import code_identity
from model.training.journal import Event, read_current
from tasks import versioning
from tasks.compare import figures
from tasks.project import Project, read_json

Row = dict[str, Any]

SCORES = (
    *("validation_loss", "text_bits_per_byte", "answer_bits_per_byte", "answer_alone_bits_per_byte"),
    *("distractor_accuracy", "distractor_rank", "format_adherence", "exact_match", "token_f1"),
    *("questions", "checkable", "items", "intervals", "reason"),
)
"""What `scores.json` says of a checkpoint that the list of checkpoints repeats."""


def checkpoint_list(project: Project, name: str, verify: bool = False) -> list[Row]:
    """The run's checkpoints, oldest first: name, step, digest, model_sha256, whole, champion, best, version, base, and SCORES if it is
    evaluated.

    `whole` means that all files are there in their sizes; with `verify` every byte is read. A digest is None where no manifest can be read,
    version is None where a checkpoint is not registered, a score is None where it is not evaluated. `base` marks what a post-training began
    with.
    """
    folder = project.run_folder(name)
    versions = {entry["digest"]: entry["version"] for entry in read_json(folder.registered) or []}
    scores = read_json(folder.scores) or {}
    marked = {alias: (scores.get(alias) or {}).get("digest") for alias in ("champion", "best")}
    scored = {entry["digest"]: entry for entry in scores.get("checkpoints", [])}
    rows, post_training = [], project.is_post_training(name)
    for path in CheckpointStore(folder.checkpoints).folders():
        row: Row = {"name": path.name, "step": step_of(path.name), "digest": None, "model_sha256": None, "whole": False}
        try:
            checkpoint = open_checkpoint(path)
            row |= {"digest": checkpoint.digest, "model_sha256": checkpoint.model_sha256}
            if verify:
                checkpoint.verify()
            row["whole"] = True
        except NotWhole as error:
            row["problem"] = str(error)
        digest = row["digest"]
        row |= {alias: digest is not None and digest == marks for alias, marks in marked.items()}
        row["version"] = versions.get(digest)
        row["base"] = post_training and row["step"] == 0
        row |= {score: scored.get(digest, {}).get(score) for score in SCORES}
        rows.append(row)
    return rows


def steps_to_go(project: Project, name: str) -> tuple[int, int] | None:
    """The step that training goes on from, and its last one; None before the config is built."""
    folder = project.run_folder(name)
    if not folder.config.exists():
        return None
    total = validated(RunConfig, read_yaml(folder.config), folder.config.name).total_steps
    return max((step_of(path.name) for path in CheckpointStore(folder.checkpoints).folders()), default=0), total


def gain_line(project: Project, name: str) -> str | None:
    """What a post-training's champion has over its base, in a line; None of other trainings, and where the two are not scored."""
    folder = project.run_folder(name)
    rows = (read_json(folder.scores) or {}).get("checkpoints", [])
    base = next((row for row in rows if row["step"] == 0), None)
    champion = next((row for row in rows if row["champion"]), None)
    if not project.is_post_training(name) or base is None or champion is None:
        return None
    if champion is base:
        return "what it began with is still the champion: nothing that was learned since is better by the rule"
    scores = [stored_scores(folder.evaluation, row["key"]) for row in (base, champion)]
    if scores[0] is None or scores[1] is None:
        return None
    found = {figure.key: figure for figure in figures(scores[0], scores[1])}
    told = []
    for key, what, scale, digits, unit in (("answer_bits_per_byte", "answer", 1, 3, ""), ("exact_match", "exact", 100, 0, " points")):
        figure = found.get(key)
        if figure is not None and figure.difference is not None:
            low, high = (f"{scale * end:+.{digits}f}" if end is not None else "?" for end in (figure.low, figure.high))
            told.append(f"{what} {scale * figure.difference:+.{digits}f}{unit} (95 % interval {low} to {high})")
    return f"against its base, on the same items: {'; '.join(told)}" if told else None


def champion_line(project: Project, name: str) -> str | None:
    """Which checkpoint is champion and why, in a line; None if none is, or nothing was evaluated."""
    scores = read_json(project.run_folder(name).scores) or {}
    champion = scores.get("champion")
    if not champion:
        return None
    row = next((row for row in scores.get("checkpoints", []) if row["digest"] == champion["digest"]), None)
    if row is not None:
        return f"champion: {row['name']} {row['reason']}"
    which = f"version {champion.get('version')}{', ' + champion['name'] if champion.get('name') else ''}"
    stays = next((row["reason"] for row in reversed(scores.get("checkpoints", []))), "")
    return f"champion: {which}, not a checkpoint of this folder; {stays}"


def example_question(project: Project, name: str) -> str:
    """A held-out question that the champion answered right; a plain one if there is none."""
    scores = read_json(project.run_folder(name).scores) or {}
    return scores.get("example") or "Q: What is 12 + 30?"


def run_status(project: Project, name: str) -> Row:
    """How far a run is: experiment, config_digest, state, step, tokens, and each stage as DVC sees it.

    state is `not started`, `training`, `stopped` (on request), `interrupted` (by a fault) or `finished`.

    Raises:
        UserError: no such experiment.
    """
    project.experiment(name)
    folder = project.run_folder(name)
    events = read_current(folder.journal)
    steps = [event for event in events if event["event"] in ("step", "finished")]
    return {
        "experiment": name,
        "config_digest": validated(RunConfig, read_yaml(folder.config), folder.config.name).digest if folder.config.exists() else None,
        "state": run_state(folder, events),
        "step": steps[-1]["step"] if steps else 0,
        "tokens": steps[-1]["tokens"] if steps else 0,
        "stages": versioning.stage_states(project, name),
    }


def code_differs(project: Project, name: str) -> bool:
    """Whether the code is another one than the run was last trained with. Code is no part of a run's identity, but good to know of."""
    started = [event for event in read_current(project.run_folder(name).journal) if event["event"] == "started"]
    return bool(started) and started[-1]["code"] != code_identity()


def run_state(folder: RunFolder, events: list[Event]) -> str:
    """`not started`, `training`, `stopped` (on request), `interrupted` (by a fault) or `finished`, by the events of this training."""
    trainer = read_json(folder.lock.with_suffix(".json"))
    if trainer and psutil.pid_exists(trainer["pid"]):
        return "training"
    if not events:
        return "not started"
    last = next(event["event"] for event in reversed(events) if event["event"] not in ("warning", "sample"))
    return last if last in ("stopped", "finished") else "interrupted"
