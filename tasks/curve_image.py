"""The loss curve as one small picture: SVG without a script that refers to nothing outside itself, for places that take an image.

Who shows it decides on the background, so its colours are between light and dark and stand out from either.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from model.run_folder import RunFolder
from model.training.journal import Event, parse, without_superseded
from tasks.report.charts import Plot, axis_for, span_of, tick_labels
from tasks.report.html import Html, compact, el

_LEFT, _RIGHT, _TOP, _BOTTOM = 48.0, 14.0, 34.0, 42.0
"""Around the plot, for its labels; in pixels, as all sizes here."""
_STEPS_READ = 20_000
"""Of more steps only some are read: a picture has a few hundred columns, and it is drawn again and again while training goes on."""
_STEP = b'"event": "step"'
_CSS = """
text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif;fill:#787f89}
path{fill:none;stroke:currentColor;stroke-width:1.75;vector-effect:non-scaling-stroke;stroke-linejoin:round}
.grid{stroke:#8089934d;stroke-width:1}.band{fill:currentColor;stroke:none;opacity:.25}.dots{stroke-width:5;stroke-linecap:round}
.train{color:#3f83d6}.held{color:#dd6a1f}svg svg{overflow:visible}tspan{fill:currentColor;font-weight:600}
"""


def loss_curve(folder: RunFolder, width: int = 720, height: int = 320) -> str:
    """The loss of a run against its steps, in nats per token: training smoothed over a band of all its values, and validation; beside
    their names where they are now, training as the mean of its last steps. What a resume superseded is left out.

    Args:
        folder: the run's; its journal is read.
        width: of the picture, in pixels; not below 400.
        height: of the picture, in pixels; not below 140.
    """
    events = _events(folder.journal)
    steps, losses = _curve(events, "step")
    validated_at, validated = _curve(events, "validation")
    plot = Plot(span_of(np.concatenate([steps, validated_at])), axis_for(np.concatenate([losses, validated])))
    plot.curve(steps, losses, "train", smooth=True)
    plot.curve(validated_at, validated, "held", smooth=False)
    for at, values, kind, few in ((steps, losses, "train", 7), (validated_at, validated, "held", 60)):
        if len(values) <= few:
            plot.dots(at, values, kind)
    across, down = width - _LEFT - _RIGHT, height - _TOP - _BOTTOM
    x_ticks = [tick for tick in plot.x.ticks(max(2, int(across / 90))) if tick == round(tick)]
    y_ticks = plot.y.ticks(max(2, int(down / 50)))
    x_places = zip(map(compact, x_ticks), _LEFT + across * plot.x.place(np.array(x_ticks)), strict=True)
    y_places = zip(tick_labels(y_ticks), _TOP + down * (1 - plot.y.place(np.array(y_ticks))), strict=True)
    inside = [
        plot.picture(y_ticks, x=_LEFT, y=_TOP, width=across, height=down),
        [_label(x, _TOP + down + 17, words, "middle") for words, x in x_places],
        [_label(_LEFT - 8, y + 4, words, "end") for words, y in y_places],
        _label(_LEFT + across, _TOP + down + 34, "step", "end"),
    ]
    ends = [("train", "training", losses[-max(10, len(losses) // 100) :]), ("held", "validation", validated[-1:])]
    legend = [el("tspan", f"{name} {values.mean():.3f}", class_=kind, dx=14) for kind, name, values in ends if len(values)]
    return el(
        "svg",
        el("title", f"Loss of {folder.experiment}"),
        el("style", Html(_CSS)),
        el("text", "Loss, nats per token", legend, x=8, y=20),
        inside if legend else _label(width / 2, height / 2, "No step is done yet.", "middle"),
        xmlns="http://www.w3.org/2000/svg",
        width=width,
        height=height,
        viewBox=f"0 0 {width} {height}",
        role="img",
    )


def _events(journal: Path) -> list[Event]:
    """The events of a journal that still hold; of very many steps, evenly chosen ones and the last."""
    try:
        lines = journal.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    steps = [number for number, line in enumerate(lines) if _STEP in line]
    chosen = set(steps[:: max(1, math.ceil(len(steps) / _STEPS_READ))]) | set(steps[-1:])
    left_out = set(steps) - chosen
    events = (parse(line) for number, line in enumerate(lines) if number not in left_out)
    return list(without_superseded([event for event in events if event is not None]))


def _curve(events: list[Event], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and losses of the events of a kind, without losses that are not finite."""
    found = [(event["step"], event["loss"]) for event in events if event["event"] == kind and event.get("loss") is not None]
    steps, losses = np.array(found, dtype=np.float64).reshape(-1, 2).T
    return steps, losses


def _label(x: float, y: float, words: str, anchor: str) -> Html:
    return el("text", words, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)
