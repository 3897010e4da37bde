"""The journal's curves as tables, for `dvc plots`: a file each, because that is what a stage's plot is in `dvc.yaml`."""

from __future__ import annotations

from collections.abc import Sequence

from model import disk
from model.run_folder import RunFolder
from model.training.journal import Event, read_current

POINTS = 1000
"""At most so many rows a table: a plot has no more columns of pixels, and DVC reads all of it for every plot."""

CURVES = {"loss": ("step", "loss"), "validation_loss": ("validation", "loss"), "tokens_per_s": ("step", "tokens_per_s")}
"""Each table's name, which is its column's, too: the journal's event, and the field of it that is drawn against the step."""


def write_curves(folder: RunFolder) -> None:
    """Write the tables `runs/<experiment>/curves/<name>.csv` from what still holds of the journal. Each row is one of its events; the
    last one always is among them."""
    events = read_current(folder.journal)
    folder.curves.mkdir(parents=True, exist_ok=True)
    for name, (kind, field) in CURVES.items():
        points = [event for event in events if event["event"] == kind and event.get(field) is not None]
        rows = [f"{event['step']},{event[field]}" for event in _thinned(points)]
        disk.write_file(folder.curves / f"{name}.csv", ("\n".join([f"step,{name}", *rows]) + "\n").encode())


def _thinned(points: Sequence[Event]) -> Sequence[Event]:
    if len(points) <= POINTS:
        return points
    return [points[round(place * (len(points) - 1) / (POINTS - 1))] for place in range(POINTS)]
