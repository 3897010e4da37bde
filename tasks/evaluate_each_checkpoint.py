"""evaluate-each-checkpoint: score every registered checkpoint on the same held-out items, once, and let the best be the champion.

`python -m tasks.evaluate_each_checkpoint EXPERIMENT`
"""

from __future__ import annotations

import json
import math
from typing import Any

from filelock import FileLock

from model import disk
from model.checkpoint.store import open_checkpoint
from model.config import EvaluationConfig
from model.device import pick_device
from model.evaluation.comparison import Verdict, judge, paired_difference
from model.evaluation.scoring import EvaluationSet, Scores, evaluation_set, score, store_scores, stored_scores
from model.params import read_yaml, validated
from model.run_folder import RunFolder
from model.training.run import read_run
from tasks import tracking
from tasks.project import Project, read_json
from tasks.steps import run_step


def evaluate_each_checkpoint(project: Project, name: str) -> None:
    """Score what has no score yet, oldest first; apply the champion rule; write `scores.json`, tell MLflow."""
    experiment, folder = project.experiment(name), project.run_folder(name)
    config, manifest = read_run(folder)
    settings = validated(EvaluationConfig, read_yaml(folder.evaluation_config), folder.evaluation_config.name)
    items = evaluation_set(config, manifest, settings)
    device = pick_device(experiment.hardware.device)
    registered = read_json(folder.registered) or []
    scored = {}
    for entry in registered:
        checkpoint = open_checkpoint(folder.checkpoints / entry["name"])
        key = items.key(checkpoint)
        scores = stored_scores(folder.evaluation, key)
        if scores is None:
            checkpoint.verify()
            scores = score(checkpoint, items, device)
            store_scores(folder.evaluation, key, scores)
        scored[entry["digest"]] = scores
        print(f"{entry['name']}  {_figures(scores)}", flush=True)
    client = tracking.connect(project, experiment)
    with FileLock(project.scratch_folder() / f"champion-{name}.lock"):  # compare-and-set: the registry has none
        verdicts = _crown(client, name, registered, scored, folder)
    champion = tracking.champion_digest(client, name)
    rows = [_row(entry, scored[entry["digest"]], verdicts[entry["digest"]], champion) for entry in registered]
    for entry, row in zip(registered, rows, strict=True):
        _log(client, name, entry, scored[entry["digest"]], row, items)
    crowned = next((entry for entry in registered if entry["digest"] == champion), None)
    summary = {
        "example": _example(scored.get(champion)) if champion else None,
        "champion": crowned and {key: crowned[key] for key in ("name", "digest", "version")},
        "evaluation_set": items.digest,
        "checkpoints": rows,
    }
    tracking.note_aliases(client, folder)
    disk.write_file(folder.scores, (json.dumps(summary, indent=1) + "\n").encode())


def _example(scores: Scores | None) -> str | None:
    """A held-out question that was answered right, for people to try."""
    right = [item["prompt"] for item in scores.items if item["exact_match"]] if scores else []
    return right[0].partition("\n")[0] if right else None


def _crown(client: Any, name: str, registered: list[dict[str, Any]], scored: dict[str, Scores], folder: RunFolder) -> dict[str, Verdict]:
    """Let every checkpoint challenge the champion in turn; the verdict by checkpoint digest. The alias moves at most once."""
    incumbent = standing = tracking.champion_digest(client, name)
    verdicts: dict[str, Verdict] = {}
    for entry in registered:
        digest = entry["digest"]
        if digest == incumbent:
            verdicts[digest] = Verdict(True, "the champion as evaluation began")
        elif incumbent not in scored:
            why = "the first to be evaluated" if incumbent is None else "the champion before was scored on other items or is of another run"
            verdicts[digest] = Verdict(True, f"takes over: {why}")
            incumbent = digest
        else:
            verdicts[digest] = challenge(scored[digest], scored[incumbent])
            if verdicts[digest].promoted:
                incumbent = digest
    if incumbent is not None and incumbent != standing:
        winner = next(entry for entry in registered if entry["digest"] == incumbent)
        tracking.materialise(client, winner["model_id"], folder.checkpoints / winner["name"])
        tracking.set_champion(client, name, incumbent)
    return verdicts


def challenge(challenger: Scores, incumbent: Scores) -> Verdict:
    """The champion rule on two checkpoints' items of the choosing half."""
    ours, theirs = ([row for row in scores.items if row["half"] == "choose"] for scores in (challenger, incumbent))
    assert [row["id"] for row in ours] == [row["id"] for row in theirs], "one evaluation set, one list of items"
    if len({row["article"] for row in ours}) < 2:
        return Verdict(False, f"stays: {len(ours)} questions of one article are too few to tell")
    interval = paired_difference(
        [row["gold_bits"] / row["gold_bytes"] for row in ours],
        [row["gold_bits"] / row["gold_bytes"] for row in theirs],
        [row["article"] for row in ours],
    )
    return judge(interval, challenger.summary["format_adherence"], incumbent.summary["format_adherence"])


def _figures(scores: Scores) -> str:
    summary = scores.summary
    return (
        f"validation {summary['validation_bits_per_byte']:.3f} bits/byte · gold answers {summary['gold_bits_per_byte']:.3f} bits/byte · "
        f"exact match {summary['exact_match']:.0%} of {summary['questions']:.0f} · well formed {summary['format_adherence']:.0%}"
    )


def _row(entry: dict[str, Any], scores: Scores, verdict: Verdict, champion: str | None) -> dict[str, Any]:
    figures = ("validation_bits_per_byte", "gold_bits_per_byte", "exact_match", "format_adherence", "questions")
    return {
        **{key: entry[key] for key in ("name", "step", "digest", "version")},
        **{key: scores.summary[key] for key in figures},
        "champion": entry["digest"] == champion,
        "reason": verdict.reason,
    }


def _log(client: Any, name: str, entry: dict[str, Any], scores: Scores, row: dict[str, Any], items: EvaluationSet) -> None:
    """Figures on the LoggedModel, answers as a table on the run, the reason on the version."""
    metrics = {f"evaluation/{key}": float(value) for key, value in scores.summary.items() if math.isfinite(value)}
    tracking.log_scores(client, entry["model_id"], entry["run_id"], metrics, entry["step"], items.digest)
    answers = [
        {
            "exercise": item["exercise"],
            "prompt": item["prompt"],
            "gold answer": item["gold_answer"],
            "answer": item["answer"],
            "exact match": item["exact_match"],
            "well formed": item["well_formed"],
            "written": item["text"],
        }
        for item in scores.items
        if item["half"] == "report"
    ]
    tracking.log_table(client, entry["run_id"], answers, f"answers/{entry['name']}.json")
    tags = {"champion.reason": row["reason"], "exact_match": f"{row['exact_match']:.3f}", "evaluation_set": items.digest}
    tracking.tag_version(client, name, entry["version"], tags)


if __name__ == "__main__":
    run_step(evaluate_each_checkpoint)
