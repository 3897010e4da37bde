"""The steps of the pipeline, each a process of its own, and the adapters to MLflow and DVC."""

import gc
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from model.errors import EXIT_STOPPED


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, f"error: stopped: {signal.Signals(number).name} received\n".encode())
    os._exit(EXIT_STOPPED)


if sys.argv[:1] == ["-m"]:  # `python -m tasks.…`: a stage imports for seconds, and has nothing to lose until it sets handlers of its own
    for _name in ("SIGINT", "SIGTERM", "SIGBREAK"):
        if hasattr(signal, _name):
            signal.signal(getattr(signal, _name), _leave)
    gc.set_threshold(10_000)  # at Python's 700, an eighth of the time that MLflow and torch take to import goes into looking for garbage
