"""The histogram of document lengths."""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

_BARS = 40
"""At most so many bars in the histogram."""
_LOG_FROM = 20
"""Lengths are drawn on a logarithmic axis if the longest is so many times the shortest."""


def draw_lengths(path: Path, name: str, lengths: np.ndarray, max_length: int) -> None:
    """The histogram of document lengths, as an SVG whose labels are text. Equal lengths give equal bytes."""
    shortest, longest = int(lengths.min()), int(lengths.max())
    p5, median, p95 = (int(value) for value in np.percentile(lengths, [5, 50, 95], method="inverted_cdf"))
    logarithmic = longest >= _LOG_FROM * shortest
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.axvspan(p5, p95, color="#e8eef7", zorder=0, label=f"90% have {p5:,} to {p95:,}")
    axes.hist(lengths, _edges(shortest, longest, logarithmic), color="#4c78a8", edgecolor="white", linewidth=0.5)
    axes.axvline(median, color="#b5402a", label=f"median {median:,}")
    if max_length <= 2 * longest:
        axes.axvline(max_length, color="#333333", linestyle="--", label=f"one window: {max_length:,}")
    if logarithmic:
        axes.set_xscale("log")
        first, last = axes.get_xlim()
        ticks = [digit * 10**power for power in range(10) for digit in (1, 2, 5)]
        axes.set_xticks([tick for tick in ticks if first <= tick <= last])
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_title(f"{name}: how long the documents are", loc="left")
    axes.set_xlabel("tokens in a document, end-of-text included")
    axes.set_ylabel(f"documents, of {len(lengths):,} sampled")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with matplotlib.rc_context({"svg.hashsalt": "gpt2", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(partial, format="svg", metadata={"Date": None})
    os.replace(partial, path)


def _edges(shortest: int, longest: int, logarithmic: bool) -> list[float]:
    """Between whole numbers, so that every bar stands for as many lengths as it is wide."""
    growth = (longest / shortest) ** (1 / _BARS) if logarithmic else 1.0
    width = 4 if logarithmic else -(-(longest - shortest + 1) // _BARS)
    edges = [shortest]
    while edges[-1] <= longest:
        edges.append(max(edges[-1] + width, round(edges[-1] * growth)))
    return [edge - 0.5 for edge in edges]
