"""Ranks: the processes that train one network together, under torch's elastic launcher.

What ranks must agree on goes over the CPU (gloo); gradients take the fastest way there is. `join` reads the launcher's environment; a
process that was started alone is one of one, and nothing here costs it anything.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from model.errors import SaidByFirst

Result = TypeVar("Result")

_PATIENCE = datetime.timedelta(minutes=5)
"""How long a rank waits for a silent one: as long as the first may take to write a checkpoint. One that died is noticed at once."""


class Ranks:
    """This process among those that train together.

    Args:
        rank: which one it is.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def gather(self, *numbers: int) -> list[list[int]]:
        """The numbers that each rank gave, rank by rank. Every rank must call it, with as many; so it is a barrier, too."""
        if self.size == 1:
            return [list(numbers)]
        own = torch.tensor(numbers, dtype=torch.int64)
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own)
        return [each.tolist() for each in found]

    def gather_objects(self, value: Result) -> list[Result]:
        """The value that each rank gave, rank by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def from_first(self, action: Callable[[], Result]) -> Result:
        """What `action` returns on the first rank, which alone does it.

        Raises:
            Exception: what it raised there.
            SaidByFirst: on the others, when it raised.
        """
        if self.size == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = action()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0)
        value, fault = outcome
        if fault is not None:
            raise fault if self.first else SaidByFirst(fault)
        return cast(Result, value)

    def sum(self, values: Sequence[Tensor]) -> list[float]:
        """The sums over all ranks of scalars on the ranks' devices. Waits for the devices."""
        stacked = torch.stack([value.detach().double() if value.device.type != "mps" else value.detach() for value in values])
        if self.size > 1:
            dist.all_reduce(stacked)
        found: list[float] = stacked.tolist()
        return found


def launched() -> bool:
    """Whether torch's elastic launcher started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join(device: torch.device) -> Ranks:
    """Meet the other ranks, if the launcher started some. `device` is this rank's own."""
    if not launched() or int(os.environ["WORLD_SIZE"]) == 1:
        return Ranks()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_PATIENCE, device_id=device if device.type == "cuda" else None)
    return Ranks(dist.get_rank(), dist.get_world_size())


def own_device(device: torch.device) -> torch.device:
    """The device of this rank: on a machine with several GPUs the one with the number that the launcher gave."""
    if device.type != "cuda" or not launched():
        return device
    own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(own)
    return own


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself; of one that is distributed over the ranks, all of it: every rank must call this then."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A copy of `value` where the parameter is: on its device and, unless it is a lone number, distributed over the same ranks."""
    copy = value.to(parameter.device, copy=True)
    if isinstance(parameter, DTensor) and copy.dim():
        return distribute_tensor(copy, parameter.device_mesh, parameter.placements)
    return copy
