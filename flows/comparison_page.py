"""How a comparison of two checkpoints looks in a terminal."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tasks.compare import Comparison, Figure

_NAMES = {
    "text_bits_per_byte": "text, bits/byte",
    "answer_bits_per_byte": "answer, bits/byte",
    "answer_alone_bits_per_byte": "  without reasoning",
    "distractor_accuracy": "gold answer ranked first",
    "distractor_rank": "its rank, 1 to 4",
    "format_adherence": "format",
    "exact_match": "exact match",
    "token_f1": "token F1",
}
_SHARES = {"distractor_accuracy", "format_adherence", "exact_match", "token_f1"}


def print_comparison(comparison: Comparison) -> None:
    """Both, their figures on the reporting half, and what the champion rule says on the choosing half."""
    console = Console(highlight=False)
    console.print(Text(f"A  {comparison.a}\nB  {comparison.b}"))
    made = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    made.add_column("", no_wrap=True)
    for column in ("A", "B", "B - A", "95 % interval", "items"):
        made.add_column(column, justify="right", no_wrap=True)
    for figure in comparison.figures:
        made.add_row(_NAMES[figure.key], *_cells(figure), f"{figure.items:,}")
    console.print(made)
    console.print(Text("Of the reporting half, paired item by item, clustered by article. Bits and rank: lower is better.", style="dim"))
    outcome = {"a": "A wins", "b": "B wins", None: "Neither wins"}[comparison.winner]
    console.print(Text(f"{outcome} by the champion rule, on the choosing half: {comparison.reason}."))
    console.print(Text("No alias was moved.", style="dim"))


def _cells(figure: Figure) -> list[str]:
    def shown(value: float | None, sign: str = "") -> str:
        if value is None:
            return ""
        return f"{100 * value:{sign}.1f} %" if figure.key in _SHARES else f"{value:{sign}.3f}"

    interval = "" if figure.low is None else f"{shown(figure.low, '+')} to {shown(figure.high, '+')}"
    return [shown(figure.a), shown(figure.b), shown(figure.difference, "+"), interval]
