from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from model.run_folder import RunFolder
from model.training.journal import Journal
from tasks.curve_image import loss_curve

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    (tmp_path / "a_run").mkdir()
    return RunFolder(tmp_path / "a_run")


def train(folder: RunFolder, first: int, last: int, validate_every: int = 100, loss: float = 0.0) -> None:
    journal = Journal(folder.journal)
    journal.append("started", step=first - 1, config_digest="c")
    for step in range(first, last + 1):
        journal.append("step", step=step, loss=loss or 3 + 8 * math.exp(-step / 100) + math.sin(step) / 10)
        if step % validate_every == 0:
            journal.append("validation", step=step, loss=3.5 + 4 * math.exp(-step / 100))
    journal.close()


def words(picture: str) -> list[str]:
    return ["".join(text.itertext()) for text in ET.fromstring(picture).iter(f"{SVG}text")]


def kinds(picture: str) -> set[str]:
    return {path.get("class", "") for path in ET.fromstring(picture).iter(f"{SVG}path")}


def test_both_curves_with_their_axes(folder: RunFolder) -> None:
    train(folder, 1, 1000)
    picture = loss_curve(folder, 640, 300)
    root = ET.fromstring(picture)
    assert (root.get("width"), root.get("height")) == ("640", "300")
    assert {"grid", "train line", "train band", "held line", "held dots"} <= kinds(picture)
    title, *labels = words(picture)
    assert title.startswith("Loss, nats per token")
    assert float(re.search(r"training ([0-9.]+)", title)[1]) == pytest.approx(3.0, abs=0.05)  # type: ignore[index]
    assert "validation 3.500" in title
    assert {"200", "400", "1 k", "step"} <= set(labels)
    assert {"5.0", "10.0"} <= set(labels)


def test_it_refers_to_nothing_outside_itself(folder: RunFolder) -> None:
    train(folder, 1, 20)
    picture = loss_curve(folder).replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not [word for word in ("http", "href", "url(", "<script", "@import", "<image") if word in picture]


def test_a_long_run_stays_small_and_is_drawn_whole(folder: RunFolder) -> None:
    train(folder, 1, 60_000, validate_every=500)
    picture = loss_curve(folder)
    assert len(picture.encode()) < 30_000
    assert {"20 k", "60 k"} <= set(words(picture))
    across = [float(x) for x in re.findall(r"[ML]([0-9.]+) ", next(line for line in picture.split("<path") if "train line" in line))]
    assert across[0] < 5
    assert across[-1] > 995


def test_what_a_resume_took_back_is_not_in_it(folder: RunFolder) -> None:
    train(folder, 1, 50, loss=2.0)
    train(folder, 21, 40, loss=4.0)
    title, *labels = words(loss_curve(folder))
    assert "training 4.000" in title
    assert "50" not in labels


def test_before_the_first_step_it_says_so_and_one_step_is_a_dot(folder: RunFolder) -> None:
    assert words(loss_curve(folder))[-1] == "No step is done yet."
    train(folder, 1, 1)
    picture = loss_curve(folder)
    assert "train dots" in kinds(picture)
    assert "held dots" not in kinds(picture)


def test_losses_that_are_not_finite_are_left_out(folder: RunFolder) -> None:
    train(folder, 1, 30, loss=2.0)
    journal = Journal(folder.journal)
    journal.append("step", step=31, loss=None)
    journal.append("validation", step=31, loss=None)
    journal.close()
    picture = loss_curve(folder)
    assert "nan" not in picture.lower()
    assert "training 2.000" in words(picture)[0]
    assert "validation" not in words(picture)[0]
