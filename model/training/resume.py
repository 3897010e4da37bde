"""Where a training starts: which checkpoint it goes on from, and what belongs to another configuration.

Training never goes on with a checkpoint of another configuration. What a finished run of another one left is moved to `aside/` and kept; an
unfinished one is somebody's work in progress, and only its owner can say what is meant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from model import disk
from model.checkpoint.store import MANIFEST, MODEL, Checkpoint, CheckpointStore, NotWhole, is_name, name_of, open_checkpoint, step_of
from model.config import ForkOf
from model.digest import digest_of, file_sha256
from model.errors import NoWholeCheckpoint, UserError
from model.run_config import Base, RunConfig
from model.run_folder import RunFolder
from model.training.journal import Event, read_current


@dataclass
class Start:
    """Where a training starts."""

    checkpoint: Checkpoint | None = None
    """None: with initial weights."""
    fork: ForkOf | None = None
    """Whose `checkpoint` it is, if it is another experiment's: the fork seals it as its own first one."""
    same_optimizer: bool = True
    """Whether the optimizer's state in `checkpoint` is of use."""
    same_data: bool = True
    """Whether the place in the data is."""
    base: Path | None = None
    """The folder with the weights that a post-training begins with, and seals as its own first checkpoint; None: it has checkpoints."""
    messages: list[tuple[str, str]] = field(default_factory=list)
    """Warnings for the journal: kind, text."""


def find_start(folder: RunFolder, config: RunConfig, named: Path | None) -> Start:
    """Make the run's folder ready for this configuration, and say where to start.

    Args:
        folder: the run's.
        config: the run's.
        named: where that lies which `checkpoint_to_resume`, `fork_of` or `post_training` names, if not in this run.

    Raises:
        UserError: what lies there is another configuration's, or what is named is not there, or not whole.
        NoWholeCheckpoint: there were checkpoints, and none is whole. Training never starts again silently.
    """
    CheckpointStore(folder.checkpoints).sweep()
    disk.sweep_files(folder.path)
    start = Start()
    if aside := set_aside_other_configurations(folder, config):
        start.messages.append(("resume", f"what a finished run of another configuration left was moved to {aside}"))
    start.checkpoint = _starting_checkpoint(folder, config, named, lambda message: start.messages.append(("checkpoint", message)))
    if start.checkpoint is None and config.checkpoint.fork_of is not None:
        _fork(start, config, config.checkpoint.fork_of, named)
    if start.checkpoint is None and config.post_training is not None:
        start.base = _base_folder(config.post_training.base, named)
    if start.checkpoint is not None:
        _must_have_steps_left(folder, config, start.checkpoint)
    if start.checkpoint is not None and start.fork is None and (gap := _gap(folder, config, start.checkpoint)):
        start.messages.append(("journal", gap))
    return start


def config_of(checkpoint: Checkpoint) -> RunConfig:
    """The configuration that a checkpoint was trained under.

    Raises:
        NotWhole: its state does not say, or not in a way that this code understands.
    """
    try:
        return RunConfig.model_validate(checkpoint.state()["config"])
    except (KeyError, ValidationError) as error:
        raise NotWhole(f"{checkpoint.name}: its configuration cannot be read: {type(error).__name__}") from None


def set_aside_other_configurations(folder: RunFolder, config: RunConfig) -> Path | None:
    """Move checkpoints and journal of a finished run of another configuration to `aside/<its digest>/`; where, None if there is none.

    Raises:
        UserError: it is not finished.
    """
    events = read_current(folder.journal)
    started = [event for event in events if event["event"] == "started"]
    journal_digest = str(started[-1]["config_digest"]) if started else None
    store = CheckpointStore(folder.checkpoints)
    others = {path: digest for path in store.folders() if (digest := _digest_at(path) or journal_digest) not in (None, config.digest)}
    last = next((event for event in reversed(events) if event["event"] in ("finished", "step")), None)
    finished = last is not None and last["event"] == "finished"
    most = config.training.max_steps
    ends_before = finished and most is not None and _last_step(events) > most
    if ends_before and not others and journal_digest == config.digest:
        others = dict.fromkeys(store.folders(), config.digest)
    elif others and not finished:
        _refuse(folder, config, others)
    where = None
    for path, digest in others.items():
        where = folder.aside / str(digest)[:12]
        store.set_aside([path], where / "checkpoints")
    if journal_digest not in (None, config.digest) or ends_before:
        where = folder.aside / str(journal_digest)[:12]
        where.mkdir(parents=True, exist_ok=True)
        count = len(list(where.glob("journal*.jsonl")))
        folder.journal.rename(where / (f"journal.{count}.jsonl" if count else "journal.jsonl"))
    return where


