from __future__ import annotations

import json
from typing import Any

from tasks.news import Champion, news, standing
from tasks.project import Project
from tests.tasks.conftest import NAME


def write(project: Project, registered: list[int], scored: list[tuple[int, str]], champion: dict[str, Any] | None) -> None:
    """Checkpoints by their steps, the scored ones with their keys."""
    folder = project.run_folder(NAME)
    folder.registered.write_text(json.dumps([{"name": f"step {step}", "digest": f"digest {step}"} for step in registered]))
    rows = [{"name": f"step {step}", "digest": f"digest {step}", "key": key, "reason": f"reason {step}"} for step, key in scored]
    folder.scores.write_text(json.dumps({"champion": champion, "checkpoints": rows}))


def test_what_is_new(project: Project) -> None:
    nothing = standing(project, NAME)
    assert news(nothing, nothing).champion_moved is False
    write(project, [10], [(10, "a")], {"name": "step 10", "digest": "digest 10", "version": "1"})
    first = standing(project, NAME)
    new = news(nothing, first)
    assert (new.registered, new.scored) == (["step 10"], ["step 10"])
    assert (new.before, new.after) == (None, Champion("digest 10", "step 10", "reason 10"))
    assert new.champion_moved

    write(project, [10, 20], [(10, "b"), (20, "c")], {"name": "step 20", "digest": "digest 20", "version": "2"})
    second = standing(project, NAME)
    new = news(first, second)
    assert (new.registered, new.scored) == (["step 20"], ["step 10", "step 20"]), "step 10 was scored under another key"
    assert new.champion_moved
    assert not news(second, second).champion_moved


def test_a_champion_from_elsewhere_is_called_by_its_version(project: Project) -> None:
    write(project, [10], [(10, "a")], {"name": None, "digest": "another", "version": "7"})
    assert standing(project, NAME).champion == Champion("another", "version 7", "chosen elsewhere")


def test_an_alias_that_was_removed_is_no_news(project: Project) -> None:
    write(project, [10], [(10, "a")], {"name": "step 10", "digest": "digest 10", "version": "1"})
    before = standing(project, NAME)
    write(project, [10], [(10, "a")], None)
    assert not news(before, standing(project, NAME)).champion_moved


def test_where_a_file_is_damaged_nobody_knows_who_was_champion(project: Project) -> None:
    champion = {"name": "step 10", "digest": "digest 10", "version": "1"}
    write(project, [10], [(10, "a")], champion)
    project.run_folder(NAME).scores.write_text('{"champ')
    before = standing(project, NAME)
    write(project, [10], [(10, "a")], champion)
    new = news(before, standing(project, NAME))
    assert (new.after is not None, new.champion_moved) == (True, False)
