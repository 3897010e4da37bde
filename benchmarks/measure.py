"""What a process used: CPU seconds, wall seconds, memory and bytes read."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]


def report(start: Callable[[], Iterator[int]], budget: int) -> NoReturn:
    """Run what `start` starts until it has made `budget` tokens, print the figures as a line of JSON and end the process at once.

    `start` gives the number of tokens of each batch. CPU time is user and system time of the process with all its threads. The clocks run
    from just before `start` is called. What was not read to its end is never closed: `datasets` sleeps for 5 s then.

    Raises:
        RuntimeError: it came to its end before.
    """
    read, cpu, wall = bytes_read(), time.process_time(), time.perf_counter()
    first: dict[str, Any] = {}
    tokens = 0
    batches = start()
    for made in batches:
        if not first:
            first = {"tokens": made, "cpu": time.process_time(), "wall": time.perf_counter(), "read": bytes_read()}
        tokens += made
        if tokens >= budget:
            break
    cpu_end, wall_end = time.process_time(), time.perf_counter()
    if tokens < budget:
        raise RuntimeError(f"only {tokens:,} of {budget:,} tokens in the data: fewer --tokens or more --rows")
    figures = {
        "tokens_per_cpu_s": round(tokens / (cpu_end - cpu)),
        "tokens_per_wall_s": round(tokens / (wall_end - wall)),
        "peak_rss_mb": round(peak_rss() / 1e6, 1),
        "bytes_to_first_batch": None if read is None else first["read"] - read,
        "seconds_to_first_batch": round(first["wall"] - wall, 3),
        "cpu_seconds_to_first_batch": round(first["cpu"] - cpu, 3),
        "tokens_per_cpu_s_after_first_batch": round((tokens - first["tokens"]) / max(cpu_end - first["cpu"], 1e-9)),
        "tokens": tokens,
    }
    print(json.dumps(figures), flush=True)
    os._exit(0)


def bytes_read() -> int | None:
    """Bytes this process has read from files so far (not those of memory maps), or None where the system does not say."""
    try:
        return int(re.search(r"^rchar: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)[1])  # type: ignore[index]
    except OSError:
        return None


def peak_rss() -> int:
    """Most bytes of memory this process has held at once.

    Linux's `ru_maxrss` begins with what the parent held when it forked, `VmHWM` does not.
    """
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)):
        return 1024 * int(found[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_own_process(module: str, argument: dict[str, Any], env: dict[str, str]) -> Any:
    """What `python -m module ARGUMENT` prints last, a line of JSON.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    command = [sys.executable, "-m", module, json.dumps(argument)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{module} {argument}: exit {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def machine(cores: int) -> dict[str, Any]:
    """What the figures depend on."""
    from importlib.metadata import version

    packages = {package: version(package) for package in ("torch", "datasets", "pyarrow", "tiktoken")}
    return {"system": platform.platform(), "processor": platform.machine(), "cores": cores, "python": platform.python_version(), **packages}
