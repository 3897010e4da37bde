"""Waiting for something that may never answer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def wait_for(action: Callable[[], Result], give_up: Callable[[], BaseException | None]) -> Result:
    """The result of `action`, done in a thread; what it raises is raised here.

    `give_up` is asked several times a second. The error it returns is raised, and the thread left to itself: it ends with its action, or
    with the process.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(action())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="waited-for", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
        if thread.is_alive() and (reason := give_up()) is not None:
            raise reason
    if errors:
        raise errors[0]
    return results[0]
