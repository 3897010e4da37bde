"""Global batches: windows from the lanes in turn, and where to go on after each."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from model.config import DataConfig
from model.errors import UserError
from model.stream.lanes import Lane, plan_lanes
from model.stream.manifest import DatasetManifest
from model.stream.packing import Position


@dataclass(frozen=True)
class Batch:
    """What one optimizer step sees."""

    windows: np.ndarray
    """uint16 [global_batch, max_length + 1]; the last batch of a run may have fewer rows."""
    epoch: int
    """Epoch of the first window, from 0."""
    state: dict[str, Any]
    """Where to go on after this batch; JSON, under 1 kB for 8 lanes."""


class TrainingWindows:
    """The training data of a run, batch by batch.

    Window i is a function of (manifest, data config, seed) alone. Lanes take turns; one that has finished its epoch is passed over until
    all have. What a lane's last epoch leaves over, less than a window, is not trained on.

    Args:
        manifest: the dataset's files.
        data: how samples become windows.
        seed: decides split and order.
        global_batch: windows a batch.
        num_epochs: passes over the training samples.
        state: a batch's `state`, to go on after it; None: from the start.

    Raises:
        UserError: the data cannot fill the lanes, is damaged or changed.
        Stopped: its source does not answer; go on later from the last batch's state.
    """

    def __init__(
        self,
        manifest: DatasetManifest,
        data: DataConfig,
        seed: int,
        global_batch: int,
        num_epochs: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._global_batch, self._num_epochs = global_batch, num_epochs
        state = state or {"epoch": 0, "turn": 0, "lanes": [[0, 0, 0]] * data.lanes}
        self._fresh = not any(any(position) for position in state["lanes"])
        plan = plan_lanes(manifest, data.lanes)
        assert len(state["lanes"]) == len(plan), "a state belongs to the data config it was made with"
        starts = [Position(*position) for position in state["lanes"]]
        self._lanes = [Lane(manifest, data, seed, number, plan[number], start) for number, start in enumerate(starts)]
        self._epoch: int = state["epoch"]
        self._turn: int = state["turn"]
        self._finished: set[int] = set()
        self._max_length = data.max_length

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        windows: list[np.ndarray] = []
        while len(windows) < self._global_batch and (window := self._next_window()) is not None:
            if not windows:
                epoch = self._epoch
            windows.append(window)
        if not windows:
            if self._fresh:
                raise UserError(
                    f"data.max_length: no lane's training samples fill one window of {self._max_length + 1} tokens; use fewer lanes"
                )
            raise StopIteration
        self._fresh = False
        state = {"epoch": self._epoch, "turn": self._turn, "lanes": [list(lane.position) for lane in self._lanes]}
        return Batch(np.stack(windows), epoch, state)

    def _next_window(self) -> np.ndarray | None:
        while self._epoch < self._num_epochs:
            while len(self._finished) < len(self._lanes):
                number = self._turn
                self._turn = (number + 1) % len(self._lanes)
                if number not in self._finished:
                    window = self._lanes[number].next_window(self._epoch)
                    if window is not None:
                        return window
                    self._finished.add(number)
            self._epoch += 1
            self._finished.clear()
        return None


def prefetched(windows: TrainingWindows, depth: int = 4) -> Generator[Batch, None, None]:
    """The same batches, up to `depth` of them made ahead by a thread.

    What is raised there is raised here. Closing the generator ends the thread. A batch's state is the one after that batch, whatever was
    made ahead.
    """
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def hand_over(item: Batch | BaseException | None) -> bool:
        while not closed.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                pass
        return False

    def produce() -> None:
        try:
            for batch in windows:
                if not hand_over(batch):
                    return
            hand_over(None)
        except BaseException as error:
            hand_over(error)

    thread = threading.Thread(target=produce, name="stream", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        thread.join(timeout=5)
