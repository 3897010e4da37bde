"""How checkpoints look in a terminal."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tasks.overview import champion_line, checkpoint_list, example_question, gain_line
from tasks.post_training import tuned_from
from tasks.project import Project


def print_result(project: Project, name: str) -> None:
    """What came of a flow, and what to do with it."""
    console = Console(soft_wrap=True, highlight=False)
    console.print()
    print_checkpoints(project, name, checkpoint_list(project, name))
    console.print("\nNext:")
    suggestions = {
        f'gpt2 generate {name} "{example_question(project, name)}"': "the champion writes on",
        f"gpt2 checkpoints {name} --verify": "is every byte as it was written?",
        f"gpt2 export {name} exported/": "the champion for transformers",
    }
    if project.is_post_training(name):
        suggestions[f"gpt2 chat {name}"] = "ask it"
    elif tuned := tuned_from(project, name):
        suggestions[f"gpt2 post-train {tuned[0] if len(tuned) > 1 else name}"] = "the champion learns to answer"
    suggestions["gpt2 services"] = "Prefect's and MLflow's pages: runs, curves, answers, registry"
    for command, what in suggestions.items():
        console.print(f"  {command:<{max(map(len, suggestions))}}  {what}", markup=False)


def print_checkpoints(project: Project, name: str, rows: list[dict[str, Any]]) -> None:
    """The table of `tasks.overview.checkpoint_list`, what its columns mean, and why the champion is champion."""
    console = Console(highlight=False)
    console.print(table(rows))
    scored = next((row for row in reversed(rows) if row["answer_bits_per_byte"] is not None), None)
    if scored is not None:
        console.print(Text(legend(scored), style="dim"))
    if line := champion_line(project, name):
        console.print(Text(line[0].upper() + line[1:]))
    if line := gain_line(project, name):
        console.print(Text(line[0].upper() + line[1:]))


def legend(row: dict[str, Any]) -> str:
    """What the columns mean, by the counts of a row that has scores."""
    return (
        f"Of {row['items']:.0f} held-out samples, ± half the 95 % interval. text, answer: bits per byte, lower is better; answer: the gold "
        f"answer given question and gold reasoning. exact: of {row['checkable']:.0f} answers that can be checked. format: of "
        f"{row['questions']:.0f} answers, those with reasoning, answer and end in their places. ★ champion, best: lowest validation loss."
    )


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows of `tasks.overview.checkpoint_list`, in 80 columns."""
    made = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    made.add_column("checkpoint", no_wrap=True)
    for column in ("text", "answer", "exact", "format", "version"):
        made.add_column(column, justify="right", no_wrap=True)
    made.add_column("", no_wrap=True)
    made.add_column("whole", justify="right", no_wrap=True)
    for row in rows:
        made.add_row(
            row["name"],
            _bits(row, "text_bits_per_byte").partition(" ")[0],
            _bits(row, "answer_bits_per_byte"),
            _share(row, "exact_match"),
            _share(row, "format_adherence").partition(" ")[0],
            row["version"] or "",
            _marks(row),
            "yes" if row["whole"] else "NO",
        )
    return made


def cells(row: dict[str, Any]) -> dict[str, Any]:
    """A row of `tasks.overview.checkpoint_list` as Prefect's page shows it: figures with their intervals. What matters comes first: a page
    1,280 pixels wide cuts off what follows the version."""
    return {
        "checkpoint": row["name"],
        "mark": _marks(row),
        "text": _bits(row, "text_bits_per_byte"),
        "answer": _bits(row, "answer_bits_per_byte"),
        "exact": _share(row, "exact_match"),
        "format": _share(row, "format_adherence"),
        "version": row["version"] or "",
        "why": row["reason"] or "",
        "digest": row["digest"] or "",
    }


def _marks(row: dict[str, Any]) -> str:
    return " ".join(mark for mark, marked in (("base", row["base"]), ("★", row["champion"]), ("best", row["best"])) if marked)


def _bits(row: dict[str, Any], key: str) -> str:
    return "" if row[key] is None else f"{row[key]:.3f}{_reach(row, key, 1, 3)}"


def _share(row: dict[str, Any], key: str) -> str:
    return "" if row[key] is None else f"{row[key]:.0%}{_reach(row, key, 100, 0)}"


def _reach(row: dict[str, Any], key: str, scale: float, digits: int) -> str:
    """How far the 95 % interval reaches to either side: ` ±0.021`; nothing if there is none."""
    interval = (row["intervals"] or {}).get(key)
    return f" ±{scale * (interval[1] - interval[0]) / 2:.{digits}f}" if interval else ""
