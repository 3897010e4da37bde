"""Using what was trained: text from a checkpoint, an alias or an export, and the export itself."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from model import disk
from model.checkpoint.store import MANIFEST, Checkpoint, CheckpointStore, NotWhole, open_checkpoint, step_of
from model.errors import UserError
from tasks.model_card import model_card, run_of
from tasks.project import Project, find_project, read_json
from tasks.starting_point import REGISTRY, find_whole, locate

if TYPE_CHECKING:
    from model.generation import Frame
    from model.gpt2 import GPT2

EXPORT = "config.json"
"""The file that makes a folder an export."""


@dataclass(frozen=True)
class Writer:
    """A network that is ready to write."""

    name: str
    """Where it comes from, for people."""
    network: GPT2
    frame: Frame | None
    """How its texts were made; None where an export does not say."""

    def write(
        self,
        prompt: str,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> Iterator[str]:
        """What the network writes after `prompt`, piece by piece; no further than its texts were long in training."""
        from model.generation import stream

        yield from stream(self.network, _readable(prompt), max_new_tokens, temperature, top_k, top_p, seed)


def open_writer(what: str, which: str | None = None) -> Writer:
    """The network of what `find` finds, on the GPU where there is one.

    Raises:
        UserError: as `find`, or it cannot be loaded.
    """
    found = find(what, which)
    if isinstance(found, Path):
        return Writer(f"{found}, exported", *_load_export(found))
    return Writer(title(found), *_load(found))


def title(checkpoint: Checkpoint) -> str:
    """`step_00000900 of quickstart`; of the folder where it lies outside of a run."""
    run = run_of(checkpoint)
    return f"{checkpoint.name} of {run.experiment}" if run else str(checkpoint.path)


def find(what: str, which: str | None = None) -> Checkpoint | Path:
    """What people name: an experiment (its champion, or the checkpoint `which` of it), a registered version (`models:/quickstart@best`), a
    checkpoint's folder, or a folder in Hugging Face's format. Checkpoints are verified.

    Raises:
        UserError: there is no such thing, or it is not whole.
    """
    registered, folder = what.startswith(REGISTRY), _folder(what)
    if not registered and folder is None:
        return pick_checkpoint(find_project(), what, which)
    if which is not None:
        raise UserError(f"--checkpoint: goes with an experiment's name; {what!r} says itself which one")
    if folder is None:
        return _registered(find_project(), what)
    if (folder / MANIFEST).exists():
        return _verified(folder)
    if (folder / EXPORT).is_file():
        return folder
    raise UserError(f"experiment: {what!r} holds neither a checkpoint ({MANIFEST}) nor an export ({EXPORT})")


def who_answers(what: str) -> str:
    """The same, but of an experiment whose model was post-trained the post-training: it was taught to answer."""
    from tasks.post_training import answering

    if what.startswith(REGISTRY) or _folder(what) is not None:
        return what
    return answering(find_project(), what)


def _folder(what: str) -> Path | None:
    """The folder that `what` names: with a slash always, without one if it is a checkpoint or an export and no experiment has its name."""
    if what.startswith(REGISTRY):
        return None
    with_slash = "/" in what or os.sep in what
    try:
        folder = Path(what)
        if with_slash and not folder.is_dir():
            raise UserError(f"experiment: {what[:80]!r} is neither an experiment's name nor a folder that is here")
        if with_slash:
            return folder
        found = any((folder / name).is_file() for name in (MANIFEST, EXPORT))
    except (OSError, ValueError) as error:  # a NUL, too long, …
        if isinstance(error, UserError):
            raise
        return None
    if found:
        with contextlib.suppress(UserError):  # no project is here, so no experiment is
            found = what not in find_project().experiment_names()
    return folder if found else None


def pick_checkpoint(project: Project, name: str, which: str | None = None) -> Checkpoint:
    """The checkpoint named `which` (`step_00001000`); without one the champion, or the newest whole one if none is champion yet. Verified.

    Raises:
        UserError: it is not there, not whole, or `which` is not the name of one.
    """
    project.experiment(name)
    if which is not None:
        try:
            step_of(which)  # a name, never a path
        except ValueError:
            raise UserError(f"--checkpoint: {which[:80]!r} is not a checkpoint's name, such as step_00001000") from None
    folder = project.run_folder(name)
    store = CheckpointStore(folder.checkpoints)
    try:
        if which is not None:
            chosen = open_checkpoint(folder.checkpoints / which)
        else:
            chosen = _champion(project, name, store, read_json(folder.scores)) or store.checkpoints()[-1]
        chosen.verify()
    except NotWhole as error:
        have = ", ".join(path.name for path in store.folders()) or "none"
        raise UserError(f"--checkpoint: {error}; there is {have}") from None
    except IndexError:
        raise UserError(f"{name} has no checkpoints yet; train it first: gpt2 {project.training_stage(name)} {name}") from None
    return chosen


def _champion(project: Project, name: str, store: CheckpointStore, scores: dict[str, dict[str, str]] | None) -> Checkpoint | None:
    digest = ((scores or {}).get("champion") or {}).get("digest")
    champion = next((checkpoint for checkpoint in store.checkpoints() if checkpoint.digest == digest), None)
    if digest and champion is None:
        champion = find_whole(project, digest)  # where `gpt2 restore` puts what training must not go on from
    if digest and champion is None:
        raise UserError(
            f"the champion is not in {store.folder}; bring it back (gpt2 restore {name}@champion), or choose one with --checkpoint"
        )
    return champion


def _registered(project: Project, uri: str) -> Checkpoint:
    """The checkpoint behind a version or an alias, from the MLflow of the experiment that it is named after."""
    names = project.experiment_names()
    model = uri.removeprefix(REGISTRY).replace("@", "/").partition("/")[0]
    if not names:
        raise UserError(f"experiment: {uri!r}: params.yaml has no experiments, so there is no MLflow to ask")
    try:
        return _verified(locate(project, model if model in names else names[0], uri))
    except UserError as error:
        raise UserError(str(error).replace("checkpoint.checkpoint_to_resume: ", "experiment: ", 1)) from None


def _verified(folder: Path) -> Checkpoint:
    try:
        checkpoint = open_checkpoint(folder.resolve())
        checkpoint.verify()
    except NotWhole as error:
        raise UserError(f"experiment: {error}; bring it back (dvc checkout, dvc pull), or choose another") from None
    return checkpoint


def export(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a verified checkpoint in Hugging Face's format with its model card: all of it or nothing.

    Raises:
        UserError: the folder holds something already, cannot be written, or the checkpoint is not a GPT-2.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"FOLDER: {folder} is not empty; export into a new folder")
    from model.huggingface import export as write

    network, frame = _load(checkpoint)
    state = checkpoint.state()["config"]
    split = {"seed": state["seed"], **{key: state["data"][key] for key in ("split_by", "train_ratio")}}
    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        disk.sweep(folder.parent, f".{folder.name}.")
        write(network, partial, frame, model_card(checkpoint), split)
        for path in [*partial.iterdir(), partial]:
            disk.fsync(path)
        if folder.exists():
            folder.rmdir()
        disk.rename(partial, folder)
        disk.fsync(folder.parent)
    except OSError as error:
        raise UserError(f"FOLDER: {folder} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _load(checkpoint: Checkpoint) -> tuple[GPT2, Frame]:
    """The network of a verified checkpoint and how its texts were made. Its bytes are what was sealed, which need not be a network: a
    manifest is no proof of who wrote it."""
    from model.device import pick_device
    from model.generation import Frame
    from model.huggingface import load_model
    from model.run_config import RunConfig

    with _one_line_if_it_is_none(f"{checkpoint.path}: sealed"):
        frame = Frame.of(RunConfig.model_validate(checkpoint.state()["config"]).data)
        return load_model(checkpoint.path, pick_device("auto")), frame


def _load_export(folder: Path) -> tuple[GPT2, Frame | None]:
    from model.device import pick_device
    from model.huggingface import load_export, read_frame

    with _one_line_if_it_is_none(f"{folder}: a folder in Hugging Face's format"):
        return load_export(folder, pick_device("auto")), read_frame(folder)


@contextlib.contextmanager
def _one_line_if_it_is_none(what: str) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError, MemoryError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{what}, but not a GPT-2 that can be loaded ({type(error).__name__}: {why})") from None


def _readable(prompt: str) -> str:
    """Bytes of the command line that are not UTF-8 come as halves of characters; they become U+FFFD."""
    return prompt.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
