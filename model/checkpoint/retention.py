"""Which checkpoints stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from model.checkpoint.store import CheckpointStore
from model.config import CheckpointConfig


def retain(store: CheckpointStore, config: CheckpointConfig, events: list[dict[str, Any]], scores: Path) -> None:
    """Keep the last k regular checkpoints, the best by validation loss, what the registry names, and the newest of all.

    So a save made by a stop request goes once a regular one has overtaken it, whether or not there ever was an interruption.

    Args:
        store: the run's.
        config: how many.
        events: the journal's current ones, for the validation losses.
        scores: where evaluation wrote down the champion: the trainer asks no server.
    """
    checkpoints = store.checkpoints()
    regular = [c for c in checkpoints if c.step % config.save_every_n_iterations == 0]
    losses = {event["step"]: event["loss"] for event in events if event["event"] == "validation"}
    best = min((c for c in regular if c.step in losses), key=lambda c: losses[c.step], default=None)
    champion = json.loads(scores.read_text(encoding="utf-8"))["champion"] if scores.exists() else None
    last = regular[-config.keep_last :] if config.keep_last else regular
    store.retain(
        c.name
        for c in checkpoints
        if c in last or c in (best, checkpoints[-1]) or (champion is not None and c.digest == champion["digest"])
    )
