"""The report of the nightly `re-evaluate`: what is new, what moved, what rotted, what is in the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tasks.news import News
from tasks.recheck import Rechecked


@dataclass
class Night:
    """What became of one experiment."""

    experiment: str
    news: News | None = None
    """None: it was not evaluated."""
    busy: str | None = None
    """The flow that works on it, and to which it was left."""
    synced: bool = False
    """Whether MLflow and the storage have all there is."""
    rechecked: list[Rechecked] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What is in the way, each with its cure; a message may be of several lines."""

    @property
    def is_rotten(self) -> bool:
        """Whether a stored checkpoint is not what was written."""
        return any(each.rotten for each in self.rechecked)


def line(nights: Sequence[Night]) -> str:
    """All of it in one line: what was evaluated, and what is to be known of the others."""
    evaluated = [night.experiment for night in nights if night.news]
    moved = [
        f"{night.experiment} {night.news.after.name}" for night in nights if night.news and night.news.champion_moved and night.news.after
    ]
    groups = {
        "new champion": moved,
        "rotten": [night.experiment for night in nights if night.is_rotten],
        "left to another flow": [night.experiment for night in nights if night.busy],
        "not evaluated": [night.experiment for night in nights if not night.news and not night.busy],
        "in the way": [night.experiment for night in nights if night.problems and night.news],
    }
    said = [f"{what}: {', '.join(names)}" for what, names in groups.items() if names]
    return "; ".join([f"evaluated: {', '.join(evaluated) or ('none' if nights else 'no experiment has checkpoints')}", *said])


def page(nights: Sequence[Night]) -> str:
    """The same in Markdown, with all that a cure takes."""
    rows = [_row(night) for night in nights]
    table = ["| experiment | newly registered | newly scored | champion | files read |", "|---|---|---|---|---|", *rows]
    rot = [
        f"- **{night.experiment}/{found.checkpoint}** in {found.place}: {found.problem}. {_sentence(found.cure)}"
        for night in nights
        for each in night.rechecked
        for found in each.rotten
    ]
    problems = [f"- **{night.experiment}**: {' '.join(problem.split())}" for night in nights for problem in night.problems]
    busy = [f"- **{night.experiment}**: {night.busy}" for night in nights if night.busy]
    parts = [("Rotten", rot), ("In the way", problems), ("Left to another flow", busy)]
    below = [text for title, lines in parts if lines for text in ("", f"## {title}", "", *lines)]
    return "\n".join([*(table if rows else ["No experiment has checkpoints."]), *below]) + "\n"


def _row(night: Night) -> str:
    news = night.news
    cells = [_names(news.registered), _names(news.scored), _champion(news)] if news else ["", "", "not evaluated"]
    return f"| {' | '.join([night.experiment, *cells, _read(night.rechecked)])} |"


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _champion(news: News) -> str:
    if news.after is None:
        return "none"
    if not news.champion_moved:
        return news.after.name
    return f"**{news.after.name}**, before: {news.before.name if news.before else 'none'}; {news.after.reason}"


def _read(rechecked: Sequence[Rechecked]) -> str:
    local, stored = sum(each.local for each in rechecked), sum(each.stored for each in rechecked)
    read, left = sum(each.read for each in rechecked), sum(each.left for each in rechecked)
    there = f"; in the storage {stored:,} files seen, {_gigabytes(read)} of {_gigabytes(read + left)} read" if stored else ""
    return f"all of {local:,} checkpoints here{there}"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