def _last_step(events: list[Event]) -> int:
    return max((int(event["step"]) for event in events if event["event"] == "step"), default=0)


def _digest_at(path: Path) -> str | None:
    try:
        return config_of(open_checkpoint(path)).digest
    except NotWhole:
        return None


def _refuse(folder: RunFolder, config: RunConfig, others: dict[Path, Any]) -> NoReturn:
    newest = max(others, key=lambda path: path.name)
    try:
        what = "; ".join(config.differences(config_of(open_checkpoint(newest))))
    except NotWhole:
        what = "the journal names another config digest"
    name, anew = folder.experiment, f"gpt2 {'train' if config.post_training is None else 'post-train'} {folder.experiment} --anew"
    fork = f"give the new one its own name (gpt2 train {name} --fork NEW); or " if config.post_training is None else ""
    raise UserError(
        f"{name} was not finished, and its checkpoints up to {newest.name} are of another configuration ({what}). Change it back; or "
        f"{fork}set the old one aside and begin anew ({anew})"
    )


def _starting_checkpoint(folder: RunFolder, config: RunConfig, named: Path | None, report: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint of this run to go on from; None: there is none. Damaged ones are passed over and reported.

    `checkpoint_to_resume` is obeyed once: when training has gone on from it, a restart goes on from the newest as ever.
    """
    store = CheckpointStore(folder.checkpoints)
    wanted = config.checkpoint.checkpoint_to_resume
    events = read_current(folder.journal)
    if wanted is not None and wanted_last(events) != wanted:
        return _rewind(folder, store, config, wanted, named)
    newest = store.newest_whole(report)
    written = [event["name"] for event in events if event["event"] == "checkpoint"]
    if newest is None and written:
        raise NoWholeCheckpoint(
            f"the journal tells of {written[-1]}, but {folder.checkpoints} holds no checkpoint. "
            f"Bring them back (dvc checkout, dvc pull), or remove {folder.journal.name} beside it to start anew."
        )
    return newest


def wanted_last(events: list[Event]) -> str | None:
    """The `checkpoint_to_resume` that the last start obeyed, by the journal's current events."""
    started = [event for event in events if event["event"] == "started"]
    return started[-1].get("checkpoint_to_resume") if started else None


def _rewind(folder: RunFolder, store: CheckpointStore, config: RunConfig, wanted: str, named: Path | None) -> Checkpoint:
    path = named or (folder.checkpoints / wanted if is_name(wanted) else Path(wanted))
    if not path.is_dir():
        have = ", ".join(f.name for f in store.folders()) or "none"
        where = f"in {folder.checkpoints}; there is {have}" if is_name(wanted) else "a folder here"
        raise UserError(f"checkpoint.checkpoint_to_resume: {wanted} is not {where}")
    try:
        checkpoint = open_checkpoint(path)
        checkpoint.verify()
        differences = config.differences(config_of(checkpoint))
        if differences:
            raise UserError(
                f"checkpoint.checkpoint_to_resume: {wanted} is of another configuration ({'; '.join(differences)}); change it back, or "
                "begin a new experiment with it: gpt2 train NAME --fork NEW"
            )
        if path.parent != store.folder:
            checkpoint = store.adopt(checkpoint)
    except UserError:
        raise
    except (NotWhole, ValueError) as error:
        raise UserError(f"checkpoint.checkpoint_to_resume: {error}; choose another") from None
    later = [f for f in store.folders() if step_of(f.name) > checkpoint.step]
    if later:
        store.set_aside(later, folder.aside / f"after_{checkpoint.name}")
    return checkpoint


def _fork(start: Start, config: RunConfig, fork: ForkOf, named: Path | None) -> None:
    """Begin with another experiment's checkpoint."""
    if named is None:
        raise UserError(f"checkpoint.fork_of: {fork.checkpoint} of {fork.experiment} is nowhere to be found; bring it back (dvc pull)")
    try:
        checkpoint = open_checkpoint(named)
        checkpoint.verify()
        parent = config_of(checkpoint)
    except NotWhole as error:
        raise UserError(f"checkpoint.fork_of: {error}") from None
    if checkpoint.digest != fork.digest:
        raise UserError(f"checkpoint.fork_of: {named} is another checkpoint than the one with digest {fork.digest}")
    may_differ = {"dropout", "initializer_range", "preset"}
    ours, theirs = (each.model.model_dump(exclude=may_differ) for each in (config, parent))
    if changed := [f"model.{name}: {theirs[name]}, now {value}" for name, value in ours.items() if value != theirs[name]]:
        raise UserError(f"checkpoint.fork_of: its weights are of another network ({'; '.join(changed)})")
    start.checkpoint, start.fork = checkpoint, fork
    start.same_optimizer = config.training.optimizer == parent.training.optimizer
    start.same_data = _order_of_data(config) == _order_of_data(parent)


def _base_folder(base: Base, named: Path | None) -> Path:
    """Where the base lies, in a checkpoint or in an export; every byte is verified."""
    field = "post_training.base"
    if named is None:
        raise UserError(
            f"{field}: {base.source} ({base.digest[:12]}) is nowhere to be found; bring it back (gpt2 restore), or name another"
        )
    try:
        if (named / MANIFEST).exists():
            checkpoint = open_checkpoint(named)
            checkpoint.verify()
            found = checkpoint.digest
        else:
            found = file_sha256(named / MODEL)
    except (NotWhole, OSError) as error:
        raise UserError(f"{field}: {error}; bring it back, or name another") from None
    if found != base.digest:
        raise UserError(f"{field}: {named} holds another network than {base.source} ({base.digest[:12]}); bring that back, or name another")
    return named


def _order_of_data(config: RunConfig) -> str:
    identity = config.identity
    return digest_of([identity["data"], identity["dataset"]["digest"], config.seed, config.global_batch])


def _must_have_steps_left(folder: RunFolder, config: RunConfig, checkpoint: Checkpoint) -> None:
    most = config.training.max_steps
    if most is not None and checkpoint.step > most:
        raise UserError(
            f"training.max_steps: {most}, but {folder.experiment} has taken {checkpoint.step} steps ({checkpoint.name}); raise it, name an "
            "earlier checkpoint (checkpoint.checkpoint_to_resume), or set this run aside and begin anew (--anew)"
        )


def _gap(folder: RunFolder, config: RunConfig, checkpoint: Checkpoint) -> str | None:
    """What the journal does not tell of the way to a checkpoint: it was lost, or the checkpoint came from elsewhere."""
    told = {event["step"] for event in read_current(folder.journal) if event["event"] == "step"}
    first = step_of(config.checkpoint.fork_of.checkpoint) if config.checkpoint.fork_of is not None else 0
    missing = [step for step in range(first + 1, checkpoint.step + 1) if step not in told]
    if not missing:
        return None
    return f"{folder.journal.name} does not tell of {len(missing)} of the steps up to {checkpoint.step}; the checkpoint is whole"


def rewind_after_spike(folder: RunFolder, config: RunConfig, step: int) -> Checkpoint | None:
    """The regular checkpoint at or before `step`, to go back to (or what a fork or a post-training began with); None: random weights. Later
    ones are set aside.

    Raises:
        NoWholeCheckpoint: it is not there or not whole. Another one would make the run depend on its faults.
    """
    every, fork = config.checkpoint.save_every_n_iterations, config.checkpoint.fork_of
    step = max(step // every * every, step_of(fork.checkpoint) if fork is not None else 0)
    store, target = CheckpointStore(folder.checkpoints), None
    if step or config.post_training is not None:
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
