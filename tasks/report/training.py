"""The parts of the page about the training: the headline and the curves."""

from __future__ import annotations

import datetime
from collections.abc import Iterable

import numpy as np

from tasks.report.charts import Axis, Plot, axis_for, span_of
from tasks.report.costs import device
from tasks.report.facts import Facts
from tasks.report.history import Series
from tasks.report.html import Html, Part, between, compact, duration, el, folded, number, percent, table
from tasks.run_page import words_for

_HEADLINE_FIGURES = (
    ("answer_bits_per_byte", "bits per byte of the gold answer", number),
    ("exact_match", "exact match", percent),
    ("distractor_accuracy", "gold answer ranked first of four", percent),
)
_MARKS_LISTED = 200
_BEGINNING = 0.03
"""Share of the time whose losses the plot against time leaves out, to show what comes after."""


def headline(facts: Facts) -> Html:
    """What was trained on what, how it ended, what came of it."""
    config, told = facts.config, facts.history
    began = datetime.datetime.fromtimestamp(told.segments[0].started["time"], datetime.UTC)
    steps = f"step {facts.step:,} of {told.started['total_steps']:,}"
    lead: list[Part] = [
        f"A GPT-2 of {compact(told.started['parameters'])} parameters, {_begun(facts)}trained on {config.data.path} for "
        f"{compact(facts.tokens)} tokens: ",
        el("span", _how_it_ended(facts), class_=f"state {facts.state}"),
        f", {steps}.",
    ]
    parts: list[Part] = [
        el("p", f"Training report · begun {began:%d %B %Y, %H:%M} UTC", class_="over"),
        el("h1", facts.name),
        el("p", lead, class_="lead"),
        _last_words(facts),
        el("div", _tiles(facts), class_="tiles"),
        _champion(facts),
    ]
    return el("header", parts)


def _begun(facts: Facts) -> str:
    return f"begun with {words_for(facts.config.post_training.base)} and post-" if facts.config.post_training is not None else ""


def _how_it_ended(facts: Facts) -> str:
    return {
        "finished": "finished",
        "stopped": "stopped on request, resumable",
        "interrupted": "interrupted by a fault, resumable",
        "training": "still training",
    }.get(facts.state, facts.state)


def _last_words(facts: Facts) -> Html | None:
    """Of a training that did not finish: its reason."""
    if facts.state == "stopped" and (stopped := facts.history.last("stopped")):
        return el("p", f"Stopped: {stopped['reason']}.", class_="quiet")
    if facts.state == "interrupted" and (warning := facts.history.last("warning")):
        return el("p", f"Its last warning, at step {warning['step']:,}: {warning['message']}", class_="quiet")
    return None


def _tiles(facts: Facts) -> Iterable[Html]:
    told = facts.history
    champion = facts.champion if facts.champion in facts.evaluated else None
    if champion:
        for key, name, show in _HEADLINE_FIGURES:
            if champion.get(key) is not None:
                known = between((champion.get("intervals") or {}).get(key), show)
                yield _tile(show(champion[key]), name, known and f"95 %: {known}")
    if validation := told.last("validation"):
        bits = f"{validation['bits_per_byte']:.3f} bits per byte, step {validation['step']:,}"
        yield _tile(number(validation["loss"]), "validation loss, nats per token", bits)
    cost = facts.costs
    usd = f"${cost.usd:,.2f} at an assumed price" if cost.usd is not None else None
    yield _tile(duration(told.seconds), "of training", usd or f"on {device(told)}")


def _tile(value: str, name: str, more: Part) -> Html:
    return el("div", el("b", value), el("span", name), el("small", more))


def _champion(facts: Facts) -> Html:
    champion, elsewhere = facts.champion, facts.marked_champion
    if champion is None and elsewhere is None:
        return el("p", "Champion: none, because no checkpoint is evaluated yet. ", el("code", f"gpt2 evaluate {facts.name}"), class_="why")
    if champion is None:
        reasons = [row["reason"] for row in facts.checkpoints if row.get("reason")]
        where = f"version {elsewhere.get('version')}, of another training" if elsewhere else ""
        return el("p", el("strong", f"Champion: {where}. "), _sentence(reasons[-1]) if reasons else None, class_="why")
    version = f", version {champion['version']} in the registry" if champion.get("version") else ""
    return el("p", el("strong", f"Champion: {champion['name']}{version}. "), _sentence(champion.get("reason") or ""), class_="why")


def _sentence(reason: str) -> str:
    """With a capital and a full stop."""
    return f"{reason[:1].upper()}{reason[1:].rstrip('.')}." if reason else ""


