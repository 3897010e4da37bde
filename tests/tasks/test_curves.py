"""The journal's curves as tables for `dvc plots`."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from model.run_folder import RunFolder
from model.training.journal import Journal
from tasks.curves import POINTS, write_curves


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def journal(folder: RunFolder) -> Journal:
    folder.path.mkdir(exist_ok=True)
    return Journal(folder.journal)


def rows(folder: RunFolder, name: str) -> list[str]:
    return (folder.curves / f"{name}.csv").read_text().splitlines()


def test_each_figure_is_a_table_by_step(folder: RunFolder) -> None:
    events = journal(folder)
    events.append("started", step=0)
    events.append("step", step=1, loss=10.5, tokens_per_s=2000)
    events.append("step", step=2, loss=None, tokens_per_s=2100)  # it was not finite
    events.append("validation", step=2, loss=9.25)
    write_curves(folder)
    assert rows(folder, "loss") == ["step,loss", "1,10.5"]
    assert rows(folder, "tokens_per_s") == ["step,tokens_per_s", "1,2000", "2,2100"]
    assert rows(folder, "validation_loss") == ["step,validation_loss", "2,9.25"]


def test_steps_that_a_resume_took_again_are_there_once(folder: RunFolder) -> None:
    events = journal(folder)
    events.append("started", step=0)
    for step in (1, 2, 3):
        events.append("step", step=step, loss=float(step), tokens_per_s=1)
    events.append("started", step=1, resumed_from="step_00000001")
    events.append("step", step=2, loss=2.5, tokens_per_s=1)
    write_curves(folder)
    assert rows(folder, "loss") == ["step,loss", "1,1.0", "2,2.5"]


def test_a_long_run_is_thinned_and_keeps_both_ends(folder: RunFolder) -> None:
    events = journal(folder)
    for step in range(1, 5 * POINTS + 1):
        events.append("step", step=step, loss=1 / step, tokens_per_s=1)
    write_curves(folder)
    steps = [int(row.partition(",")[0]) for row in rows(folder, "loss")[1:]]
    assert len(steps) == POINTS
    assert (steps[0], steps[-1]) == (1, 5 * POINTS)
    assert max(b - a for a, b in itertools.pairwise(steps)) <= 6


def test_before_the_first_step_the_tables_are_empty(folder: RunFolder) -> None:
    folder.path.mkdir()
    write_curves(folder)
    assert rows(folder, "loss") == ["step,loss"]


def test_a_table_that_dvc_linked_into_its_cache_is_replaced_not_written_over(folder: RunFolder, tmp_path: Path) -> None:
    folder.path.mkdir()
    write_curves(folder)
    linked = tmp_path / "cached"
    linked.hardlink_to(folder.curves / "loss.csv")
    journal(folder).append("step", step=1, loss=1.0, tokens_per_s=1)
    write_curves(folder)
    assert linked.read_text() == "step,loss\n"
    assert rows(folder, "loss") == ["step,loss", "1,1.0"]
