"""Starting the ranks of one machine under torch's elastic launcher, and saying in one exit code how they ended."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import uuid

import psutil
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from model.device import pick_device
from model.errors import EXIT_FAULT, EXIT_STOPPED, EXIT_USER, UserError
from model.run_folder import RunFolder
from model.say import say
from model.stop import StopRequest
from model.stream.batches import check_shares
from model.training.gpus import gpus_for_ranks
from model.training.run import Machine, read_run


def launch(folder: RunFolder, machine: Machine, arguments: list[str], stop: StopRequest) -> int:
    """Train with `hardware.devices` ranks on this machine; returns the exit code: 2 if one says that its user made a mistake, 75 if they
    stopped, or one was killed: the same command goes on from the last checkpoint.

    Args:
        folder: the run's.
        machine: what it is computed with.
        arguments: the command line, for the ranks.
        stop: a stop request for all ranks.

    Raises:
        UserError: the ranks cannot share the work, or the machine has fewer GPUs.
    """
    config, _ = read_run(folder)
    asked = machine.hardware.devices
    count = max(1, torch.cuda.device_count()) if asked == "auto" else asked
    on_gpus = pick_device(machine.hardware.device).type == "cuda"
    if on_gpus and count > torch.cuda.device_count():
        raise UserError(f"hardware.devices: {count} ranks need as many GPUs, and this machine has {torch.cuda.device_count()}; use auto")
    check_shares(config.data.lanes, config.global_batch, count)
    with contextlib.ExitStack() as locks:
        if on_gpus:
            with stop.interruptible():
                locks.enter_context(gpus_for_ranks(count, folder.experiment))
        return _launch(count, arguments, stop)


def _launch(count: int, arguments: list[str], stop: StopRequest) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else the machine's name must have an address
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # a stop is no failure
    launcher = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.2,
    )
    codes: list[int] = []

    def run() -> None:
        try:
            elastic_launch(launcher, sys.executable)("-m", "model.training", *arguments)
            codes.append(0)
        except ChildFailedError as failed:
            codes.extend(failure.exitcode for failure in failed.failures.values())

    # In a thread the launcher leaves signals alone. Its own way to stop would kill a rank that takes long to save.
    thread = threading.Thread(target=run, name="launcher", daemon=True)
    thread.start()
    told: set[int] = set()
    while thread.is_alive():
        thread.join(0.2)
        for rank in psutil.Process().children() if stop else []:
            if rank.pid not in told:
                told.add(rank.pid)
                rank.send_signal(signal.SIGTERM)
    if killed := [code for code in codes if code < 0]:
        if not stop:
            say(f"a rank was killed by signal {-killed[0]}; the same command goes on from the last checkpoint")
        return EXIT_STOPPED
    return next((code for code in (EXIT_USER, EXIT_FAULT, EXIT_STOPPED) if code in codes), 0 if codes == [0] else EXIT_FAULT)
