"""evaluate-each-checkpoint: score every registered checkpoint on the same held-out items, once, and apply the champion rule.

`python -m tasks.evaluate_each_checkpoint EXPERIMENT`. A checkpoint that cannot be scored keeps none of the others back; the stage ends with
it as its failure, so that it is tried again.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout

from model import disk
from model.checkpoint.store import Checkpoint, NotWhole, open_checkpoint
from model.config import EvaluationConfig, HardwareConfig
from model.device import pick_device
from model.errors import UserError
from model.evaluation.comparison import Evidence, Verdict
from model.evaluation.score_store import score_each, stored_scores
from model.evaluation.scores import Scores
from model.evaluation.scoring import EVALUATION_VERSION, EvaluationSet, evaluation_set, score
from model.params import read_yaml, validated
from model.run_config import RunConfig
from model.run_folder import RunFolder
from model.training.journal import read_current
from model.training.lock import gpus_in_use
from model.training.run import read_run
from tasks import champion, tracking
from tasks.champion import REASON_TAG, NotComparable
from tasks.project import Project, read_json
from tasks.served_model import complaint_about
from tasks.starting_point import find_by_digest
from tasks.steps import run_step
from tasks.tracking import IDENTITY_TAG, Version

if TYPE_CHECKING:
    from mlflow import MlflowClient

FIGURES = (
    "text_bits_per_byte",
    "answer_bits_per_byte",
    "answer_alone_bits_per_byte",
    "distractor_accuracy",
    "distractor_rank",
    "format_adherence",
    "exact_match",
    "token_f1",
    "questions",
    "checkable",
    "items",
)
"""What `scores.json` says of a checkpoint; null where a set has nothing to tell it by."""
VERSION_FIGURES = ("text_bits_per_byte", "answer_bits_per_byte", "exact_match", "format_adherence")
"""Of these, tags of the version; the LoggedModel has all."""
ITEM_COLUMNS = (
    *("half", "id", "article", "exercise"),
    *("text_bits", "text_bytes", "answer_bits", "answer_alone_bits", "answer_bytes"),
    *("distractor_rank", "well_formed", "exact_match", "token_f1"),
)
"""The table of all items in MLflow: figures, no texts."""
KEY_TAG = "evaluation_key"
"""The tag of a version that says which of its scores MLflow has; set when all of them are there."""


class NotScored(RuntimeError):
    """Checkpoints that could not be scored, and why; the others are."""


@dataclass(frozen=True)
class Result:
    """What this stage keeps in memory of a checkpoint's scores."""

    key: str
    summary: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    evidence: Evidence
    example: str | None
    """A held-out question that was answered right, for people to try."""

    @classmethod
    def of(cls, key: str, scores: Scores) -> Result:
        """From all of them."""
        right = [item["question"] for item in scores.items if item["exact_match"]]
        return cls(key, scores.summary, scores.intervals, Evidence.of(scores), right[0].partition("\n")[0] if right else None)


Score = Callable[[Checkpoint, EvaluationSet, torch.device], Scores]


