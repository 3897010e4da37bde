"""Making checkpoints of a training."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoint.store import MODEL, OPTIMIZER, STATE, Checkpoint, CheckpointStore, name_of
from model.config import RunConfig
from model.huggingface import write_weights
from model.run_folder import RunFolder
from model.stream.batches import State, merged_state
from model.stream.packing import OddRows
from model.training.bad_steps import BadSteps
from model.training.distributed import Ranks
from model.training.engine import Engine
from model.training.identity import code_identity, versions
from model.training.journal import Journal, Silence


class Saver:
    """Seals checkpoints, each step's at most once. All ranks call it, the first one writes.

    Args:
        folder: the run's.
        config: the run's.
        engine: holds the weights and the optimizer's state.
        ranks: who trains together.
        journal: is told.
        saved: the newest checkpoint, if training goes on from one.
    """

    def __init__(
        self, folder: RunFolder, config: RunConfig, engine: Engine, ranks: Ranks, journal: Journal | Silence, saved: Checkpoint | None
    ) -> None:
        self.store = CheckpointStore(folder.checkpoints)
        self.saved = saved
        self._config, self._engine, self._ranks, self._journal = config, engine, ranks, journal

    def save(self, step: int, tokens: int, stream: State | None, odd_rows: OddRows | None, bad_steps: BadSteps) -> Checkpoint | None:
        """Seal the checkpoint of a step. A disk that says no is reported and costs nothing but this checkpoint: None.

        Args:
            step: steps taken.
            tokens: trained on.
            stream: this rank's place in the data.
            odd_rows: those this rank has read; None: nothing was read since the start, and `stream` is the whole run's.
            bad_steps: what is known of them.
        """
        if self.saved is not None and self.saved.step == step:
            return self.saved
        weights, optimizer = self._engine.weights(), self._engine.optimizer_state()
        if stream is not None and odd_rows is not None:
            stream = merged_state(self._ranks.gather_objects(stream))
            odd_rows = OddRows().plus(*self._ranks.gather_objects(odd_rows))
        state = {
            "step": step,
            "tokens": tokens,
            "stream": stream,
            "randomness": "seeded from (seed, step, micro-batch, rank) before each micro-batch",
            "bad_steps": bad_steps.state,
            "micro_batches": {str(self._ranks.size): self._engine.micro_batch},
            "config": self._config.model_dump(mode="json"),
            "config_digest": self._config.digest,
            "versions": versions(),
            "code": code_identity(),
        }
        written = self._ranks.from_first(lambda: self._write(weights, optimizer, state, odd_rows))
        self.saved = written or self.saved
        return written

    def _write(
        self, weights: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict[str, Any], odd_rows: OddRows | None
    ) -> Checkpoint | None:
        began, step = time.perf_counter(), state["step"]
        try:
            checkpoint = self.store.write(
                step,
                {
                    MODEL: lambda path: write_weights(weights, path),
                    OPTIMIZER: lambda path: save_file(optimizer, path),
                    STATE: lambda path: _write_json(path, state),
                },
            )
        except (OSError, RuntimeError, SafetensorError) as error:
            self._journal.append("warning", step=step, kind="checkpoint", message=f"{name_of(step)} was not written: {error}")
            return None
        self._journal.append(
            "checkpoint",
            step=step,
            name=checkpoint.name,
            digest=checkpoint.digest,
            model_sha256=checkpoint.model_sha256,
            seconds=round(time.perf_counter() - began, 3),
            odd_rows=odd_rows._asdict() if odd_rows else None,
        )
        self._journal.sync()
        return checkpoint


def _write_json(path: Path, value: Any) -> None:
    path.write_bytes(json.dumps(value, indent=1, sort_keys=True).encode())
