"""Global batches: windows from the lanes in turn, made ahead by threads, and where to go on after each."""

from __future__ import annotations

import collections
import itertools
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.config import DataConfig
from model.errors import Stopped, UserError
from model.run_config import Windows
from model.stream.lanes import Lane, plan_lanes
from model.stream.manifest import DatasetManifest
from model.stream.packing import OddRows, Place, Position
from model.stream.reader import Reader
from model.stream.row_packing import count_learned, count_read
from model.stream.token_cache import LaneCache, cache_folder

State = dict[str, Any]
"""`{"slot": …, "lanes": {"0": [epoch, sample, offset, …], …}}`: JSON, under 1 kB for 8 lanes."""

_AHEAD = 64
"""Windows that a lane is ahead of its consumer, at most."""
_AT_ONCE = 16
"""Windows a thread makes of one lane before it looks at the others."""


@dataclass(frozen=True)
class Batch:
    """One rank's share of what one optimizer step sees."""

    windows: torch.Tensor
    """uint16 [windows, max_length + 1], or of rows [windows, 2, max_length] (model/stream/row_packing.py); page-locked on a machine with
    CUDA. A rank whose lanes have come to their end has none."""
    epoch: int
    """The epoch, from 0, that the slowest of the rank's lanes was in."""
    slot: int
    """The next global batch's first slot."""
    places: dict[int, Place | Position]
    """Where this rank's lanes go on after this batch."""
    ended: bool
    """All lanes of this rank have come to their end."""

    @property
    def read(self) -> int:
        """Targets in it, but for what fills windows of rows up."""
        windows = self.windows.numpy()
        return count_read(windows) if windows.ndim == 3 else len(windows) * (windows.shape[1] - 1)

    @property
    def learned(self) -> int:
        """Targets that the loss is taken of: all, or in windows of rows the completions'."""
        windows = self.windows.numpy()
        return count_learned(windows) if windows.ndim == 3 else len(windows) * (windows.shape[1] - 1)

    @property
    def positions(self) -> dict[int, Position]:
        """The same as numbers."""
        return {lane: place.position if isinstance(place, Place) else place for lane, place in self.places.items()}

    @property
    def state(self) -> State:
        """Where to go on after this batch. `merged_state` of all ranks' is the run's."""
        return {"slot": self.slot, "lanes": {str(lane): position.as_list() for lane, position in self.positions.items()}}

    @property
    def odd_rows(self) -> OddRows:
        """Of the samples of this rank's lanes that were read up to here."""
        return OddRows().plus(*(position.odd for position in self.positions.values()))


