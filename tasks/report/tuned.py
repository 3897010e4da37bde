"""The part of a post-training's page that holds it against what it began with."""

from __future__ import annotations

from collections.abc import Callable

from tasks.compare import Figure, figures
from tasks.report.facts import Facts
from tasks.report.html import Html, Part, el, number, percent, table
from tasks.report.scored import COLUMNS
from tasks.run_page import words_for


def base_and_tuned(facts: Facts) -> Html | None:
    """The base and the champion on the same held-out items; None if there are not two of them with scores."""
    base, champion = facts.base, facts.champion
    if facts.config.post_training is None or base is None:
        return None
    heading = el("h2", "Base and tuned", id="tuned")
    about = ["It began with ", words_for(facts.config.post_training.base), ", here step 0, of digest ", el("code", _digest(facts)), ". "]
    if champion is base:
        return el("section", heading, el("p", about, "It is still the champion: nothing that was learned since is better by the rule."))
    if champion is None or any(row["digest"] not in facts.scores for row in (base, champion)):
        return None
    found = {figure.key: figure for figure in figures(*(facts.scores[row["digest"]] for row in (base, champion)))}
    rows = [(_cells(name, found[key], show), None) for key, name, show in COLUMNS if key in found]
    heads: list[Part] = ["", "base", f"tuned, step {champion['step']:,} ★", "difference", "95 %", "items"]
    note = (
        "Of the reporting half. The difference is paired: both on the same items, those of one article as one. Bits per byte: lower "
        "is better. What each writes after the same prompts is below."
    )
    return el("section", heading, el("p", about), table(heads, rows, "base and tuned"), el("p", note, class_="quiet"))


def _digest(facts: Facts) -> str:
    assert facts.config.post_training is not None
    return facts.config.post_training.base.digest[:12]


def _cells(name: str, figure: Figure, show: Callable[[float | None], str]) -> list[Part]:
    def signed(value: float | None) -> str:
        if value is None:
            return "–"
        return f"{value:+.3f}" if show is number else f"{100 * value:+.1f}"

    unit = " points" if show is percent else ""
    known = f"{signed(figure.low)} to {signed(figure.high)}" if figure.low != figure.high else "–"  # none, or all items are alike
    return [name, show(figure.a), show(figure.b), f"{signed(figure.difference)}{unit}", known, f"{figure.items:,}"]
