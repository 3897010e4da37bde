"""Where a training starts: which checkpoint it goes on from, and what belongs to another configuration.

Checkpoints of another configuration are never continued; they are moved to `aside/` and kept.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from model.checkpoint.store import Checkpoint, CheckpointStore, NotWhole, name_of, open_checkpoint, step_of
from model.config import RunConfig
from model.errors import NoWholeCheckpoint, UserError
from model.run_folder import RunFolder
from model.training.journal import Event, read_all, read_current


def set_aside_other_configurations(folder: RunFolder, config: RunConfig) -> Path | None:
    """Move what another configuration left (checkpoints, journal) to `aside/<its digest>/`; returns where, None if nothing was."""
    store = CheckpointStore(folder.checkpoints)
    started = [event["config_digest"] for event in read_all(folder.journal) if event["event"] == "started"]
    journal_digest = started[-1] if started else None
    strangers: dict[str, list[Path]] = {}
    for path in store.folders():
        digest = _config_digest(path) or journal_digest
        if digest not in (None, config.digest):
            strangers.setdefault(str(digest), []).append(path)
    where = None
    for digest, paths in strangers.items():
        where = folder.aside / digest[:12]
        store.set_aside(paths, where / "checkpoints")
    if journal_digest not in (None, config.digest):
        where = folder.aside / str(journal_digest)[:12]
        where.mkdir(parents=True, exist_ok=True)
        count = len(list(where.glob("journal*.jsonl")))
        folder.journal.rename(where / (f"journal.{count}.jsonl" if count else "journal.jsonl"))
    return where


def _config_digest(path: Path) -> str | None:
    try:
        return str(open_checkpoint(path).state()["config_digest"])
    except (NotWhole, OSError, ValueError, KeyError):
        return None


def starting_checkpoint(folder: RunFolder, config: RunConfig, report: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint to go on from; None to start at step 0. Damaged ones are passed over and reported.

    `checkpoint_to_resume` is obeyed once: when training has gone on from it, a restart goes on from the newest as ever.

    Raises:
        UserError: `checkpoint_to_resume` is not there, or not whole.
        NoWholeCheckpoint: there were checkpoints, and none is whole. Training never starts again silently.
    """
    store = CheckpointStore(folder.checkpoints)
    wanted = config.checkpoint.checkpoint_to_resume
    events = read_current(folder.journal)
    if wanted is not None and _wanted_last(events) != wanted:
        return _rewind(folder, store, wanted)
    newest = store.newest_whole(report)
    written = [event["name"] for event in events if event["event"] == "checkpoint"]
    if newest is None and written:
        raise NoWholeCheckpoint(
            f"the journal tells of {written[-1]}, but {folder.checkpoints} holds no checkpoint. "
            f"Bring them back (dvc checkout, dvc pull), or remove {folder.journal.name} beside it to start anew."
        )
    return newest


def _wanted_last(events: list[Event]) -> str | None:
    started = [event for event in events if event["event"] == "started"]
    return started[-1].get("checkpoint_to_resume") if started else None


def _rewind(folder: RunFolder, store: CheckpointStore, wanted: str) -> Checkpoint:
    path = folder.checkpoints / wanted
    if not path.is_dir():
        have = ", ".join(f.name for f in store.folders()) or "none"
        raise UserError(f"checkpoint.checkpoint_to_resume: {wanted} is not in {folder.checkpoints}; there is {have}")
    try:
        checkpoint = open_checkpoint(path)
        checkpoint.verify()
    except NotWhole as error:
        raise UserError(f"checkpoint.checkpoint_to_resume: {error}; choose another") from None
    later = [f for f in store.folders() if step_of(f.name) > checkpoint.step]
    if later:
        store.set_aside(later, folder.aside / f"after_{wanted}")
    return checkpoint


def rewind_after_spike(folder: RunFolder, step: int, every: int) -> Checkpoint | None:
    """The regular checkpoint at or before `step`, to go back to; None: the beginning. Later ones are set aside.

    Raises:
        NoWholeCheckpoint: it is not there or not whole. Another one would make the run depend on its faults.
    """
    step = step // every * every
    store, target = CheckpointStore(folder.checkpoints), None
    if step:
        try:
            target = open_checkpoint(folder.checkpoints / name_of(step))
            target.verify()
        except NotWhole as error:
            raise NoWholeCheckpoint(
                f"a spike asks for a rollback (training.spike), but {error}. Bring it back (dvc checkout, or the storage's copy), or set "
                "training.spike.action=skip"
            ) from None
    later = [path for path in store.folders() if step_of(path.name) > step]
    if later:
        store.set_aside(later, folder.aside / f"before_rollback_to_{name_of(step)}")
    return target
