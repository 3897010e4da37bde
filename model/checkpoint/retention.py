"""Which checkpoints stay."""

from __future__ import annotations

import json
from collections.abc import Mapping

from model.checkpoint.store import CheckpointStore
from model.config import CheckpointConfig
from model.run_folder import RunFolder


def retain(
    store: CheckpointStore, config: CheckpointConfig, losses: Mapping[int, float], folder: RunFolder, with_base: bool = False
) -> None:
    """Keep the last k regular checkpoints, the best by validation loss, what the registry names, and the newest of all.

    So a save made by a stop request goes once a regular one has overtaken it, whether or not there ever was an interruption.

    Args:
        store: the run's.
        config: how many.
        losses: on the validation windows, by step.
        folder: the run's; what the registry's aliases name was written down there (`aliases.json`, and the champion in `scores.json`):
            the trainer asks no server.
        with_base: keep that of step 0, too: what a post-training began with, and is compared with.

    Raises:
        OSError, ValueError, KeyError, TypeError: what was written down cannot be read. Then nothing is deleted.
    """
    checkpoints = store.checkpoints()
    if not checkpoints:
        return
    regular = [c for c in checkpoints if c.step % config.save_every_n_iterations == 0]
    best = min((c for c in regular if c.step in losses), key=lambda c: losses[c.step], default=None)
    named = named_by_registry(folder)
    last = regular[-config.keep_last :] if config.keep_last else regular
    named |= {c.digest for c in checkpoints if with_base and c.step == 0}
    store.retain(c.name for c in checkpoints if c in last or c in (best, checkpoints[-1]) or c.digest in named)


def named_by_registry(folder: RunFolder) -> set[str]:
    """Digests of the checkpoints that the registry's aliases name, as far as this machine was told."""
    named: set[str] = set()
    if folder.aliases.exists():
        named |= set(json.loads(folder.aliases.read_text(encoding="utf-8")).values())
    if folder.scores.exists():
        champion = json.loads(folder.scores.read_text(encoding="utf-8"))["champion"]
        named |= {champion["digest"]} if champion is not None else set()
    return named
