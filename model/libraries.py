"""How large libraries are imported: what torch and OpenMP are told by way of the environment, and no collector at work meanwhile."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator

_SETTINGS = {
    # OpenMP's threads soon sleep while they wait for each other: spinning, they keep the core from the one that they wait for as soon as
    # anything else runs on the machine.
    "GOMP_SPINCOUNT": "1000",
    "THP_MEM_ALLOC_ENABLE": "1",  # torch asks the system for huge pages: page faults were a fifth of a small network's time
}


def prepare_libraries() -> None:
    """For a process that trains, before it imports torch; what the environment says already stays. It changes no result.

    Figures: docs/experiments.md, 2026-11-28.
    """
    os.environ.update({**_SETTINGS, **os.environ})


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """For imports: Python does not look for garbage meanwhile, which is a fifth of their time, and later not among what they made.

    In training, a collection that looks through all of torch takes 0.2 s.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
