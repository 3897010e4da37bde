"""Which of a machine's GPUs a training takes: free ones. While too few are free it waits, and says for whom."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator

import torch

from model.say import say
from model.training.distributed import launched
from model.training.lock import held_gpus

HELD = "GPT2_GPUS_HELD"
"""Environment of ranks whose launcher holds their GPUs."""
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_BETWEEN_LINES = 60.0


@contextlib.contextmanager
def own_gpu(device: torch.device, experiment: str) -> Iterator[torch.device]:
    """Hold one GPU meanwhile, and make it this process's own: a free one, or the one that torchrun gave this rank."""
    if HELD in os.environ:
        yield device
        return
    gpus = _identities()
    places = [device.index] if launched() and device.index is not None else list(range(len(gpus)))
    with held_gpus([gpus[place] for place in places], 1, experiment, _say_and_wait()) as taken:
        own = torch.device("cuda", places[taken[0]])
        torch.cuda.set_device(own)
        yield own


@contextlib.contextmanager
def gpus_for_ranks(count: int, experiment: str) -> Iterator[None]:
    """Hold `count` free GPUs meanwhile. Ranks that are started then see only these, in the order of their local ranks."""
    before = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", HELD)}
    gpus = _identities()
    with held_gpus(gpus, count, experiment, _say_and_wait()) as taken:
        os.environ |= {"CUDA_VISIBLE_DEVICES": ",".join(gpus[place] for place in taken), HELD: "1"}
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def _identities() -> list[str]:
    """The UUIDs of the GPUs that this process sees, as CUDA_VISIBLE_DEVICES takes them: the same for all processes of the machine."""
    return [f"GPU-{torch.cuda.get_device_properties(place).uuid}" for place in range(torch.cuda.device_count())]


def _say_and_wait() -> Callable[[str], None]:
    said = -SECONDS_BETWEEN_LINES

    def wait(why: str) -> None:
        nonlocal said
        if time.monotonic() - said >= SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            say(why)
        time.sleep(SECONDS_BETWEEN_LOOKS)

    return wait