def evaluate_each_checkpoint(project: Project, name: str, score: Score = score) -> None:
    """Score what has no score yet, oldest first; apply the champion rule; write `scores.json`, tell MLflow.

    Raises:
        NotScored: some could not be; all else is done.
    """
    lock = FileLock(project.run_folder(name).path / ".evaluate.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:  # one evaluates while training goes on (tasks/beside.py)
        print(f"waiting for another evaluation of {name}", flush=True)
        lock.acquire()
    try:
        _evaluate(_Stage.of(project, name, score), project, name)
    finally:
        lock.release()


def _evaluate(stage: _Stage, project: Project, name: str) -> None:
    registered = read_json(stage.folder.registered) or []
    results, failures = _score_all(stage, registered)
    entries = [entry for entry in registered if entry["digest"] in results]
    client = tracking.connect(project, project.experiment(name))
    lock = tracking.alias_lock(project, project.experiment(name), name)
    crowned, verdicts = champion.crown(
        client,
        lock,
        name,
        entries,
        evidence={digest: result.evidence for digest, result in results.items()},
        unknown=lambda version: _champion_from_elsewhere(stage, client, version),
        materialise=lambda entry: tracking.materialise(client, entry["model_id"], stage.folder.checkpoints / entry["name"]),
    )
    losses = _validation_losses(stage.folder)
    best = champion.mark_best(client, lock, name, entries, losses)
    rows = [_row(entry, results[entry["digest"]], verdicts[entry["digest"]], crowned, best, losses) for entry in entries]
    _log(client, name, stage, entries, rows)
    summary = {
        "champion": crowned and _named(crowned),
        "best": best and {key: best[key] for key in ("name", "digest", "version")},
        "evaluation_set": stage.items.digest,
        "evaluation_version": EVALUATION_VERSION,
        "example": results[str(crowned.digest)].example if crowned and crowned.digest in results else None,
        "data_identity": stage.config.data_identity,
        "checkpoints": rows,
    }
    tracking.note_aliases(client, stage.folder)
    disk.write_file(stage.folder.scores, (json.dumps(summary, indent=1) + "\n").encode())
    if failures:
        raise NotScored(_told(failures)) from next(iter(failures.values()))


def _device(hardware: HardwareConfig) -> torch.device:
    """Where to score: as `hardware.evaluation_device` says."""
    if hardware.evaluation_device != "auto":
        return pick_device(hardware.evaluation_device)
    try:
        device = pick_device(hardware.device)
    except UserError:  # this machine lacks what training needs
        return pick_device("cpu")
    return pick_device("cpu") if device.type == "cuda" and gpus_in_use() else device


@dataclass(frozen=True)
class _Stage:
    """What is scored on what, and with what."""

    project: Project
    folder: RunFolder
    config: RunConfig
    items: EvaluationSet
    device: torch.device
    score: Score = field(compare=False)

    @classmethod
    def of(cls, project: Project, name: str, score: Score) -> _Stage:
        folder = project.run_folder(name)
        config, manifest = read_run(folder)
        settings = validated(EvaluationConfig, read_yaml(folder.evaluation_config), folder.evaluation_config.name)
        device = _device(project.experiment(name).hardware)
        return cls(project, folder, config, evaluation_set(config, manifest, settings), device, score)

    def verified_score(self, checkpoint: Checkpoint) -> Scores:
        checkpoint.verify()
        return self.score(checkpoint, self.items, self.device)


def _score_all(stage: _Stage, registered: list[dict[str, Any]]) -> tuple[dict[str, Result], dict[str, Exception]]:
    """Results by digest, failures by the checkpoint's name."""
    opened: dict[str, Checkpoint] = {}
    failures: dict[str, Exception] = {}
    for entry in registered:
        try:
            checkpoint = open_checkpoint(stage.folder.checkpoints / entry["name"])
            if checkpoint.digest != entry["digest"]:
                raise NotWhole(f"{entry['name']} is not the one that was registered; register it: dvc repro register")
            opened[entry["digest"]] = checkpoint
        except NotWhole as error:
            failures[entry["name"]] = error
    checkpoints = list(opened.values())
    keys = [stage.items.key(checkpoint) for checkpoint in checkpoints]
    results = {}
    for index, scored in score_each(stage.folder.evaluation, keys, lambda index: stage.verified_score(checkpoints[index])):
        checkpoint = checkpoints[index]
        if isinstance(scored, Exception):
            failures[checkpoint.name] = scored
            print(f"{checkpoint.name}  not scored: {scored}", flush=True)
        else:
            results[checkpoint.digest] = Result.of(keys[index], scored)
            print(f"{checkpoint.name}  {_figures(scored)}", flush=True)
    return results, failures


def _told(failures: Mapping[str, Exception]) -> str:
    """Each reason once, after the checkpoints that it holds for."""
    by_reason: dict[str, list[str]] = {}
    for name, error in failures.items():
        by_reason.setdefault(str(error) or type(error).__name__, []).append(name)
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in by_reason.items())


def _champion_from_elsewhere(stage: _Stage, client: MlflowClient, version: Version) -> Evidence:
    """The evidence of a champion that is not among this run's checkpoints: of another clone, of a later step, set aside, or tidied away.

    Raises:
        NotComparable: its data are others, or its weights are not to be had.
    """
    if version.digest is None:
        raise NotComparable("it is no checkpoint of this project", replaceable=False)
    _refuse_other_data(stage, version.tags.get(IDENTITY_TAG))
    with tempfile.TemporaryDirectory(dir=stage.project.scratch_folder()) as scratch:
        place = find_by_digest(stage.project, version.digest)
        if place is None or complaint_about(place, version.digest):
            place = Path(scratch) / version.tags.get("checkpoint", "checkpoint")
        checkpoint = Checkpoint(place, version.digest, version.tags.get("model_sha256", ""))
        key = stage.items.key(checkpoint)
        scores = stored_scores(stage.folder.evaluation, key)
        if scores is None or IDENTITY_TAG not in version.tags:
            try:
                if not place.exists():
                    tracking.fetch_materialised(client, version, place)
                _refuse_other_data(stage, RunConfig.model_validate(checkpoint.state()["config"]).data_identity)
            except (NotWhole, KeyError, ValueError) as error:
                raise NotComparable(str(error), replaceable=False) from None
            (_, found), *_ = score_each(stage.folder.evaluation, [key], lambda _: stage.score(checkpoint, stage.items, stage.device))
            if isinstance(found, Exception):
                raise NotComparable(f"scoring it failed: {found}", replaceable=False)
            scores = found
            print(f"version {version.version}, champion from elsewhere  {_figures(scores)}", flush=True)
        return Evidence.of(scores)


