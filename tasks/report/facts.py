"""What is known of a run, read from its folder. What is not there yet (scores, versions, benchmarks) is empty, and the page says so."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import yaml

from model.checkpoint.store import MANIFEST
from model.errors import UserError
from model.evaluation.score_store import stored_scores
from model.evaluation.scores import Scores
from model.flops import flops_per_token
from model.params import read_yaml, validated
from model.run_config import RunConfig
from model.run_folder import RunFolder
from model.training.journal import read_all
from tasks.overview import run_state
from tasks.project import Project, read_json
from tasks.report.costs import Costs, costs
from tasks.report.history import History, history

SHOWN_AT_ONCE = 6
"""Checkpoints whose texts stand side by side."""

Row = dict[str, Any]
Picked = TypeVar("Picked")


@dataclass(frozen=True)
class Facts:
    """Everything the page shows."""

    name: str
    state: str
    """`training`, `stopped`, `interrupted` or `finished`."""
    config: RunConfig
    config_text: str
    """`config.yaml` as it lies there."""
    data_files: list[Row]
    history: History
    costs: Costs
    checkpoints: list[Row]
    """Oldest first, by the keys of `scores.json`; of one that is not evaluated only name, step, digest and version."""
    marked_champion: Row | None
    """Name, digest and version of what the registry's alias marks; maybe none of `checkpoints`."""
    evaluation_set: str | None
    scores: dict[str, Scores]
    """By checkpoint digest: of those whose texts are shown."""
    benchmarks: list[Row]
    """What `tasks.benchmark_lm` found for checkpoints of this training."""
    overrides: dict[str, Any]
    tracking_run: str | None
    """MLflow's id; None if no checkpoint is registered."""

    @property
    def champion(self) -> Row | None:
        """The row of the checkpoint that the rule chose."""
        return next((row for row in self.checkpoints if row.get("champion")), None)

    @property
    def base(self) -> Row | None:
        """The row of what a post-training began with: its step 0; None of other trainings."""
        return next((row for row in self.checkpoints if row["step"] == 0), None) if self.config.post_training is not None else None

    @property
    def champion_scores(self) -> Scores | None:
        """Its figures item by item."""
        return self.scores.get(self.champion["digest"]) if self.champion else None

    @property
    def evaluated(self) -> list[Row]:
        """Those that have scores of today's kind."""
        return [row for row in self.checkpoints if row.get("answer_bits_per_byte") is not None]

    @property
    def tokens(self) -> int:
        """Trained on so far."""
        step = self.history.last("step")
        return int(step["tokens"]) if step else 0

    @property
    def step(self) -> int:
        """The newest."""
        step = self.history.last("step")
        return int(step["step"]) if step else 0

    @property
    def flops(self) -> float:
        """Spent on the tokens that count, by the convention of `model.flops`."""
        return flops_per_token(self.config.model, self.config.data.max_length) * self.tokens


def gather(project: Project, name: str) -> Facts:
    """Read a run.

    Raises:
        UserError: no such experiment, nothing of it was trained yet, or a file is damaged.
    """
    project.experiment(name)
    folder = project.run_folder(name)
    told = history(read_all(folder.journal))
    if told is None or not folder.config.exists():
        raise UserError(
            f"{name} has not begun to train, there is nothing to report yet; train it first: gpt2 {project.training_stage(name)} {name}"
        )
    config = validated(RunConfig, read_yaml(folder.config), f"{name}/{folder.config.name}")
    evaluated = read_json(folder.scores) or {}
    registered = read_json(folder.registered) or []
    checkpoints = _checkpoints(folder, told, evaluated.get("checkpoints", []), registered)
    shown = picked([row for row in checkpoints if row.get("key")], lambda row: bool(row.get("champion")) or row["step"] == 0)
    stored = {row["digest"]: stored_scores(folder.evaluation, row["key"]) for row in shown}
    return Facts(
        name=name,
        state=run_state(folder, told.events),
        config=config,
        config_text=folder.config.read_text(encoding="utf-8"),
        data_files=(read_json(folder.dataset) or {}).get("files", []),
        history=told,
        costs=costs(told),
        checkpoints=checkpoints,
        marked_champion=evaluated.get("champion"),
        evaluation_set=evaluated.get("evaluation_set"),
        scores={digest: scores for digest, scores in stored.items() if scores is not None},
        benchmarks=_benchmarks(folder, {row["digest"] for row in checkpoints} | {event.get("digest") for event in told.events}),
        overrides=project.overrides(name),
        tracking_run=next((entry["run_id"] for entry in reversed(registered) if entry.get("run_id")), None),
    )


def picked(rows: Sequence[Picked], wanted: Callable[[Picked], bool] = lambda row: False, at_most: int = SHOWN_AT_ONCE) -> list[Picked]:
    """At most so many of them, spread evenly from the first to the last, those that are wanted always among them."""
    if len(rows) <= at_most:
        return list(rows)
    chosen = {index for index, row in enumerate(rows) if wanted(row)}
    spread = [round(n * (len(rows) - 1) / (at_most - 1)) for n in range(at_most)]
    while len(spread) + len(chosen - set(spread)) > at_most and set(spread) - chosen:
        # Whoever is nearest to a wanted one makes room for it.
        spread.remove(min(set(spread) - chosen, key=lambda index: (min(abs(index - other) for other in chosen), -index)))
    return [rows[index] for index in sorted(chosen | set(spread))]


def train_command(name: str, overrides: dict[str, Any], stage: str = "train") -> str:
    """`gpt2 train NAME --set …` (or `gpt2 post-train`), as a shell takes it."""
    changes = [shlex.quote(f"{field}={_yaml(value)}") for field, value in _flat(overrides)]
    return " ".join([f"gpt2 {stage} {name}", *(f"--set {change}" for change in changes)])


def _checkpoints(folder: RunFolder, told: History, scored: list[Row], registered: list[Row]) -> list[Row]:
    """Those with scores, those that are registered, and those that lie there."""
    rows: dict[str, Row] = {}
    lying = (event for event in told.events if event["event"] == "checkpoint" and (folder.checkpoints / event["name"] / MANIFEST).exists())
    for row in (*scored, *registered, *lying):
        made = rows.setdefault(row["digest"], {key: row.get(key) for key in ("name", "step", "digest", "version")})
        if row in scored:
            made |= row
        if made.get("validation_loss") is None:
            made["validation_loss"] = told.validation_loss.get(row["step"])
    return sorted(rows.values(), key=lambda row: (row["step"], row["digest"]))


def _benchmarks(folder: RunFolder, digests: set[str | None]) -> list[Row]:
    """Those of a part of a task (`limit`) are for trying out, and no scores."""
    found = [read_json(path) for path in sorted((folder.path / "benchmarks").glob("step_*.json"))]
    return [result for result in found if not result.get("limit") and result["digest"] in digests]


def _flat(fields: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for key, value in fields.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return pairs


def _yaml(value: Any) -> str:
    """On one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True).removesuffix("\n...\n").strip()