class TrainingWindows:
    """The training data of a run, batch by batch.

    Slot i of the run belongs to lane `i % lanes`, and holds its next window. A global batch is `global_batch` slots. Lanes go from one
    epoch to the next on their own; one that has come to the end of the last leaves its slots empty, so the last batches of a run, when the
    others (which own about as many tokens) come to their ends, are smaller. Rank r owns the lanes l with `l % world_size == r` and sees
    their slots: the same windows in the same global batches for any number of ranks.

    Args:
        manifest: the dataset's files.
        data: how samples become windows.
        seed: decides split and order.
        global_batch: slots a global batch, over all ranks.
        num_epochs: passes over the training samples.
        state: where to go on: a batch's `state`, or the `merged_state` of all ranks'. None: from the start.
        windows: what a window holds.
        rank: which rank this is.
        world_size: how many there are.
        threads: lanes that are worked on at once, in the background; 0: in the caller's thread, when a batch is asked for.
        cache: the folder for token caches; None: none is kept.
        stopping: asked while waiting for data.

    Raises:
        UserError: the data cannot fill the lanes, is damaged or changed; or lanes and global batch cannot be shared out among the ranks.
        Stopped: the source does not answer, or `stopping` said so; go on later from the last batch's state.
    """

    def __init__(
        self,
        manifest: DatasetManifest,
        data: DataConfig,
        seed: int,
        global_batch: int,
        num_epochs: int,
        state: State | None = None,
        *,
        windows: Windows = "text",
        rank: int = 0,
        world_size: int = 1,
        threads: int = 0,
        cache: Path | None = None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        check_shares(data.lanes, global_batch, world_size)
        self._manifest, self._data, self._stopping = manifest, data, stopping
        self._share, self._rank = global_batch // world_size, rank
        self._step, self._pinned = world_size, torch.cuda.is_available()
        self.warnings: collections.deque[str] = collections.deque()
        """What should be told; whoever tells it takes it out."""
        plan = plan_lanes(manifest, data.lanes)
        state = state or {"slot": 0, "lanes": {str(lane): Position().as_list() for lane in range(data.lanes)}}
        self._slot: int = state["slot"]
        starts = {lane: Position.from_list(state["lanes"][str(lane)]) for lane in range(rank, data.lanes, world_size)}
        self._places: dict[int, Place | Position] = {**starts}
        self._fresh = not any(any(position) for position in state["lanes"].values())
        reader = Reader(data, seed, rows=windows != "text")
        self._shape = (data.max_length + 1,) if windows == "text" else (2, data.max_length)
        folder = cache_folder(cache, manifest, data, seed) if cache is not None else None
        self._caches = {lane: LaneCache(folder, lane, self.warnings.append) for lane in starts if folder is not None}
        lanes = {
            lane: Lane(reader, manifest, seed, lane, plan[lane], start, self._caches.get(lane), self.warnings.append)
            for lane, start in starts.items()
        }
        made = {
            number: lane.text_windows(num_epochs) if windows == "text" else lane.row_windows(num_epochs, one_each=windows == "row")
            for number, lane in lanes.items()
        }
        self._source = _Ahead(made, threads) if threads else _Inline(made)
        self._ended: set[int] = set()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        """The next batch that has a window. One of several ranks gets every batch, and never comes to an end: the run does when all ranks
        have `ended`."""
        while True:
            batch = self._next_batch()
            if len(batch.windows) or self._step > 1:
                return batch
            if batch.ended:
                break
        self.close()
        if self._fresh and self._shape[0] == 2:
            raise UserError(f"data.max_length: no training sample with an answer fits {self._data.max_length} tokens; raise it")
        if self._fresh:
            raise UserError(
                f"data.max_length: no lane's training samples fill one window of {self._data.max_length + 1} tokens; use fewer lanes"
            )
        raise StopIteration

    def _next_batch(self) -> Batch:
        epoch = min(place.epoch for place in self._places.values())
        windows = torch.empty((self._share, *self._shape), dtype=torch.uint16, pin_memory=self._pinned)
        rows, count = windows.numpy(), 0
        first = self._slot + (self._rank - self._slot) % self._step
        for slot in range(first, first + self._share * self._step, self._step):
            lane = slot % self._data.lanes
            if lane not in self._ended:
                found = self._source.take(lane, self._stopping)
                if found is None:
                    self._ended.add(lane)
                else:
                    rows[count], self._places[lane] = found
                    count += 1
        self._slot += self._share * self._step
        self._fresh = self._fresh and not count
        return Batch(windows[:count], epoch, self._slot, self._places.copy(), len(self._ended) == len(self._places))

    def close(self) -> None:
        """End the threads and let go of the files."""
        self._source.close()
        for cache in self._caches.values():
            cache.close()


def check_shares(lanes: int, global_batch: int, world_size: int) -> None:
    """Every rank owns as many lanes, and sees as many windows a step, as every other.

    Raises:
        UserError: it cannot be so; one line with the cure.
    """
    if lanes % world_size:
        raise UserError(
            f"data.lanes: {lanes} lanes cannot be shared out among {world_size} ranks; use a number of ranks that divides {lanes}, "
            f"or set data.lanes to a multiple of {world_size} (which changes the order of the data)"
        )
    if global_batch % world_size:
        raise UserError(f"training.batch_size: a global batch of {global_batch} windows cannot be shared out among {world_size} ranks")


def merged_state(states: Sequence[State]) -> State:
    """The state of a run, from the states of all its ranks after the same global batch."""
    assert len({state["slot"] for state in states}) == 1, "states of different steps"
    lanes = {lane: position for state in states for lane, position in state["lanes"].items()}
    return {"slot": states[0]["slot"], "lanes": dict(sorted(lanes.items(), key=lambda item: int(item[0])))}


_Delivered = tuple[np.ndarray, Place | Position]


def _close(windows: dict[int, Generator[_Delivered, None, None]]) -> None:
    for lane in windows.values():
        lane.close()


class _Inline:
    """Windows are made when they are asked for."""

    def __init__(self, windows: dict[int, Generator[_Delivered, None, None]]) -> None:
        self._windows = windows

    def take(self, lane: int, stopping: Callable[[], bool]) -> _Delivered | None:
        return next(self._windows[lane], None)

    def close(self) -> None:
        _close(self._windows)


class _Ahead:
    """Windows are made ahead, by threads that own lanes. What goes wrong in a lane is raised after its good windows."""

    def __init__(self, windows: dict[int, Generator[_Delivered, None, None]], threads: int) -> None:
        self._windows = windows
        self._ready: dict[int, collections.deque[_Delivered | BaseException | None]] = {lane: collections.deque() for lane in windows}
        lock = threading.Lock()
        self._made, self._room = threading.Condition(lock), threading.Condition(lock)
        self._awaited: int | None = None
        """The lane that the consumer waits for: only its windows wake it."""
        self._closed = False
        lanes = list(windows)
        self._threads = [
            threading.Thread(target=self._work, args=(lanes[number::threads],), name="stream", daemon=True)
            for number in range(min(threads, len(lanes)))
        ]
        for thread in self._threads:
            thread.start()

    def _work(self, lanes: list[int]) -> None:
        while lanes:
            with self._room:
                lane = self._neediest(lanes)
                while len(self._ready[lane]) > _AHEAD - _AT_ONCE and not self._closed:
                    self._room.wait()
                    lane = self._neediest(lanes)
                if self._closed:
                    return
            made: list[_Delivered | BaseException | None] = []
            try:
                made.extend(itertools.islice(self._windows[lane], _AT_ONCE))
                if len(made) < _AT_ONCE:
                    made.append(None)
            except BaseException as error:
                made.append(error)
            if not isinstance(made[-1], tuple):
                lanes.remove(lane)
            with self._made:
                self._ready[lane].extend(made)
                if lane == self._awaited:
                    self._made.notify()

    def _neediest(self, lanes: list[int]) -> int:
        return min(lanes, key=lambda lane: (len(self._ready[lane]), lane != self._awaited))

    def take(self, lane: int, stopping: Callable[[], bool]) -> _Delivered | None:
        ready = self._ready[lane]  # of a deque, one thread may take from one end while another adds to the other
        while not ready:
            with self._made:
                self._awaited = lane
                if not ready:
                    self._made.wait(0.1)
                self._awaited = None
            if not ready and stopping():
                raise Stopped("stopped while waiting for data")
        found = ready.popleft()
        if len(ready) == _AHEAD - _AT_ONCE:
            with self._room:
                self._room.notify_all()
        if isinstance(found, BaseException):
            raise found
        return found

    def close(self) -> None:
        with self._room:
            self._closed = True
            self._room.notify_all()
        deadline = time.monotonic() + 1.0
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if not any(thread.is_alive() for thread in self._threads):  # else one waits for a source that does not answer
            _close(self._windows)
