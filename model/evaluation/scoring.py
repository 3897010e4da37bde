"""The scores of one checkpoint on the run's fixed held-out items, kept under a key that says what was scored on what.

Two halves of the validation articles: one chooses the champion, the other reports. A choice made on the items it is reported on flatters.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from model import disk
from model.checkpoint.store import Checkpoint
from model.config import EvaluationConfig, RunConfig
from model.digest import digest_of, sealed, unsealed
from model.evaluation.likelihood import continuation_bits, validation_loss
from model.evaluation.questions import Question, ask, make_questions, questions_digest
from model.gpt2 import GPT2
from model.huggingface import load_model
from model.stream.manifest import DatasetManifest
from model.stream.validation import held_out_rows, validation_windows
from model.tokenizer import END_OF_TEXT, encode

EVALUATION_VERSION = 1
"""Part of the key: raise it when a score's meaning changes, and every checkpoint is scored again."""


@dataclass(frozen=True)
class EvaluationSet:
    """The items every checkpoint of the run is scored on."""

    windows: np.ndarray
    """Validation windows, uint16 [windows, max_length + 1]."""
    choose: list[Question]
    """For choosing the champion."""
    report: list[Question]
    """For the figures shown; answered greedily, too."""
    settings: EvaluationConfig
    delimiter: str

    @property
    def digest(self) -> str:
        """Names items and settings that decide the scores; the batch size does not."""
        return digest_of(
            [
                questions_digest(self.choose),
                questions_digest(self.report),
                digest_of(self.windows.tolist()),
                self.settings.max_new_tokens,
                self.delimiter,
            ]
        )

    def key(self, checkpoint: Checkpoint) -> str:
        """(checkpoint, evaluation set, evaluation version) as one digest."""
        return digest_of([checkpoint.digest, self.digest, EVALUATION_VERSION])


def evaluation_set(config: RunConfig, manifest: DatasetManifest, settings: EvaluationConfig) -> EvaluationSet:
    """The run's held-out items: a function of its data, seed and evaluation settings."""
    data, seed = config.data, config.seed
    kind = settings.kind_column
    columns = [*data.text_columns, kind] if kind else data.text_columns
    return EvaluationSet(
        windows=validation_windows(manifest, data, seed, config.training.eval_iters * config.training.batch_size),
        choose=make_questions(held_out_rows(manifest, data, seed, settings.questions, "choose", columns), data, kind),
        report=make_questions(held_out_rows(manifest, data, seed, settings.questions, "report", columns), data, kind),
        settings=settings,
        delimiter=data.answer_delimiter,
    )


@dataclass(frozen=True)
class Scores:
    """A checkpoint's summary and, per item, what it comes from."""

    summary: dict[str, float]
    items: list[dict[str, Any]]


def score(checkpoint: Checkpoint, items: EvaluationSet, device: torch.device) -> Scores:
    """Score one checkpoint. The caller has verified its digests."""
    model = load_model(checkpoint.path, device)
    batch = items.settings.batch_size
    validated = validation_loss(model, items.windows, batch)
    assert validated is not None
    rows = _gold_bits(model, items.choose, batch, half="choose") + _gold_bits(model, items.report, batch, half="report")
    graded = ask(model, items.report, items.delimiter, items.settings.max_new_tokens, batch)
    for row, result in zip(rows[len(items.choose) :], graded, strict=True):
        row.update(text=result.text, answer=result.answer, well_formed=result.well_formed, exact_match=result.exact_match)
    report = rows[len(items.choose) :]
    summary = {
        "validation_loss": validated[0],
        "validation_bits_per_byte": validated[1],
        "gold_bits_per_byte": sum(row["gold_bits"] for row in report) / sum(row["gold_bytes"] for row in report),
        "exact_match": sum(result.exact_match for result in graded) / len(graded),
        "format_adherence": sum(result.well_formed for result in graded) / len(graded),
        "questions": len(graded),
    }
    for kind in sorted({question.exercise for question in items.report if question.exercise}):
        matches = [result.exact_match for question, result in zip(items.report, graded, strict=True) if question.exercise == kind]
        summary[f"exact_match.{kind}"] = sum(matches) / len(matches)
    return Scores(summary, rows)


def _gold_bits(model: GPT2, questions: list[Question], batch_size: int, half: str) -> list[dict[str, Any]]:
    """Bits of the gold reasoning and answer given the question, an item a row."""
    continuations = [[*encode(question.gold), END_OF_TEXT] for question in questions]
    bits = continuation_bits(model, [encode(question.prompt) for question in questions], continuations, batch_size)
    rows = []
    for question, gold_bits in zip(questions, bits, strict=True):
        gold_bytes = max(1, len(question.gold.encode()))
        unanswered = {"text": None, "answer": None, "well_formed": None, "exact_match": None}
        gold = {"gold_answer": question.answer, "gold_bits": gold_bits, "gold_bytes": gold_bytes}
        rows.append({"half": half, **asdict(question), **gold, **unanswered})
    return rows


def stored_scores(folder: Path, key: str) -> Scores | None:
    """What was scored under this key before; None if nothing whole is there."""
    place = folder / key[:24]
    try:
        contents = unsealed((place / "summary.json").read_text(encoding="utf-8"))
        items = (place / "items.parquet").read_bytes()
        if contents["key"] != key or contents["items_sha256"] != hashlib.sha256(items).hexdigest():
            return None
        return Scores(contents["summary"], pq.read_table(pa.BufferReader(items)).to_pylist())
    except (OSError, ValueError, KeyError, pa.ArrowException):
        return None


def store_scores(folder: Path, key: str, scores: Scores) -> None:
    """Keep the scores under their key, all at once: a kill half-way leaves nothing that counts."""
    assert all(math.isfinite(value) for value in scores.summary.values())
    place = folder / key[:24]
    partial = folder / f".{key[:24]}.{os.getpid()}.partial"
    disk.sweep(folder, f".{key[:24]}.")
    partial.mkdir(parents=True)
    items = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(scores.items), items)
    disk.write_file(partial / "items.parquet", items.getvalue())
    contents = {"key": key, "items_sha256": hashlib.sha256(items.getvalue()).hexdigest(), "summary": scores.summary}
    disk.write_file(partial / "summary.json", sealed(contents).encode())
    if place.exists():  # what lay there was not whole, or `stored_scores` would have found it
        shutil.rmtree(place)
    try:
        disk.rename(partial, place)
        disk.fsync(folder)
    except OSError:
        if stored_scores(folder, key) is None:
            raise
        shutil.rmtree(partial)  # somebody else scored the same at the same time
