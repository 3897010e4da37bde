"""What torch and OpenMP are told by way of the environment, which they read when they are imported."""

from __future__ import annotations

import os

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