def curves(facts: Facts) -> Html:
    """Loss against tokens and against hours, and what went with it."""
    told = facts.history
    loss, validation = told.steps["loss"], told.validation
    if not loss:
        none = "No step's loss was finite." if facts.step else "No step is done yet."
        return el("section", el("h2", "Curves", id="curves"), el("p", none))
    y = axis_for(np.concatenate([loss.values, validation.values]))
    last = validation.values[-1] if len(validation.values) else None
    note = f"ends at {_smooth_end(loss):.3f}" + (f", validation at {last:.3f}" if last is not None else "")
    unit, hours = _time_unit(told.seconds)
    after = _BEGINNING * np.nanmax(loss.hours)
    later = np.concatenate([series.values[series.hours > after] for series in (loss, validation)])
    late = axis_for(later) if np.isfinite(later).any() else y
    above = f"the first {100 * _BEGINNING:g} %, up to {np.nanmax(loss.values):.1f}, lie above" if np.nanmax(loss.values) > late.high else ""
    large = [
        _loss_plot(facts, span_of(loss.tokens, log=True), y, "Loss against tokens, nats per token", note, "tokens, logarithmic", "tokens"),
        _loss_plot(
            facts, span_of(loss.hours / hours), late, "Loss against time, nats per token", above, f"{unit} of training", "hours", hours
        ),
    ]
    small = [
        _small_plot(facts, "gradient_norm", "Gradient norm", "before clipping", facts.config.training.gradient_clip or None),
        _small_plot(facts, "learning_rate", "Learning rate", "as scheduled", None),
        _small_plot(facts, "tokens_per_s", "Throughput, tokens per second", _speed_note(facts), None),
    ]
    foot = el("p", "Faint: every step, from the lowest to the highest. Line: their smoothed mean.", class_="quiet")
    return el(
        "section",
        el("h2", "Curves", id="curves"),
        el("div", large, class_="charts"),
        el("div", small, class_="charts small"),
        foot,
        _marks(facts),
    )


def _time_unit(seconds: float) -> tuple[str, float]:
    """What to count a training of this length in, and how many hours it has."""
    return next(
        (name, hours) for name, hours, from_ in (("days", 24, 72 * 3600), ("hours", 1, 7200), ("minutes", 1 / 60, 0)) if seconds >= from_
    )


def _loss_plot(facts: Facts, x: Axis, y: Axis, title: str, note: str, x_label: str, along: str, unit: float = 1.0) -> Html:
    told, plot = facts.history, Plot(x, y)
    loss, validation = told.steps["loss"], told.validation
    legend = _draw_marks(plot, facts, along, unit)
    plot.curve(getattr(loss, along) / unit, loss.values, "train", smooth=True)
    legend = [("train", "training"), *([("held", "validation")] if validation else []), *legend]
    if validation:
        plot.curve(getattr(validation, along) / unit, validation.values, "held", smooth=False)
        if len(validation.values) <= 60:
            plot.dots(getattr(validation, along) / unit, validation.values, "held")
    return plot.figure(title, note, legend, x_label)


def _small_plot(facts: Facts, field: str, title: str, note: str, limit: float | None) -> Html | None:
    series = facts.history.steps[field]
    if not series:
        return None
    from_zero = field != "gradient_norm"
    values = series.values if limit is None else np.append(series.values, limit)
    plot = Plot(span_of(series.tokens), axis_for(values, log=False if from_zero else None, from_zero=from_zero))
    _draw_marks(plot, facts, "tokens")
    legend = []
    if limit is not None:
        plot.level(limit, "limit")
        legend = [("limit", f"clipped to {limit:g}")]
    plot.curve(series.tokens, series.values, "train", smooth=field != "learning_rate")
    return plot.figure(title, note, legend, "tokens")


def _draw_marks(plot: Plot, facts: Facts, along: str, unit: float = 1.0) -> list[tuple[str, str]]:
    legend = []
    for kind, name, kinds in (("resumed", "resumed", ("resumed", "rolled back")), ("warning", "warning", ("warning",))):
        places = [getattr(mark, along) / unit for mark in facts.history.marks if mark.kind in kinds]
        if places:
            plot.marks((max(place, plot.x.low) for place in places), kind)
            legend.append((kind, name))
    return legend


def _marks(facts: Facts) -> Html | None:
    marks = facts.history.marks
    if not marks:
        return None
    kinds = [mark.kind for mark in marks]
    counts = ", ".join(f"{kinds.count(kind)} × {kind}" for kind in ("resumed", "rolled back", "warning") if kind in kinds)
    rows: list[tuple[list[Part], str | None]] = [
        ([f"step {mark.step:,}", duration(3600 * mark.hours), mark.kind, mark.message], None) for mark in marks[-_MARKS_LISTED:]
    ]
    left_out = f"The last {_MARKS_LISTED} of {len(marks):,}." if len(marks) > _MARKS_LISTED else None
    made = table(["", "after", "what", "why"], rows, "events", "scroll wide")
    return folded(f"What happened on the way: {counts}", left_out, made)


def _smooth_end(series: Series) -> float:
    """The mean of the last hundredth, at least ten steps."""
    values = series.values[np.isfinite(series.values)]
    return float(values[-max(10, len(values) // 100) :].mean())


def _speed_note(facts: Facts) -> str:
    speed, mfu = facts.history.steps["tokens_per_s"].values, facts.history.steps["mfu"].values
    parts = [f"median {compact(float(np.nanmedian(speed)))}"] if len(speed) else []
    if np.isfinite(mfu).any():
        parts.append(f"MFU {100 * float(np.nanmedian(mfu)):.0f} %")
    return ", ".join(parts)
