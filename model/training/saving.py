"""Making checkpoints of a training, which waits only while they are copied to memory; a thread brings them to the disk."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as StillWriting
from typing import Any

import torch
from torch import Tensor

from model import disk
from model.checkpoint.image import Image
from model.checkpoint.retention import retain
from model.checkpoint.store import MODEL, OPTIMIZER, STATE, Checkpoint, CheckpointStore, name_of
from model.errors import UserError
from model.huggingface import METADATA, seen_by_hugging_face
from model.run_config import RunConfig
from model.run_folder import RunFolder
from model.say import say
from model.stream.batches import State, merged_state
from model.stream.packing import OddRows
from model.training.bad_steps import BadSteps
from model.training.distributed import Ranks, whole
from model.training.engine import Engine
from model.training.identity import code_identity, versions
from model.training.journal import Journal, Silence
from model.training.lock import Fence

_PATIENCE_S = 60.0
"""How long training waits for a disk that is still writing the checkpoint before; once, then it goes on without the new one."""

_LAST_PATIENCE_S = 240.0
"""How long a training that ends waits for it; less than other ranks wait for the first."""


class Saver:
    """Seals checkpoints, each step's at most once. All ranks call it alike, the first one writes.

    Args:
        folder: the run's.
        config: the run's.
        engine: holds the weights and the optimizer's state.
        ranks: who trains together.
        journal: is told.
        saved: the newest checkpoint, if training goes on from one.
        fence: asked before a checkpoint is sealed.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: RunConfig,
        engine: Engine,
        ranks: Ranks,
        journal: Journal | Silence,
        saved: Checkpoint | None,
        fence: Fence,
    ) -> None:
        self.store = CheckpointStore(folder.checkpoints)
        self._folder, self._config, self._engine, self._ranks, self._journal, self._fence = folder, config, engine, ranks, journal, fence
        self._images: dict[str, Image] = {}
        self._preparing: Future[None] | None = None
        self._jobs = ThreadPoolExecutor(1, "checkpoint")
        self._step: int | None = None
        """Of the newest checkpoint that is sealed or being written."""
        self._writing: Future[Checkpoint | None] = Future()
        self._patience = _PATIENCE_S
        self._closed = False
        self.went_back_to(saved)

    def went_back_to(self, checkpoint: Checkpoint | None) -> None:
        """Training goes on from this one (None: from the beginning); nothing is being written."""
        self._step = checkpoint.step if checkpoint is not None else None
        self._writing = Future()
        self._writing.set_result(checkpoint)

    def prepare(self) -> None:
        """Begin to take the memory for the copies: that takes as long as a copy, or longer. To be called after the first step, when the
        optimizer has its state."""
        if self._ranks.first:
            weights, optimizer = seen_by_hugging_face(self._engine.weights()), self._engine.optimizer_state()
            self._preparing = self._jobs.submit(self._make_images, weights, optimizer)

    def _make_images(self, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> None:
        for name, tensors, metadata in ((MODEL, weights, METADATA), (OPTIMIZER, optimizer, None)):
            if name not in self._images or not self._images[name].fits(tensors):
                self._images[name] = Image(tensors, self._engine.device.type == "cuda", metadata)

    def save(self, step: int, tokens: int, stream: State | None, odd_rows: OddRows | None, bad_steps: BadSteps) -> None:
        """Begin the checkpoint of a step: copy it, and let it be written. A disk that says no is reported and costs nothing but this
        checkpoint.

        Args:
            step: steps taken.
            tokens: trained on.
            stream: this rank's place in the data.
            odd_rows: those this rank has read; None: nothing was read since the start, and `stream` is the whole run's.
            bad_steps: what is known of them.
        """
        if self._step == step:
            return
        began = time.perf_counter()
        weights, optimizer = seen_by_hugging_face(self._engine.weights()), self._engine.optimizer_state()
        if not self._ranks.from_first(lambda: self._disk_is_free(step) and self._there_is_room(step, weights, optimizer)):
            return
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
        with _one_thread():
            self._copy(MODEL, weights)
            self._copy(OPTIMIZER, optimizer)
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize(self._engine.device)
        self._step = step
        if self._ranks.first:
            self._writing = self._jobs.submit(self._write, step, state, odd_rows, began, time.perf_counter() - began)

    def _disk_is_free(self, step: int) -> bool:
        try:
            self._writing.result(self._patience)
        except StillWriting:
            self._patience = 0.0
            message = f"{name_of(step)} was not written: the disk is still busy with the one before"
            self._journal.warn(step, "checkpoint", message)
            return False
        self._patience = _PATIENCE_S
        return True

    def _there_is_room(self, step: int, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> bool:
        """In memory, which is taken once: for the images of both files."""
        try:
            if self._preparing is not None:
                preparing, self._preparing = self._preparing, None
                preparing.result()
            self._make_images(weights, optimizer)
        except (RuntimeError, MemoryError) as error:  # torch raises RuntimeError
            message = f"{name_of(step)} was not written: there is no memory to copy it to: {str(error).splitlines()[0]}"
            self._journal.warn(step, "checkpoint", message)
            return False
        return True

    def _copy(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors, each of them whole, into the image of a file."""
        for key, tensor in tensors.items():
            complete = whole(tensor)
            if self._ranks.first:
                self._images[name].tensors[key].copy_(complete, non_blocking=True)

    def _write(self, step: int, state: dict[str, Any], odd_rows: OddRows | None, began: float, stall: float) -> Checkpoint | None:
        """In the thread."""

        def before_sealing() -> None:
            self._journal.sync()  # the record is not shorter than what it is the record of
            self._fence()

        try:
            files: dict[str, Iterable[disk.Bytes]] = {MODEL: self._images[MODEL], OPTIMIZER: self._images[OPTIMIZER], STATE: [_json(state)]}
            checkpoint = self.store.write(step, files, before_sealing)
            self._journal.append(
                "checkpoint",
                step=step,
                name=checkpoint.name,
                digest=checkpoint.digest,
                model_sha256=checkpoint.model_sha256,
                seconds=round(time.perf_counter() - began, 3),
                stall_s=round(stall, 4),
                odd_rows=odd_rows._asdict() if odd_rows else None,
            )
        except OSError as error:
            self._journal.warn(step, "checkpoint", f"{name_of(step)} was not written: {error}")
            return None
        return checkpoint

    def wait(self) -> Checkpoint | None:
        """The checkpoint that was begun last, when it is durable; None if the disk said no: then the same step can be saved again."""
        found = self._ranks.from_first(self._written)
        if found is None:
            self._step = None
        return found

    def _written(self) -> Checkpoint | None:
        try:
            return self._writing.result(_LAST_PATIENCE_S)
        except StillWriting:
            return None

    def retain(self, losses: Mapping[int, float]) -> None:
        """Begin to delete what need not stay, once what is being written is there. `losses`: by step, on the validation windows."""
        if self._ranks.first:
            self._jobs.submit(self._retain, dict(losses))

    def _retain(self, losses: dict[int, float]) -> None:
        try:
            self._fence()
            retain(self.store, self._config.checkpoint, losses, self._folder, with_base=self._config.post_training is not None)
        except UserError:
            return
        except (OSError, ValueError, KeyError, TypeError) as error:
            message = f"old checkpoints stay: {type(error).__name__}: {error}"
            self._journal.warn(self._step or 0, "checkpoint", message)

    def close(self) -> None:
        """Wait for what is being written; not for ever, if the disk hangs."""
        if self._closed:
            return
        self._closed = True
        done = self._jobs.submit(lambda: None)
        try:
            done.result(_PATIENCE_S)
        except StillWriting:
            say("warning: the disk does not take the last checkpoint; the one before is whole")
        self._jobs.shutdown(wait=False)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """A copy is as fast as the memory is. Several threads gain some milliseconds on an idle machine, and on a busy one lose seconds by
    waiting for each other (docs/experiments.md)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()
