"""Two checkpoints side by side, of one experiment or of two that hold out the same samples. Changes nothing: no alias is moved.

Scores that an evaluation left behind are taken; what is missing is scored and kept in the project's scratch folder, because the folders of
the runs are what DVC versions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.checkpoint.store import Checkpoint, is_name
from model.config import EvaluationConfig
from model.errors import UserError
from model.evaluation.comparison import Evidence, Verdict, challenge, difference
from model.params import read_yaml, validated
from model.run_config import RunConfig
from model.training.run import read_run
from tasks.project import Project, read_json
from tasks.use import pick_checkpoint

if TYPE_CHECKING:
    from model.evaluation.scores import Scores
    from model.evaluation.scoring import EvaluationSet

Item = dict[str, Any]
ITEM_FIGURES: dict[str, tuple[Callable[[Item], float | None], str | None]] = {
    "text_bits_per_byte": (lambda item: item["text_bits"], "text_bytes"),
    "answer_bits_per_byte": (lambda item: item["answer_bits"], "answer_bytes"),
    "answer_alone_bits_per_byte": (lambda item: item["answer_alone_bits"], "answer_bytes"),
    "distractor_accuracy": (lambda item: float(item["distractor_rank"] == 1), None),
    "distractor_rank": (lambda item: float(item["distractor_rank"]), None),
    "format_adherence": (lambda item: item["well_formed"], None),
    "exact_match": (lambda item: item["exact_match"], None),
    "token_f1": (lambda item: item["token_f1"], None),
}
"""Each figure's value of an item (None: not asked, or not checkable), and what it is counted over; None: items."""


@dataclass(frozen=True)
class Figure:
    """One figure of both, of the reporting half."""

    key: str
    a: float | None
    b: float | None
    difference: float | None
    """B minus A, paired on the items that both have."""
    low: float | None
    high: float | None
    """Its 95 % interval, clustered by article; None with fewer than two articles."""
    items: int


@dataclass(frozen=True)
class Comparison:
    """What `gpt2 compare` says."""

    a: str
    """`quickstart/step_00000900`."""
    b: str
    a_digest: str
    b_digest: str
    figures: list[Figure]
    winner: str | None
    """`a`, `b`, or null: neither would take over from the other."""
    reason: str
    """Of the champion rule, on the choosing half."""

    def as_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


def compare(project: Project, a: str, b: str) -> Comparison:
    """Measure B against A, each an experiment (its champion) or NAME/step_00001000, on A's held-out items and evaluation settings.

    Raises:
        UserError: there is no such checkpoint, or the two hold out other samples.
    """
    one, other = _pick(project, a), _pick(project, b)
    config, manifest = read_run(project.run_folder(one.experiment))
    theirs, _ = read_run(project.run_folder(other.experiment))
    if differing := _differences(config, theirs):
        raise UserError(f"{a} and {b} do not hold out the same samples: {'; '.join(differing)}")
    from model.device import pick_device
    from model.evaluation.scoring import evaluation_set

    evaluation = project.run_folder(one.experiment).evaluation_config
    items = evaluation_set(config, manifest, validated(EvaluationConfig, read_yaml(evaluation), evaluation.name))
    device = pick_device(project.experiment(one.experiment).hardware.device)
    scores = [_scores(project, (one.experiment, other.experiment), which.checkpoint, items, device) for which in (one, other)]
    winner, verdict = _winner(*map(Evidence.of, scores))
    return Comparison(str(one), str(other), one.checkpoint.digest, other.checkpoint.digest, list(figures(*scores)), winner, verdict)


@dataclass(frozen=True)
class _Picked:
    experiment: str
    checkpoint: Checkpoint

    def __str__(self) -> str:
        return f"{self.experiment}/{self.checkpoint.name}"


def _pick(project: Project, given: str) -> _Picked:
    name, slash, step = given.partition("/")
    if slash and not is_name(step):
        raise UserError(f"{given[:80]!r}: give an experiment, or one of its checkpoints such as {name[:64]}/step_00001000")
    project.experiment(name)
    if not slash and not (read_json(project.run_folder(name).scores) or {}).get("champion"):
        raise UserError(f"{name} has no champion yet; evaluate it (gpt2 evaluate {name}), or name a checkpoint: {name}/step_00001000")
    return _Picked(name, pick_checkpoint(project, name, step or None))


def _differences(ours: RunConfig, theirs: RunConfig) -> list[str]:
    """What makes the data identities differ, by name; nothing if they are equal."""
    if ours.data_identity == theirs.data_identity:
        return []
    pairs: dict[str, tuple[Any, Any]] = {"seed": (ours.seed, theirs.seed)}
    pairs["the dataset"] = ours.dataset.digest[:12], theirs.dataset.digest[:12]
    names = ("filter", "text_template", "id_column", "article_column", "num_samples", "split_by", "train_ratio")
    pairs |= {f"data.{name}": (getattr(ours.data, name), getattr(theirs.data, name)) for name in names}
    return [f"{name}: {mine!r}, {other!r}" for name, (mine, other) in pairs.items() if mine != other]


def _scores(project: Project, experiments: tuple[str, ...], checkpoint: Checkpoint, items: EvaluationSet, device: Any) -> Scores:
    """What is there already, or scored now. The checkpoint is verified."""
    from model.evaluation.score_store import score_each, stored_scores
    from model.evaluation.scoring import score

    key = items.key(checkpoint)
    kept: Path = project.scratch_folder() / "compared"
    for folder in dict.fromkeys(project.run_folder(name).evaluation for name in experiments):
        if (found := stored_scores(folder, key)) is not None:
            return found
    ((_, result),) = score_each(kept, [key], lambda _: score(checkpoint, items, device))
    if isinstance(result, Exception):
        raise result
    return result


def _winner(a: Evidence, b: Evidence) -> tuple[str | None, str]:
    """Who would take over from the other, and the reason."""
    verdict: Verdict = challenge(b, a)
    if verdict.promoted:
        return "b", f"B {verdict.reason}"
    other = challenge(a, b)
    if other.promoted:
        return "a", f"A {other.reason}"
    return None, f"whichever is champion {verdict.reason}"


def figures(a: Scores, b: Scores) -> Iterator[Figure]:
    """Each figure of two checkpoints that were scored on the same items, and the difference with its interval."""
    ours, theirs = ([row for row in scores.items if row["half"] == "report"] for scores in (a, b))
    for key, (value, weight) in ITEM_FIGURES.items():
        paired = [(row, value(row), value(other)) for row, other in zip(ours, theirs, strict=True)]
        both = [(row, float(one), float(two)) for row, one, two in paired if one is not None and two is not None]
        weights = [float(row[weight]) if weight else 1.0 for row, _, _ in both]
        if not sum(weights):
            continue
        gap = sum(two - one for _, one, two in both) / sum(weights)
        low = high = None
        articles = [row["article"] for row, _, _ in both]
        if len(set(articles)) > 1:
            interval = difference([two for _, _, two in both], [one for _, one, _ in both], weights, articles)
            low, high = interval.low, interval.high
        yield Figure(key, a.summary.get(key), b.summary.get(key), gap, low, high, len(both))
