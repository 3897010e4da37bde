"""The parts of the page about what was learned: the checkpoints and their scores, texts side by side, exercises, benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from tasks.benchmark_lm import GPT2_124M
from tasks.report.charts import Plot, axis_for, span_of
from tasks.report.facts import Facts, Row, picked
from tasks.report.html import Html, Part, between, el, facts_list, folded, number, percent, table

COLUMNS: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("answer_bits_per_byte", "answer, bits/byte", number),
    ("answer_alone_bits_per_byte", "answer without reasoning", number),
    ("text_bits_per_byte", "text, bits/byte", number),
    ("distractor_accuracy", "first of four", percent),
    ("exact_match", "exact match", percent),
    ("token_f1", "token F1", percent),
    ("format_adherence", "well formed", percent),
)
_ROWS = 12
"""Checkpoints listed at once; if there are more, all of them are one click away."""
_OF_HELLASWAG = (
    "HellaSwag: acc_norm is the figure to compare, 0.3114 for GPT-2 124M in this harness. Completion style, as in other reports "
    "(0.2955 for GPT-2 124M), is another measure."
)


def checkpoints(facts: Facts) -> Html:
    """Every checkpoint with its scores, and why the champion is the champion."""
    parts: list[Part] = [el("h2", "Checkpoints", id="checkpoints")]
    if not facts.checkpoints:
        return el("section", parts, el("p", "There is none yet."))
    if facts.evaluated:
        parts.append(el("div", _against_step(facts, "answer_bits_per_byte"), _against_step(facts, _share_shown(facts)), class_="charts"))
    columns = [column for column in COLUMNS if any(row.get(column[0]) is not None for row in facts.checkpoints)]
    heads: list[Part] = ["step", "version", "validation loss", *(name for _, name, _ in columns)]

    def listed(rows: Iterable[Row]) -> Html:
        return table(heads, [(_cells(row, columns), "champion" if row.get("champion") else None) for row in rows], "checkpoints")

    shown = picked(facts.checkpoints, lambda row: bool(row.get("champion") or row.get("best")), _ROWS)
    parts += [listed(shown), el("p", _legend(facts), class_="quiet")]
    if len(shown) < len(facts.checkpoints):
        parts.append(folded(f"All {len(facts.checkpoints)} checkpoints", listed(facts.checkpoints), class_="screen"))
    missing = [row for row in facts.checkpoints if row not in facts.evaluated]
    if missing:
        some = f"{len(missing)} of {len(facts.checkpoints)} checkpoints are" if len(missing) > 1 else f"{missing[0]['name']} is"
        parts.append(el("p", f"{some} not evaluated yet: ", el("code", f"gpt2 evaluate {facts.name}")))
    reasons: list[tuple[str, Part]] = [(_title(row), row["reason"]) for row in facts.checkpoints if row.get("reason")]
    if reasons:
        parts.append(folded("What the champion rule said of each", facts_list(reasons), class_="screen"))
    return el("section", parts)


def _share_shown(facts: Facts) -> str:
    return "exact_match" if any(row.get("exact_match") is not None for row in facts.evaluated) else "distractor_accuracy"


def _cells(row: Row, columns: Iterable[tuple[str, str, Callable[[float | None], str]]]) -> list[Part]:
    stars = f"{' ★' * bool(row.get('champion'))}{' ◦' * bool(row.get('best'))}"
    cells: list[Part] = [f"{row['step']:,}{stars}", row.get("version") or "–", number(row.get("validation_loss"))]
    for key, _, show in columns:
        known = between((row.get("intervals") or {}).get(key), show)
        cells.append([show(row.get(key)), known and el("small", known)])
    return cells


def _legend(facts: Facts) -> str:
    newest = facts.evaluated[-1] if facts.evaluated else None
    if newest is None:
        return "Validation loss: nats per token, while training."
    counts = [
        f"{newest[key]:,.0f} {name}" for key, name in (("items", "held-out items"), ("questions", "answered greedily")) if newest.get(key)
    ]
    if newest.get("checkable"):
        counts.append(f"{newest['checkable']:,.0f} of them checkable")
    return (
        "★ champion · ◦ best by validation loss. Small: 95 % intervals, clustered by article. Bits per byte: lower is better. "
        f"Figures are of the reporting half ({', '.join(counts)}); the champion is chosen on the other half."
    )


def _short_title(facts: Facts, row: Row) -> str:
    return "base" if row is facts.base else f"step {row['step']:,}"


def _title(row: Row) -> str:
    return f"step {row['step']:,}" + (f" · version {row['version']}" if row.get("version") else "")


def _against_step(facts: Facts, key: str) -> Html | None:
    rows = [row for row in facts.evaluated if row.get(key) is not None]
    if len(rows) < 2:
        return None
    name, show = next((name, show) for column, name, show in COLUMNS if column == key)
    steps, values = (np.array([row[field] for row in rows], dtype=np.float64) for field in ("step", key))
    missing = (np.nan, np.nan)
    low, high = np.array([(row.get("intervals") or {}).get(key) or missing for row in rows], dtype=np.float64).T
    x = span_of(steps)
    room = 0.03 * (x.high - x.low)
    scale = 1.0 if show is number else 100.0
    plot = Plot(type(x)(x.low - room, x.high + room), axis_for(scale * np.concatenate([values, low, high]), log=False))
    plot.whiskers(steps, scale * low, scale * high, "train")
    plot.dots(steps, scale * values, "train")
    chosen = np.array([bool(row.get("champion")) for row in rows])
    plot.dots(steps[chosen], scale * values[chosen], "held chosen")
    legend = [("train dot", "checkpoint, 95 %"), *([("held dot", "champion")] if chosen.any() else [])]
    title = name[0].upper() + name[1:] + ("" if show is number else ", %")
    return plot.figure(title, f"from {show(values[0])} to {show(values[-1])}", legend, "step")


def samples(facts: Facts) -> Html | None:
    """What the checkpoints write after the same prompts, side by side."""
    shown = [row for row in facts.checkpoints if row["digest"] in facts.scores]
    prompts = list(dict.fromkeys(sample["prompt"] for row in shown for sample in facts.scores[row["digest"]].samples))
    parts: list[Part] = []
    for number_, prompt in enumerate(prompts):
        texts = [
            (f"{_short_title(facts, row)}{' ★' * bool(row.get('champion'))}", sample["text"], bool(row.get("champion")))
            for row in shown
            for sample in facts.scores[row["digest"]].samples
            if sample["prompt"] == prompt
        ]
        parts.append(_side_by_side(prompt, texts, opened=number_ == 0))
    while_training = _samples_of_training(facts)
    if not parts and not while_training:
        return None
    if parts:
        parts.insert(0, el("p", "The likeliest text after each prompt, token by token.", class_="quiet"))
    if while_training:
        parts.append(el("h3", "While it trained") if parts else None)
        parts += while_training
    return el("section", el("h2", "What it writes", id="samples"), parts)


def _samples_of_training(facts: Facts) -> list[Html]:
    """The journal's own samples."""
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for event in facts.history.events:
        if event["event"] == "sample":
            by_prompt.setdefault(event["prompt"], []).append(event)
    return [
        _side_by_side(prompt, [(f"step {event['step']:,}", event["text"], False) for event in picked(events)], opened=False)
        for prompt, events in list(by_prompt.items())[:10]
    ]


