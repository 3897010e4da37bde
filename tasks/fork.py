"""Beginning a new experiment with a checkpoint of another one, and beginning one anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from model import disk
from model.checkpoint.store import Checkpoint, CheckpointStore, NotWhole, is_name, open_checkpoint
from model.errors import UserError
from model.params import check_experiment_name, load_experiment, merge, parse_yaml
from model.training.lock import held
from tasks.project import PARAMS, Project
from tasks.starting_point import locate


def fork(project: Project, name: str, new: str, overrides: dict[str, Any]) -> Checkpoint:
    """Write the experiment `new` into params.yaml: `name` as it stands, with `overrides`, beginning with `name`'s checkpoint that the
    override `checkpoint.checkpoint_to_resume` names, else with its newest whole one. Returns that checkpoint.

    Raises:
        UserError: there is a `new` already, a field is wrong, or there is no such checkpoint; nothing was changed.
    """
    check_experiment_name(new)
    wanted = overrides.get("checkpoint", {}).get("checkpoint_to_resume")
    params = _read(project)
    if new in params["experiments"]:
        raise UserError(f"--fork: {PARAMS} has an experiment {new} already; choose another name")
    project.with_overrides(name, overrides)
    checkpoint = _pick(project, name, wanted)
    entry = merge(merge(params["experiments"][name] or {}, project.overrides(name)), overrides)
    lineage = {"experiment": name, "checkpoint": checkpoint.name, "digest": checkpoint.digest}
    kept = {key: value for key, value in entry.get("checkpoint", {}).items() if key != "checkpoint_to_resume"}
    entry["checkpoint"] = {**kept, "fork_of": lineage}
    _append(project, new, entry)
    return checkpoint


def anew(project: Project, name: str) -> Path | None:
    """Set the run's checkpoints and journal aside, so that the next training begins at step 0; returns where they are now, None if there
    was nothing. What lies in the storage is set aside by that training.

    Raises:
        UserError: it is being trained.
    """
    project.experiment(name)
    folder = project.run_folder(name)
    store = CheckpointStore(folder.checkpoints)
    if not folder.path.exists():
        return None
    with held(folder.lock, f"the run {name}"):
        number = 1
        while (where := folder.aside / f"anew_{number}").exists():
            number += 1
        found = [*store.folders(), *(path for path in (folder.journal, folder.metrics) if path.exists())]
        if found:
            store.set_aside(store.folders(), where / "checkpoints")
            for path in found:
                if path.exists():
                    disk.rename(path, where / path.name)
        disk.write_file(folder.begin_anew, b"")
    return where if found else None


def _pick(project: Project, name: str, wanted: str | None) -> Checkpoint:
    store = CheckpointStore(project.run_folder(name).checkpoints)
    try:
        if wanted is None:
            found = store.newest_whole(lambda message: None)
            if found is None:
                raise UserError(f"--fork: {name} has no checkpoint to begin with; train it first: gpt2 train {name}")
            return found
        checkpoint = open_checkpoint(store.folder / wanted if is_name(wanted) else locate(project, name, wanted))
        checkpoint.verify()
    except NotWhole as error:
        have = ", ".join(path.name for path in store.folders()) or "none"
        raise UserError(f"checkpoint.checkpoint_to_resume: {error}; there is {have}") from None
    return checkpoint


def _read(project: Project) -> dict[str, Any]:
    params = parse_yaml((project.root / PARAMS).read_text(encoding="utf-8"), PARAMS)
    return dict(params)


def _append(project: Project, new: str, entry: dict[str, Any]) -> None:
    """Add an experiment at the end of params.yaml, whose comments stay. It is read again before it is written."""
    path = project.root / PARAMS
    before = path.read_text(encoding="utf-8")
    block = yaml.safe_dump({new: entry}, sort_keys=False, allow_unicode=True, width=120)
    text = before.rstrip("\n") + "\n\n" + "".join(f"  {line}\n" for line in block.splitlines())
    expected = _read(project)
    expected["experiments"] = {**expected["experiments"], new: entry}
    try:
        right = parse_yaml(text, PARAMS) == expected
    except UserError:
        right = False
    if not right:
        raise UserError(f"--fork: {PARAMS} does not end with its experiments; add this one to them yourself, then train it: {block!r}")
    load_experiment(expected, new)
    disk.write_file(path, text.encode())
