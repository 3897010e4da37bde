"""Curves as SVG without a script. The plot stretches to any width; its labels are HTML beside it, so they keep their size on a phone.

However long a run is, a curve has at most `_COLUMNS` points: of each column of the plot the lowest and the highest value are drawn as a
band, and over it the mean, smoothed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tasks.report.html import Html, compact, el

_WIDTH, _HEIGHT = 1000.0, 400.0
_COLUMNS = 400
_SMOOTHED_OVER = 0.01
"""Standard deviation of the smoothing's bell curve, as a share of the plot's width."""
_LOG_FROM = 4.0
"""A logarithmic axis is chosen if the highest value is so many times the lowest."""


@dataclass(frozen=True)
class Axis:
    """Values between `low` and `high` as shares of the plot's width or height."""

    low: float
    high: float
    log: bool = False

    def place(self, values: np.ndarray) -> np.ndarray:
        """0 at `low`, 1 at `high`."""
        low, high = self.low, self.high
        if self.log:
            low, high, values = math.log(low), math.log(high), np.log(np.maximum(values, 1e-300))
        return np.asarray((values - low) / ((high - low) or 1.0))

    def ticks(self, wanted: int) -> list[float]:
        """Round values along it, about so many."""
        if self.log:
            for digits in ((1, 1.5, 2, 3, 4, 5, 6, 7, 8), (1, 1.5, 2, 3, 5, 7), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
                powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
                found = [digit * 10.0**power for power in powers for digit in digits]
                found = [tick for tick in found if self.low * 0.999 <= tick <= self.high * 1.001]
                if len(found) <= wanted + 1:
                    break
            return found[:: max(1, math.ceil(len(found) / (wanted + 1)))] if len(found) > 1 else [self.low, self.high]
        span = (self.high - self.low) or 1.0
        raw = span / wanted
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [step * n for n in range(first, math.floor(self.high / step + 1e-9) + 1)]


def axis_for(values: Iterable[float], log: bool | None = None, from_zero: bool = False) -> Axis:
    """An axis on which all of the values lie, with some room. `log` None: if they spread widely enough."""
    finite = [float(value) for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    if log is None:
        log = low > 0 and high / low >= _LOG_FROM
    if log and low > 0:
        room = (high / low) ** 0.04 if high > low else 1.1
        return Axis(low / room, high * room, log=True)
    room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    return Axis(0.0 if from_zero else low - room, high + room)


def span_of(values: Iterable[float], log: bool = False) -> Axis:
    """The axis from the first to the last value, without room beyond."""
    finite = [float(value) for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    return Axis(low, high, log and 0 < low < high) if high > low else Axis(low - 0.5, high + 0.5)


class Plot:
    """One chart in the making."""

    def __init__(self, x: Axis, y: Axis) -> None:
        self.x, self.y = x, y
        self._drawn: list[Html] = []

    def curve(self, x: np.ndarray, y: np.ndarray, kind: str, smooth: bool) -> None:
        """A line; with `smooth` its smoothed mean, over a faint band of all its values."""
        inside = np.isfinite(x) & np.isfinite(y)
        across, y = self.x.place(x[inside]), y[inside]
        if not smooth or len(y) < 8:
            self._path(*_thinned(across, y), kind)
            return
        columns, low, high, mean = _by_column(across, y)
        self._band(columns, low, high, kind)
        self._path(columns, mean, kind)

    def dots(self, x: np.ndarray, y: np.ndarray, kind: str) -> None:
        """A dot a value: a line of no length with round ends stays round however the plot is stretched."""
        inside = np.isfinite(x) & np.isfinite(y)
        across, down = _across(self.x.place(x[inside])), self._down(y[inside])
        if len(across):
            self._add("path", kind, "dots", d="".join(f"M{a} {b}h0" for a, b in zip(across, down, strict=True)))

    def whiskers(self, x: np.ndarray, low: np.ndarray, high: np.ndarray, kind: str) -> None:
        """An interval a value."""
        inside = np.isfinite(x) & np.isfinite(low) & np.isfinite(high)
        ends = zip(_across(self.x.place(x[inside])), self._down(low[inside]), self._down(high[inside]), strict=True)
        if inside.any():
            self._add("path", kind, "whiskers", d="".join(f"M{a} {b}V{c}" for a, b, c in ends))

    def level(self, y: float, kind: str) -> None:
        """A line across."""
        (down,) = self._down(np.array([y]))
        self._add("path", kind, d=f"M0 {down}H{_WIDTH:g}")

    def marks(self, x: Iterable[float], kind: str) -> None:
        """Upright lines, one a place."""
        places = sorted({round(float(place) * _WIDTH) for place in self.x.place(np.array(list(x)))})
        if places:
            top = _HEIGHT * 0.94 if kind == "warning" else 0
            self._add("path", "mark", kind, d="".join(f"M{place} {_HEIGHT:g}V{top:g}" for place in places if 0 <= place <= _WIDTH))

    def figure(self, title: str, note: str, legend: Iterable[tuple[str, str]], x_label: str) -> Html:
        """The chart. `legend`: kind of line and what it is; `note`: what to read from it, for those who cannot see it, too."""
        x_ticks, y_ticks = self.x.ticks(4), self.y.ticks(4)
        picture = self.picture(y_ticks, role="img", aria_label=f"{title}. {note}")
        places = zip(tick_labels(x_ticks), self.x.place(np.array(x_ticks)), strict=True)
        below = [el("span", label, class_="x", style=f"left:{100 * place:.1f}%") for label, place in places]
        places = zip(tick_labels(y_ticks), self.y.place(np.array(y_ticks)), strict=True)
        beside = [el("span", label, class_="y", style=f"bottom:{100 * place:.1f}%") for label, place in places]
        keys = [el("span", el("i", class_=f"key {kind}"), name) for kind, name in legend]
        return el(
            "figure",
            el("figcaption", el("b", title), el("span", keys, class_="legend")),
            el("div", picture, el("div", beside + below, aria_hidden="true"), class_="plot"),
            el("p", note, el("span", x_label, class_="axis"), class_="note"),
        )

    def picture(self, y_ticks: list[float], **attributes: str | float) -> Html:
        """All that was drawn, over lines at the ticks, without labels: an `svg` that stretches to whatever place `attributes` give it."""
        grid = "".join(f"M0 {down}H{_WIDTH:g}" for down in self._down(np.array(y_ticks)))
        inside = [el("path", class_="grid", d=grid), self._drawn]
        return el("svg", inside, viewBox=f"0 0 {_WIDTH:g} {_HEIGHT:g}", preserveAspectRatio="none", **attributes)

    def _add(self, tag: str, *kinds: str, **attributes: str) -> None:
        self._drawn.append(el(tag, class_=" ".join(kinds), **attributes))

    def _down(self, y: np.ndarray) -> list[str]:
        places = np.clip(1 - self.y.place(y), -0.1, 1.1) * _HEIGHT
        return [f"{place:.1f}".removesuffix(".0") for place in places]

    def _path(self, across: np.ndarray, y: np.ndarray, kind: str) -> None:
        if len(y):
            points = zip(_across(across), self._down(y), strict=True)
            self._add("path", kind, "line", d="M" + "L".join(f"{a} {b}" for a, b in points))

    def _band(self, across: np.ndarray, low: np.ndarray, high: np.ndarray, kind: str) -> None:
        there, back = _across(across), _across(across[::-1])
        outline = [*zip(there, self._down(high), strict=True), *zip(back, self._down(low[::-1]), strict=True)]
        self._add("path", kind, "band", d="M" + "L".join(f"{a} {b}" for a, b in outline) + "Z")


def _across(places: np.ndarray) -> list[str]:
    return [f"{place * _WIDTH:.1f}".removesuffix(".0") for place in places]


def _columns_of(across: np.ndarray) -> np.ndarray:
    return np.clip((across * _COLUMNS).astype(np.int64), 0, _COLUMNS - 1)


def _thinned(across: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last value of each column, and its lowest and highest: as a line, they look as all of them would."""
    if len(y) <= 2 * _COLUMNS:
        return across, y
    columns = _columns_of(across)
    kept: set[int] = set()
    for begin, end in _runs(columns):
        part = y[begin:end]
        kept |= {begin, begin + int(part.argmin()), begin + int(part.argmax()), end - 1}
    chosen = sorted(kept)
    return across[chosen], y[chosen]


def _by_column(across: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of each column that has values: where it lies, its lowest, its highest, and the smoothed mean around it."""
    columns = _columns_of(across)
    counts = np.bincount(columns, minlength=_COLUMNS).astype(np.float64)
    sums = np.bincount(columns, weights=y, minlength=_COLUMNS)
    places = np.bincount(columns, weights=across, minlength=_COLUMNS)
    reach = np.arange(-4 * _COLUMNS * _SMOOTHED_OVER, 4 * _COLUMNS * _SMOOTHED_OVER + 1)
    bell = np.exp(-0.5 * (reach / (_COLUMNS * _SMOOTHED_OVER)) ** 2)
    used = np.flatnonzero(counts)
    low, high = np.full(_COLUMNS, np.inf), np.full(_COLUMNS, -np.inf)
    np.minimum.at(low, columns, y)
    np.maximum.at(high, columns, y)
    # A column counts once however many steps lie in it: on a logarithmic axis the late ones have hundreds.
    means = np.divide(sums, counts, out=np.zeros(_COLUMNS), where=counts > 0)
    weights = np.convolve((counts > 0).astype(np.float64), bell, mode="same")
    smoothed = np.convolve(means, bell, mode="same") / np.maximum(weights, 1e-12)
    return (places / np.maximum(counts, 1))[used], low[used], high[used], smoothed[used]


def _runs(columns: np.ndarray) -> list[tuple[int, int]]:
    """Where each run of equal columns begins and ends."""
    edges = np.flatnonzero(np.diff(columns)) + 1
    return list(zip([0, *edges.tolist()], [*edges.tolist(), len(columns)], strict=True))


def tick_labels(ticks: list[float]) -> list[str]:
    """With as many digits as tell them apart."""
    largest = max(map(abs, ticks), default=0.0)
    for digits in range(1, 12):
        if largest >= 1000:
            labels = [compact(tick, max(3, digits)) for tick in ticks]
        elif largest < 0.01:
            labels = [_scientific(tick, digits) for tick in ticks]
        else:
            labels = [f"{tick:.{digits - 1}f}" for tick in ticks]
        if len(set(labels)) == len(labels) and all(_close(label, tick, largest) for label, tick in zip(labels, ticks, strict=True)):
            break
    return labels


def _close(label: str, tick: float, largest: float) -> bool:
    """Whether a label says what its tick is: to a hundredth of what lies around it."""
    return largest >= 1000 or abs(float(label) - tick) <= 0.01 * max(abs(tick), 1e-9 * largest)


def _scientific(value: float, digits: int) -> str:
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if value else "0"
