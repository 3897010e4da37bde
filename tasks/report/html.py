"""HTML that is safe by default: whatever is not markup already is escaped, and secrets in it are hidden."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable

from model.secrets import SHORTEST, redacted


class Html(str):
    """Markup: not escaped again."""

    __slots__ = ()


Part = str | int | float | None | Iterable["Part"]
"""Text, markup, a number, nothing, or several of them."""

_VOID = {"meta", "line", "path", "polygon", "br"}


def text(value: Part) -> Html:
    """As markup."""
    if value is None:
        return Html()
    if isinstance(value, Html):
        return value
    if isinstance(value, str):
        return Html(html.escape(redacted(value) if len(value) >= SHORTEST else value))
    if isinstance(value, int | float):
        return Html(value)
    return Html("".join(map(text, value)))


def el(tag: str, *children: Part, **attributes: str | float | None) -> Html:
    """One element. `class_` is class, `data_step` is data-step; an attribute that is None is left out."""
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{text(str(value))}"' for name, value in attributes.items() if value is not None
    )
    if tag in _VOID:
        return Html(f"<{tag}{written}>" if tag in ("meta", "br") else f"<{tag}{written}/>")
    return Html(f"<{tag}{written}>{text(children)}</{tag}>")


def facts_list(rows: Iterable[tuple[str, Part]]) -> Html:
    """Terms with what is known of them; rows without a value are left out."""
    return el("dl", [el("div", el("dt", term), el("dd", value)) for term, value in rows if value not in (None, "")], class_="facts")


def table(head: list[Part], rows: Iterable[tuple[list[Part], str | None]], label: str, class_: str = "scroll") -> Html:
    """A table that scrolls sideways where the screen is narrow; each row with its class. The first cell of a row names it."""
    body = [el("tr", el("th", cells[0], scope="row"), [el("td", cell) for cell in cells[1:]], class_=kind) for cells, kind in rows]
    heads = el("tr", [el("th", cell, scope="col") for cell in head])
    return el("div", el("table", el("thead", heads), el("tbody", body)), class_=class_, tabindex=0, role="region", aria_label=label)


def folded(summary: Part, *inside: Part, opened: bool = False, class_: str | None = None) -> Html:
    """Shown on request; on paper always, unless its class is `screen`."""
    made = el("details", el("summary", summary), inside, class_=class_)
    return Html(made.replace("<details", "<details open", 1)) if opened else made


def number(value: float | None, digits: int = 3) -> str:
    """`0.294`; a dash if there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """`62 %`."""
    return "–" if value is None else f"{100 * value:.1f} %" if value < 0.1 else f"{100 * value:.0f} %"


def between(interval: tuple[float, float] | None, show: Callable[[float], str]) -> str | None:
    """`0.281–0.306`. None if there is none, or if it has no width: then all items are alike, and how far off they may be is not known."""
    if not interval or interval[0] == interval[1]:
        return None
    low, high = map(show, interval)
    return f"{low.removesuffix(' %')}–{high}" if high.endswith(" %") else f"{low}–{high}"


def size(number: int) -> str:
    """Bytes: `450 GB`."""
    return f"{compact(number).replace('B', 'G')}B" if number >= 1000 else f"{number} bytes"


def compact(value: float, digits: int = 3) -> str:
    """`900`, `259 k`, `1.25 B`: so many digits at most."""
    magnitude = abs(value)
    for size, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")):
        if magnitude >= (1 - 0.5 * 10**-digits) * size:
            return f"{_with_digits(value / size, digits)}{unit}"
    return _with_digits(value, digits)


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.4 h`, `5.2 days`."""
    for unit, length, from_ in (("days", 86_400, 2 * 86_400), ("h", 3600, 3600), ("min", 60, 90)):
        if seconds >= from_:
            return f"{_with_digits(seconds / length)} {unit}"
    return f"{_with_digits(seconds)} s"


def _with_digits(value: float, digits: int = 3) -> str:
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    shown = f"{value:.{decimals}f}"
    return shown.rstrip("0").rstrip(".") if "." in shown else shown