def _side_by_side(prompt: str, texts: Iterable[tuple[str, str, bool]], opened: bool) -> Html:
    columns = [
        el("div", el("b", title), el("p", text.strip("\n") or "(nothing)"), class_="champion" if ours else None)
        for title, text, ours in texts
    ]
    return folded(" ".join(prompt.split()), el("div", columns, class_="side"), opened=opened)


def exercises(facts: Facts) -> Html | None:
    """How often the champion is right, by kind of question."""
    scores = facts.champion_scores
    if scores is None:
        return None
    by_kind: dict[str, list[float]] = {}
    for item in scores.items:
        if item["half"] == "report" and item.get("exact_match") is not None and item.get("exercise") is not None:
            by_kind.setdefault(str(item["exercise"]), []).append(float(item["exact_match"]))
    if len(by_kind) < 2:
        return None
    rows: list[tuple[list[Part], str | None]] = []
    for kind, right in sorted(by_kind.items(), key=lambda pair: (-np.mean(pair[1]), pair[0])):
        share = float(np.mean(right))
        bar = el("span", el("i", style=f"width:{100 * share:.0f}%"), class_="bar")
        known = between(scores.intervals.get(f"exact_match.{kind}"), percent) or "–"
        rows.append(([kind, bar, f"{sum(right):.0f} of {len(right)}", known], None))
    return el(
        "section",
        el("h2", "The champion by exercise", id="exercises"),
        el("p", "Exact match on the reporting half's questions; intervals are clustered by article.", class_="quiet"),
        table(["exercise", "", "right", "95 %"], rows, "exercises"),
    )


def benchmarks(facts: Facts) -> Html | None:
    """Results of lm-evaluation-harness."""
    if not facts.benchmarks:
        return None
    rows: list[tuple[list[Part], str | None]] = []
    for result in facts.benchmarks:
        champion = facts.champion is not None and result.get("digest") == facts.champion["digest"]
        for task, metrics in sorted(result["results"].items()):
            for metric, value in _metrics(metrics):
                error = metrics.get(f"{metric}_stderr")
                known = isinstance(error, int | float)
                interval = f"{max(0.0, value - 1.96 * error):.4f}–{value + 1.96 * error:.4f}" if known and error else "–"
                cells: list[Part] = [
                    task,
                    metric,
                    f"{value:.4f}",
                    interval,
                    number(GPT2_124M.get((task, metric)), 4),
                    f"{result['checkpoint']}{' ★' * champion}",
                ]
                rows.append((cells, None))
    versions = sorted({str(result.get("lm_eval_version")) for result in facts.benchmarks})
    about = f"lm-evaluation-harness {', '.join(versions)}; intervals are 1.96 of its standard errors."
    hellaswag = _OF_HELLASWAG if any("hellaswag" in result["results"] for result in facts.benchmarks) else None
    heads: list[Part] = ["task", "metric", "value", "95 %", "GPT-2 124M", "checkpoint"]
    made = table(heads, rows, "benchmarks")
    return el(
        "section",
        el("h2", "Benchmarks", id="benchmarks"),
        made,
        el("p", about, class_="quiet"),
        hellaswag and el("p", hellaswag, class_="quiet"),
    )


def _metrics(metrics: Row) -> list[tuple[str, float]]:
    return [
        (metric, value)
        for metric, value in sorted(metrics.items())
        if isinstance(value, int | float) and not isinstance(value, bool) and not metric.endswith("_stderr")
    ]
