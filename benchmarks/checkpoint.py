"""What a checkpoint costs: this project's beside torch.save and torch's distributed checkpoint (DCP), in one table of one run.

    python -m benchmarks.checkpoint                            # GPT-2 124M with AdamW's state, 1.5 GB: about twelve minutes on two cores
    python -m benchmarks.checkpoint --preset tiny --repeat 1   # half a minute
    python -m benchmarks.checkpoint --folder /mnt/disk         # on another disk than that of the temporary files

All train the same network with this project's engine, and save and load its weights and its optimizer's state. Each turn is a process of
its own: some steps, a first save, more saves, a load, and a load after one bit of the largest file was flipped. A round is one turn of
each, so what a busy machine does to one it does to its neighbours; ratios are medians over the rounds of paired figures. While something
is written in the background, training goes on. Nothing is dropped from the system's cache: what is loaded was written just before.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.measure import in_own_process, machine, peak_rss
from benchmarks.savers import BATCH, CONTESTANTS, LENGTH, Contestant, Training
from model.config import PRESETS, CheckpointConfig

if TYPE_CHECKING:
    import torch

REFERENCE = "torch.save"
STEPS_BEFORE = 5
"""Timed ones, of which saving must not be blamed for the time and the memory."""
SAVES = 3
"""A turn; ours keeps the memory that the first one made."""
SHORT = 64
"""Tokens of the one window of a step that goes on beside a write: several of them fit into it even on two cores."""
SILENT, FOUND, HARMLESS = "loads it", "finds it", "loads, unharmed"
"""What becomes of a flipped bit."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write it as JSON if asked to."""
    options = _options(arguments)
    if options.worker:
        print(json.dumps(turn(**json.loads(options.worker))), flush=True)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in options.only}
    with Console(stderr=True).status("starting") as status:
        names = list(rounds)
        for number in range(options.repeat):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                status.update(f"round {number + 1} of {options.repeat}: {name}")
                task = {
                    "name": name,
                    "preset": options.preset,
                    "folder": str(options.folder),
                    "threads": options.threads,
                    "long_steps": options.steps if name == "ours" and number == 0 else 0,
                }
                rounds[name].append(in_own_process("benchmarks.checkpoint", task, dict(os.environ)))
    results = {name: _result(rounds, name) for name in rounds}
    some_turn = next(iter(rounds.values()))[0]
    settings = {
        "preset": options.preset,
        "rounds": options.repeat,
        "saves": SAVES,
        "gigabytes": round(some_turn["bytes"] / 1e9, 3),
        "device": some_turn["device"],
        "threads": some_turn["threads"],
        "file_system": file_system(options.folder),
    }
    if "ours" in rounds:
        every, step_s = CheckpointConfig().save_every_n_iterations, rounds["ours"][0]["long_step_s"]
        shares = {f"{name}_share": results["ours"][f"{name}_s"] / (every * step_s) for name in ("stall", "lost")}
        settings |= {"every": every, "step_s": step_s, **shares}
    Console(width=None if Console().is_terminal else 160).print(_table(results, settings))
    if options.json:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        text = json.dumps({**results, "settings": settings, "machine": machine(cores)}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", choices=list(PRESETS), default="small", help="size of the network (default: small, GPT-2 124M)")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="turns of each contestant (default: 3)")
    parser.add_argument("--steps", type=int, default=2, metavar="N", help=f"of {BATCH} × {LENGTH} tokens, to compare with (default: 2)")
    parser.add_argument("--threads", type=int, metavar="N", help="torch's on a CPU (default: its own choice)")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to write (default: temporary files)")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), metavar="NAME", help="some of the contestants")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("worker", nargs="?", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def file_system(folder: Path) -> str:
    """Kind and device of the one that holds `folder`, as `ext4 on /dev/vda`; empty where the system does not say."""
    place = folder.resolve()
    mounts = [mount for mount in psutil.disk_partitions(all=True) if place.is_relative_to(mount.mountpoint)]
    if not mounts:
        return ""
    nearest = max(mounts, key=lambda mount: len(mount.mountpoint))
    return f"{nearest.fstype} on {nearest.device}"


def turn(name: str, preset: str, folder: str, threads: int | None, long_steps: int) -> dict[str, Any]:
    """One turn of one contestant, in this process. `long_steps`: how many large steps to time as well."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    training = Training(preset)
    with tempfile.TemporaryDirectory(prefix="checkpoint-benchmark-", dir=folder) as place, contextlib.ExitStack() as stack:
        contestant = CONTESTANTS[name](training, Path(place))
        stack.callback(contestant.close)
        figures = _saves(training, contestant)
        figures |= _loads(training, contestant, contestant.place(SAVES), figures.pop("fingerprint"))
        figures |= {"fsync": contestant.fsync, "device": _name(training.device), "threads": torch.get_num_threads()}
        if long_steps:
            seconds = [training.step(BATCH, training.config.data.max_length) for _ in range(1 + long_steps)]
            figures["long_step_s"] = statistics.median(seconds[1:])
    return figures


def _saves(training: Training, contestant: Contestant) -> dict[str, Any]:
    """Times in seconds and memory in bytes of some saves beside a training, and what the training was at the last of them."""
    for _ in range(2):
        training.step(1, SHORT)
    _forget_peak()
    before = [training.step(1, SHORT) for _ in range(STEPS_BEFORE)]
    rss, peak = psutil.Process().memory_info().rss, peak_rss()
    contestant.prepare()
    for _ in range(STEPS_BEFORE):
        training.step(1, SHORT)
    stalls, durable, beside, fingerprint = [], [], [], 0
    for number in range(1, SAVES + 1):
        training.step(1, SHORT)
        if number == SAVES:
            fingerprint = training.fingerprint()
        training.synchronize()
        _forget_peak()
        began = time.perf_counter()
        wait = contestant.save(number)
        stalls.append(time.perf_counter() - began)
        if wait is None:
            durable.append(stalls[-1])
        else:
            seconds, ended = _steps_until(training, wait)
            beside.append(seconds)
            durable.append(ended - began)
        if number == 1:
            peak_at_first = peak_rss()
    lost = [sum(seconds) - len(seconds) * statistics.median(before) for seconds in beside] or [0.0]
    return {
        "first_stall_s": stalls[0],
        "stall_s": statistics.median(stalls[1:]),
        "durable_s": statistics.median(durable),
        "step_s": statistics.median(before),
        "step_beside_s": statistics.fmean(itertools.chain(*beside)) if beside else None,
        "lost_s": statistics.median(stalls[1:]) + statistics.median(lost),
        "extra_bytes": max(0, peak_at_first - peak),
        "kept_bytes": max(0, psutil.Process().memory_info().rss - rss),
        "fingerprint": fingerprint,
    }


def _steps_until(training: Training, wait: Callable[[], Any]) -> tuple[list[float], float]:
    """Go on training until `wait` returns: the steps' seconds, and when that was.

    Raises:
        Exception: what `wait` raised.
    """
    outcome: list[Any] = []

    def waiting() -> None:
        try:
            wait()
            outcome.append(time.perf_counter())
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=waiting)
    thread.start()
    seconds = []
    while not outcome:
        seconds.append(training.step(1, SHORT))
    thread.join()
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return seconds, outcome[0]


def _loads(training: Training, contestant: Contestant, path: Path, fingerprint: int) -> dict[str, Any]:
    """Times in seconds of loading what was saved, and what loading does with a flipped bit."""
    ways = {"load": contestant.load} | ({"load_mapped": contestant.load_mapped} if contestant.load_mapped is not None else {})
    figures: dict[str, Any] = {"load_mapped_s": None, "verify_s": None}
    for way, load in ways.items():
        training.forget()
        began = time.perf_counter()
        load(path)
        training.synchronize()
        figures[f"{way}_s"] = time.perf_counter() - began
        if training.fingerprint() != fingerprint:
            raise RuntimeError(f"{path}: what was loaded is not what was saved")
    if contestant.verify is not None:
        began = time.perf_counter()
        contestant.verify(path)
        figures["verify_s"] = time.perf_counter() - began
    files = [file for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    figures["bytes"] = sum(file.stat().st_size for file in files)
    training.forget()  # also lets go of what is mapped
    _flip_a_bit(max(files, key=lambda file: file.stat().st_size))
    found = set()
    for load in ways.values():
        training.forget()
        try:
            load(path)
            found.add(HARMLESS if training.fingerprint() == fingerprint else SILENT)
        except Exception as error:
            found.add(FOUND)
            figures["flipped_bit_error"] = f"{type(error).__name__}: {error}"
    figures["flipped_bit"] = " or ".join(sorted(found))
    return figures


def _flip_a_bit(path: Path) -> None:
    """In the middle of a file."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def _forget_peak() -> None:
    """Let `peak_rss` begin anew, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _result(rounds: dict[str, list[dict[str, Any]]], name: str) -> dict[str, Any]:
    """A row, as the JSON has it: medians over the rounds."""
    turns = rounds[name]

    def median(key: str, digits: int) -> float | None:
        values = [turn[key] for turn in turns]
        return None if None in values else round(statistics.median(values), digits)

    times = ("first_stall_s", "stall_s", "durable_s", "lost_s", "load_s", "load_mapped_s", "verify_s")
    slower = [turn["step_beside_s"] / turn["step_s"] for turn in turns if turn["step_beside_s"] is not None]
    return {
        **{key: median(key, 4) for key in times},
        "times_less_stall": _times_less(rounds, name, "stall_s"),
        "times_less_lost": _times_less(rounds, name, "lost_s"),
        "times_less_load": _times_less(rounds, name, "load_s"),
        "steps_beside": round(statistics.median(slower), 3) if slower else None,
        "extra_mb": round(statistics.median(turn["extra_bytes"] for turn in turns) / 1e6, 1),
        "kept_mb": round(statistics.median(turn["kept_bytes"] for turn in turns) / 1e6, 1),
        "fsync": turns[0]["fsync"],
        "flipped_bit": turns[0]["flipped_bit"],
        "flipped_bit_error": turns[0].get("flipped_bit_error"),
        "turns": turns,
    }


def _times_less(rounds: dict[str, list[dict[str, Any]]], name: str, key: str) -> float | None:
    """How many times less than the reference: the median over the rounds; null without the reference."""
    if REFERENCE not in rounds:
        return None
    return round(statistics.median(peer[key] / own[key] for own, peer in zip(rounds[name], rounds[REFERENCE], strict=True)), 2)


def _table(results: dict[str, dict[str, Any]], settings: dict[str, Any]) -> Table:
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "first stall s": lambda row: f"{row['first_stall_s']:.2f}",
        "stall s": lambda row: f"{row['stall_s']:.2f}",
        f"× less than {REFERENCE}": lambda row: _cell(row["times_less_stall"], "{:.1f}"),
        "complete s": lambda row: f"{row['durable_s']:.1f}",
        "fsync": lambda row: row["fsync"],
        "steps beside it ×": lambda row: _cell(row["steps_beside"], "{:.2f}"),
        "training lost s": lambda row: f"{row['lost_s']:.2f}",
        "extra MB": lambda row: f"{row['extra_mb']:,.0f}",
        "of it kept": lambda row: f"{row['kept_mb']:,.0f}",
        "load s": lambda row: f"{row['load_s']:.2f}",
        "mapped": lambda row: _cell(row["load_mapped_s"], "{:.2f}"),
        "verify s": lambda row: "none" if row["verify_s"] is None else f"{row['verify_s']:.2f}",
        "a flipped bit": lambda row: row["flipped_bit"],
    }
    caption = (
        f"{settings['preset']} with AdamW's state, {settings['gigabytes']:.2f} GB, {settings['device']} ({settings['threads']} threads), "
        f"{settings['file_system']}. "
        f"Medians of {settings['rounds']} rounds of {settings['saves']} saves. stall: training waits, after the first time; complete: from "
        "the call until all is on the disk (fsync 'data': but for .metadata, fsynced before it is written, and the folder's names), while "
        "training goes on; steps beside it: their time over that of steps before; training lost: the stall and what those steps took "
        "longer; extra: peak memory over that of the same steps without a save; load: to a ready network and optimizer, out of the "
        "system's cache, ours with verify."
    )
    if "step_s" in settings:
        caption += (
            f" Ours, every {settings['every']:,} steps of {settings['step_s']:.2f} s: the stall is {settings['stall_share']:.4%} of "
            f"training, all that is lost {settings['lost_share']:.4%}."
        )
    table = Table(title="A checkpoint", caption=caption)
    table.add_column("contestant")
    for heading in columns:
        table.add_column(heading, justify="right")
    for name, row in results.items():
        table.add_row(name, *(cell(row) for cell in columns.values()))
    return table


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


if __name__ == "__main__":
    main()
