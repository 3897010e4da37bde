"""How checkpoints look in a terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

from tasks.overview import checkpoint_list, example_question
from tasks.project import Project


def print_result(project: Project, name: str) -> None:
    """What came of a flow, and what to do with it."""
    console = Console(soft_wrap=True, highlight=False)
    console.print()
    console.print(table(checkpoint_list(project, name)))
    console.print("\nNext:")
    suggestions = {
        f'gpt2 generate {name} "{example_question(project, name)}"': "the champion writes on",
        f"gpt2 checkpoints {name} --verify": "is every byte as it was written?",
        f"gpt2 export {name} exported/": "the champion for transformers",
        "gpt2 services": "Prefect's and MLflow's pages: runs, curves, answers, registry",
    }
    for command, what in suggestions.items():
        console.print(f"  {command:<{max(map(len, suggestions))}}  {what}", markup=False)


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows of `tasks.overview.checkpoint_list`."""
    made = Table(caption="bits/byte: validation text, lower is better · exact match: held-out questions")
    made.add_column("checkpoint", no_wrap=True)
    for column in ("step", "bits/byte", "exact match", "version"):
        made.add_column(column, justify="right")
    made.add_column("champion", justify="center")
    made.add_column("whole", justify="center")
    for row in rows:
        bits, match = row["validation_bits_per_byte"], row["exact_match"]
        made.add_row(
            row["name"],
            f"{row['step']:,}",
            "" if bits is None else f"{bits:.3f}",
            "" if match is None else f"{match:.0%} of {row['questions']:.0f}",
            row["version"] or "",
            "★" if row["champion"] else "",
            "yes" if row["whole"] else "NO",
        )
    return made
