"""`python -m flows.prefect_server server start …`: the same as `prefect server start …`, and garbage keeps nobody waiting in it.

On SQLite a transaction of Prefect's event loop holds a lock, and others wait for it in threads, each inside SQLite and with its
connection's mutex. Python collects garbage in whichever thread allocates, mostly in the event loop's. If that comes upon a cursor of a
connection that waits, it waits for the mutex; so the transaction is not committed, and nobody gets an answer for the 60 s after which
SQLite gives up: flows end minutes late, and events are lost. (docs/experiments.md, 2026-11-28.)
"""

from __future__ import annotations

import gc
import threading
import time

_SECONDS_BETWEEN = 0.5
_YOUNG = 1
"""The generation up to which it collects each time: what was allocated lately, which is little."""
_FULL_EVERY = 600
"""Collections: every five minutes it is everything's turn, which takes 0.3 s."""


def collect_apart() -> None:
    """From now on, garbage is collected in a thread of its own, and in no other."""
    gc.disable()
    threading.Thread(target=_collect, name="garbage", daemon=True).start()


def _collect() -> None:
    count = 0
    while True:
        time.sleep(_SECONDS_BETWEEN)
        count += 1
        gc.collect(2 if count % _FULL_EVERY == 0 else _YOUNG)


if __name__ == "__main__":
    collect_apart()
    from prefect.cli import app

    app()
