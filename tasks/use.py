"""Using what was trained: text from a checkpoint, and its export."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from model.checkpoint.store import Checkpoint, CheckpointStore, NotWhole, open_checkpoint, step_of
from model.errors import UserError
from tasks.project import Project, read_json

if TYPE_CHECKING:
    from model.gpt2 import GPT2


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
            chosen = _champion(store, read_json(folder.scores)) or store.checkpoints()[-1]
        chosen.verify()
    except NotWhole as error:
        have = ", ".join(path.name for path in store.folders()) or "none"
        raise UserError(f"--checkpoint: {error}; there is {have}") from None
    except IndexError:
        raise UserError(f"{name} has no checkpoints yet; train it first: gpt2 train {name}") from None
    return chosen


def _champion(store: CheckpointStore, scores: dict[str, dict[str, str]] | None) -> Checkpoint | None:
    digest = ((scores or {}).get("champion") or {}).get("digest")
    champion = next((checkpoint for checkpoint in store.checkpoints() if checkpoint.digest == digest), None)
    if digest and champion is None:
        raise UserError(f"the champion is not in {store.folder}; bring it back (dvc checkout, dvc pull), or choose one with --checkpoint")
    return champion


def generate(
    checkpoint: Checkpoint, prompt: str, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, seed: int
) -> Iterator[str]:
    """What the network writes after `prompt`, piece by piece."""
    from model.generation import stream

    network = _load(checkpoint)
    try:
        yield from stream(network, prompt, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    except ValueError as error:
        raise UserError(f"PROMPT: {error}") from None


def export(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the checkpoint in Hugging Face's format.

    Raises:
        UserError: the folder holds something already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty; export into a new folder")
    from model.huggingface import export as write

    write(_load(checkpoint), folder)


def _load(checkpoint: Checkpoint) -> GPT2:
    """The network of a verified checkpoint. Its bytes are what was sealed, which need not be a network: a manifest is no proof of who
    wrote it."""
    from safetensors import SafetensorError

    from model.huggingface import load_model

    try:
        return load_model(checkpoint.path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{checkpoint.path}: sealed, but not a GPT-2 that can be loaded ({type(error).__name__}: {why})") from None
