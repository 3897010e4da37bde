"""The report's page: the same inputs give the same bytes."""

from __future__ import annotations

from pathlib import Path

from model import disk
from tasks.project import Project
from tasks.report import provenance, scored, training, tuned
from tasks.report.facts import Facts, gather
from tasks.report.html import Html, el
from tasks.report.style import CSS

NAME = "report.html"


def write_report(project: Project, name: str) -> Path:
    """Make the page of a run in `runs/NAME/report`; where it lies.

    Raises:
        UserError: no such experiment, nothing of it was trained yet, or a file is damaged.
    """
    folder = project.run_folder(name).report
    made = page(gather(project, name))
    folder.mkdir(exist_ok=True)
    disk.write_file(folder / NAME, made.encode())
    return folder / NAME


def page(facts: Facts) -> str:
    """The whole page as HTML. Nothing in it refers to anything outside of it."""
    parts = [
        ("curves", "Curves", training.curves(facts)),
        ("tuned", "Base and tuned", tuned.base_and_tuned(facts)),
        ("checkpoints", "Checkpoints", scored.checkpoints(facts)),
        ("samples", "What it writes", scored.samples(facts)),
        ("exercises", "Exercises", scored.exercises(facts)),
        ("benchmarks", "Benchmarks", scored.benchmarks(facts)),
        ("data", "Data", provenance.data(facts)),
        ("costs", "Time and energy", provenance.costs(facts)),
        ("reproduce", "How to reproduce it", provenance.reproduction(facts)),
    ]
    links = el("nav", [el("a", title, href=f"#{place}") for place, title, part in parts if part], aria_label="Parts of this page")
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", f"{facts.name} · training report"),
        el("style", Html(CSS)),
    )
    body = el("body", training.headline(facts), links, el("main", [part for _, _, part in parts]), _footer())
    return f"<!doctype html>\n{el('html', head, body, lang='en')}\n"


def _footer() -> Html:
    return el("footer", "Made by gpt2-from-scratch from the files of the run alone; it refers to nothing outside itself.", class_="quiet")
