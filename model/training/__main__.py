"""`python -m model.training RUN_FOLDER`: the trainer, a process of its own.

With `--set hardware.devices=4` it becomes torch's elastic launcher for four ranks of itself; several machines are started by torchrun
(docs/operations.md). Exit codes: 0 finished, 75 stopped resumably, 2 the user's mistake, 1 a fault.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from model.errors import (
    EXIT_FAULT,
    EXIT_STOPPED,
    EXIT_USER,
    Interrupted,
    NotSaved,
    NoWholeCheckpoint,
    SaidByFirst,
    Stopped,
    TooManyBadSteps,
    UserError,
)
from model.libraries import prepare_libraries, without_collector
from model.stop import StopRequest  # what is imported here is imported before a signal can be heard: little

if TYPE_CHECKING:
    from model.run_folder import RunFolder
    from model.training.run import Machine

_LAUNCHED = "RANK" in os.environ
"""torch's elastic launcher started this process: it is one rank."""

_DISK_SAYS_NO = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EFBIG, errno.EIO, getattr(errno, "EDQUOT", errno.ENOSPC)}


def main() -> int:
    """Train the run in the folder given; returns the exit code."""
    stop = StopRequest()
    stop.on_signals()
    prepare_libraries()
    parser = argparse.ArgumentParser(prog="python -m model.training", description="Train the run in RUN_FOLDER, or go on with it.")
    parser.add_argument("run_folder", type=Path)
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", dest="changes", help="a field of hardware or journal; again and again"
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FOLDER", help="where the checkpoint lies that checkpoint.checkpoint_to_resume or fork_of names"
    )
    parser.add_argument("--watch-stdin", action="store_true", help="stop resumably when standard input closes")
    arguments = parser.parse_args()
    if arguments.watch_stdin:
        stop.on_input_closed()
    elif _LAUNCHED:
        stop.on_parent_gone()
    try:
        with stop.interruptible(), without_collector():
            from model.params import parse_overrides, validated
            from model.run_folder import RunFolder
            from model.training.run import Machine

            folder = RunFolder(arguments.run_folder.resolve())
            machine = validated(Machine, parse_overrides(arguments.changes), "machine")
        if not _LAUNCHED and machine.hardware.devices != 1:
            from model.training.launch import launch

            return launch(folder, machine, sys.argv[1:], stop)
        _train(folder, machine, stop, arguments.checkpoint)
    except (Exception, Interrupted) as error:
        return _said(Stopped(f"stopped ({stop.reason}); the same command goes on") if stop.interrupted else error)
    return 0


def _train(folder: RunFolder, machine: Machine, stop: StopRequest, named: Path | None) -> None:
    """This rank's part."""
    if machine.hardware.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts
    with contextlib.ExitStack() as locks:
        with stop.interruptible() if not _LAUNCHED else contextlib.nullcontext():
            from model.training.lock import Fence, held, no_fence

            fences: list[Fence] = []

            def lock_run() -> None:
                fences.append(locks.enter_context(held(folder.lock, f"the run {folder.experiment}")))

            if not _LAUNCHED:
                lock_run()
            with without_collector():
                from model.device import pick_device
                from model.training.distributed import join, own_device
                from model.training.gpus import own_gpu
                from model.training.trainer import Trainer

            device = own_device(pick_device(machine.hardware.device))
            if device.type == "cuda":
                device = locks.enter_context(own_gpu(device, folder.experiment))
            ranks = join(device)
            if _LAUNCHED:
                ranks.from_first(lock_run)
            trainer = Trainer(folder, machine, device, ranks, stop, next(iter(fences), no_fence), named)
        trainer.run()


def _said(error: BaseException) -> int:
    """Say what went wrong, unless another rank does; returns the exit code."""
    from model.say import say

    silent = isinstance(error, SaidByFirst)
    if isinstance(error, SaidByFirst):
        error = error.error
    if isinstance(error, Stopped | TooManyBadSteps):  # of all ranks at once
        silent = silent or int(os.environ.get("RANK", "0")) > 0
    code, line = EXIT_FAULT, f"error: {error}"
    if isinstance(error, Stopped):
        code, line = EXIT_STOPPED, str(error)
    elif isinstance(error, UserError):
        code = EXIT_USER
    elif isinstance(error, OSError) and error.errno in _DISK_SAYS_NO:
        line = f"error: {error.filename or 'the disk'}: {error.strerror}; nothing that was saved is lost, the same command goes on"
    elif not isinstance(error, NoWholeCheckpoint | NotSaved | TooManyBadSteps):
        line = "".join(traceback.format_exception(error)).rstrip()
    if not silent:
        say(line)
    return code


if __name__ == "__main__":
    code = main()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # a thread may wait inside pyarrow for a source that does not answer: the interpreter's own end would crash over it