def _refuse_other_data(stage: _Stage, identity: str | None) -> None:
    if identity is not None and identity != stage.config.data_identity:
        raise NotComparable("was chosen on other held-out samples: seed, data or split differ", replaceable=True)


def _validation_losses(folder: RunFolder) -> dict[int, float]:
    """On the run's validation windows, by step; what is not finite is no loss."""
    events = (event for event in read_current(folder.journal) if event["event"] == "validation")
    return {event["step"]: event["loss"] for event in events if isinstance(event["loss"], float) and math.isfinite(event["loss"])}


def _named(version: Version) -> dict[str, str | None]:
    return {"name": version.tags.get("checkpoint"), "digest": version.digest, "version": version.version}


def _figures(scores: Scores) -> str:
    summary = scores.summary
    exact = f" · exact match {summary['exact_match']:.0%} of {summary['checkable']:.0f}" if "exact_match" in summary else ""
    return (
        f"text {summary['text_bits_per_byte']:.3f} · gold answers {summary['answer_bits_per_byte']:.3f} bits/byte"
        f"{exact} · well formed {summary['format_adherence']:.0%} of {summary['questions']:.0f}"
    )


def _row(
    entry: dict[str, Any], result: Result, verdict: Verdict, crowned: Version | None, best: Any, losses: Mapping[int, float]
) -> dict[str, Any]:
    return {
        **{key: entry[key] for key in ("name", "step", "digest", "version")},
        "key": result.key,
        "validation_loss": losses.get(entry["step"]),
        **{key: result.summary.get(key) for key in FIGURES},
        "intervals": {key: list(interval) for key, interval in result.intervals.items()},
        "champion": crowned is not None and entry["version"] == crowned.version,
        "best": best is not None and entry["version"] == best["version"],
        "reason": verdict.reason,
    }


def _log(client: MlflowClient, name: str, stage: _Stage, entries: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    """Figures on the LoggedModel, answers and items as tables on the run, the reason on the version, where its list shows it, too. What
    MLflow has is not sent again."""
    there = {version.version: version.tags for version in tracking.versions(client, name)}
    for entry, row in zip(entries, rows, strict=True):
        tags = {REASON_TAG: row["reason"], "evaluation_set": stage.items.digest}
        tags |= {key: f"{row[key]:.4f}" for key in VERSION_FIGURES if row[key] is not None}
        had = there.get(entry["version"], {})
        if had.get(KEY_TAG) != row["key"]:
            scores = stored_scores(stage.folder.evaluation, row["key"])
            assert scores is not None, "stored a moment ago"
            metrics = {f"evaluation/{key}": float(value) for key, value in scores.summary.items()}
            tracking.log_scores(client, entry["model_id"], entry["run_id"], metrics, entry["step"], stage.items.digest)
            tracking.log_table(client, entry["run_id"], _answers(scores), f"answers/{entry['name']}.json")
            tracking.log_table(client, entry["run_id"], _items(scores), f"items/{entry['name']}.json")
            tags[KEY_TAG] = row["key"]  # last: with it, all is there
        if had.get(REASON_TAG) != row["reason"]:
            client.update_model_version(name, entry["version"], row["reason"])
        tracking.tag_version(client, name, entry["version"], {key: value for key, value in tags.items() if had.get(key) != value})


def _answers(scores: Scores) -> list[dict[str, Any]]:
    """What was written, beside the gold answers, for people."""
    columns = {"question": "question", "gold answer": "gold_answer", "answer": "answer", "exact match": "exact_match"}
    columns |= {"well formed": "well_formed", "token F1": "token_f1", "written": "written", "exercise": "exercise"}
    return [{shown: item[column] for shown, column in columns.items()} for item in scores.items if item["well_formed"] is not None]


def _items(scores: Scores) -> list[dict[str, Any]]:
    """Every item of both halves with its figures."""
    return [{column: _short(item[column]) for column in ITEM_COLUMNS} for item in scores.items]


def _short(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    run_step(evaluate_each_checkpoint)
