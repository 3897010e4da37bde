"""The scores of one checkpoint on the run's fixed held-out items.

Two halves of the validation articles: one chooses the champion, the other reports. A choice made on the items it is reported on flatters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch

from model.checkpoint.store import Checkpoint
from model.config import EvaluationConfig
from model.digest import digest_of
from model.errors import UserError
from model.evaluation.intervals import clustered
from model.evaluation.items import DISTRACTORS, Item, Template, make_items
from model.evaluation.likelihood import continuation_bits, exact_fp32
from model.evaluation.questions import Graded, ask, grade
from model.evaluation.scores import Scores
from model.gpt2 import GPT2
from model.huggingface import load_model
from model.run_config import RunConfig
from model.stream.manifest import DatasetManifest
from model.stream.validation import Half, held_out_rows

EVALUATION_VERSION = 2
"""Part of the key: raise it when a score's meaning changes, and every checkpoint is scored again."""

_HALVES: tuple[Half, Half] = ("choose", "report")


@dataclass(frozen=True)
class EvaluationSet:
    """What every checkpoint of a data identity is scored on."""

    items: list[Item]
    """The choosing half's, then the reporting half's. The first `settings.questions` of the latter are also asked."""
    text_template: str
    settings: EvaluationConfig

    def half(self, half: Half) -> list[Item]:
        """The items of one half."""
        return [item for item in self.items if item.half == half]

    @cached_property
    def digest(self) -> str:
        """Names items and settings that decide the scores; the batch size does not."""
        settings = self.settings.model_dump(mode="json", include={"questions", "max_new_tokens", "prompts"})
        return digest_of([[asdict(item) for item in self.items], self.text_template, settings])

    def key(self, checkpoint: Checkpoint) -> str:
        """(checkpoint, evaluation set, evaluation version) as one digest."""
        return digest_of([checkpoint.digest, self.digest, EVALUATION_VERSION])


def evaluation_set(config: RunConfig, manifest: DatasetManifest, settings: EvaluationConfig) -> EvaluationSet:
    """The held-out items: a function of the run's data identity and the evaluation's settings alone.

    Raises:
        UserError: a half holds no sample.
    """
    items: list[Item] = []
    for half in _HALVES:
        rows = held_out_rows(manifest, config.data, config.seed, settings.items, half, settings.kind_column)
        if not rows:
            raise UserError("data.train_ratio: what is left for validation is too little to be scored on; lower it, or use more samples")
        items += make_items(rows, config.data, half)
    return EvaluationSet(items, config.data.text_template, settings)


def score(checkpoint: Checkpoint, items: EvaluationSet, device: torch.device) -> Scores:
    """Score one checkpoint. The caller has verified its digests.

    The network looks back as far as it was trained to: positions beyond `data.max_length` may exist and mean nothing.
    """
    model = load_model(checkpoint.path, device)
    template, settings = Template(items.text_template), items.settings
    asked = items.half("report")[: settings.questions]
    prompts = [template.prompt(prompt) for prompt in settings.prompts]
    with exact_fp32():
        rows = _likelihoods(model, items.items, settings.batch_size)
        written = ask(model, [*(item.question for item in asked), *prompts], settings.max_new_tokens, settings.batch_size)
    report = [row for row in rows if row["half"] == "report"]
    for item, row, (text, ended) in zip(asked, report, written, strict=False):
        row.update(_graded(grade(item, template, text, ended)))
    samples = [{"prompt": prompt, "text": text} for prompt, (text, _) in zip(prompts, written[len(asked) :], strict=True)]
    summary, intervals = _summary(report)
    return Scores(summary, intervals, rows, samples)


def _likelihoods(model: GPT2, items: Sequence[Item], batch_size: int) -> list[dict[str, Any]]:
    """What the network makes of each gold text; the columns of answers are still empty."""
    pairs: list[tuple[str, str]] = []
    for item in items:
        pairs += [("", item.text), (item.given, item.answer + item.ending), (item.alone, item.answer + item.ending)]
        pairs += [(item.alone, distractor + item.ending) for distractor in item.distractors]
    bits = iter(continuation_bits(model, pairs, batch_size))
    rows: list[dict[str, Any]] = []
    for item in items:
        text, answer, alone = next(bits), next(bits), next(bits)
        others = [next(bits) / max(1, _bytes(distractor + item.ending)) for distractor in item.distractors]
        answer_bytes = _bytes(item.answer + item.ending)
        rows.append(
            {
                "half": item.half,
                "id": item.id,
                "article": item.article,
                "exercise": item.exercise,
                "question": item.question,
                "gold_answer": item.answer,
                "text_bits": text,
                "text_bytes": _bytes(item.text),
                "answer_bits": answer,
                "answer_alone_bits": alone,
                "answer_bytes": answer_bytes,
                "distractor_rank": 1 + sum(other <= alone / max(1, answer_bytes) for other in others),
                "written": None,
                "answer": None,
                "well_formed": None,
                "exact_match": None,
                "token_f1": None,
            }
        )
    return rows


def _bytes(text: str) -> int:
    return len(text.encode())


def _graded(graded: Graded) -> dict[str, Any]:
    return {
        "written": graded.text,
        "answer": graded.answer,
        "well_formed": graded.well_formed,
        "exact_match": graded.exact_match,
        "token_f1": graded.token_f1,
    }


def _summary(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Figures of the reporting half, and the intervals of those that are ratios or means over items."""
    asked = [row for row in rows if row["written"] is not None]
    checked = [row for row in asked if row["exact_match"] is not None]
    summary: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}

    def add(key: str, of: Sequence[dict[str, Any]], above: list[float], below: list[int] | None = None, most: float = math.inf) -> None:
        below = [1] * len(of) if below is None else below
        if of:
            summary[key] = math.fsum(above) / max(1, sum(below))
        if sum(below) and len({row["article"] for row in of}) > 1:
            interval = clustered(above, below, [row["article"] for row in of])
            intervals[key] = max(0.0, interval.low), min(most, interval.high)
            if most == 1 and interval.mean in (0, 1):  # all alike: there is no spread to go by, and yet it is not certain
                reach = 1 - 0.025 ** (1 / interval.clusters)  # Clopper & Pearson 1934, articles for observations
                intervals[key] = (0.0, reach) if interval.mean == 0 else (1 - reach, 1.0)

    answer_bytes = [row["answer_bytes"] for row in rows]
    add("text_bits_per_byte", rows, [row["text_bits"] for row in rows], [row["text_bytes"] for row in rows])
    add("answer_bits_per_byte", rows, [row["answer_bits"] for row in rows], answer_bytes)
    add("answer_alone_bits_per_byte", rows, [row["answer_alone_bits"] for row in rows], answer_bytes)
    add("distractor_accuracy", rows, [float(row["distractor_rank"] == 1) for row in rows], most=1)
    add("distractor_rank", rows, [float(row["distractor_rank"]) for row in rows], most=DISTRACTORS + 1)
    add("format_adherence", asked, [float(row["well_formed"]) for row in asked], most=1)
    add("token_f1", asked, [row["token_f1"] for row in asked], most=1)
    add("exact_match", checked, [float(row["exact_match"]) for row in checked], most=1)
    for kind in sorted({row["exercise"] for row in checked if row["exercise"]}):
        of_kind = [row for row in checked if row["exercise"] == kind]
        add(f"exact_match.{kind}", of_kind, [float(row["exact_match"]) for row in of_kind], most=1)
    return {**summary, "checkable": len(checked), "questions": len(asked), "items": len(rows)}, intervals
