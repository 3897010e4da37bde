"""`python -m model.training RUN_FOLDER`: the trainer, a process of its own.

Exit codes: 0 finished, 75 stopped resumably, 2 the user's mistake, 1 a fault.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from pathlib import Path

from model.errors import EXIT_FAULT, EXIT_STOPPED, EXIT_USER, NoWholeCheckpoint, Stopped, UserError
from model.run_folder import RunFolder
from model.training.lock import gpu_lock, held
from model.training.stop import StopRequest


def main() -> int:
    """Train the run in the folder given; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m model.training", description="Train the run in RUN_FOLDER, or go on with it.")
    parser.add_argument("run_folder", type=Path)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--watch-stdin", action="store_true", help="stop resumably when standard input closes")
    arguments = parser.parse_args()
    folder = RunFolder(arguments.run_folder.resolve())
    stop = StopRequest()
    stop.on_signals()
    if arguments.watch_stdin:
        stop.on_parent_gone()
    try:
        with contextlib.ExitStack() as locks:
            locks.enter_context(held(folder.lock, f"the run {folder.experiment}"))
            from model.device import pick_device  # torch takes seconds: be stoppable first
            from model.training.trainer import Trainer

            device = pick_device(arguments.device)
            if device.type == "cuda":
                locks.enter_context(held(gpu_lock(device.index or 0), f"the GPU {device}"))
            Trainer(folder, device, arguments.compile, stop).run()
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return EXIT_STOPPED
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER
    except NoWholeCheckpoint as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAULT
    except Exception:
        traceback.print_exc()
        return EXIT_FAULT
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a thread may wait inside pyarrow for a source that does not answer: the interpreter's own end would crash over it
