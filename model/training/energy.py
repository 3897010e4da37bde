"""What training takes in joules, where the machine counts it: processors (RAPL), NVIDIA's GPUs (NVML). No counter, no cost.

A counter counts what its whole processor or board takes, whoever uses it. Memory, disks, fans and losses of the power supply are left out.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import torch

POWERCAP = Path("/sys/class/powercap")
_SECONDS_BETWEEN_READINGS = 1.0
"""RAPL's counters start anew after some 65 kJ at the soonest: minutes."""


class Counter(Protocol):
    """Counts up."""

    name: str

    def joules(self) -> float:
        """Since it was last asked. Raises OSError when it cannot be read; the next answer then includes this one."""


class Rapl:
    """A processor's counter: Linux' powercap, `intel-rapl:0` on Intel and AMD. Mostly only root may read it.

    Raises:
        OSError, ValueError: there is none, or it may not be read.
    """

    def __init__(self, folder: Path) -> None:
        self.name = f"cpu {(folder / 'name').read_text().strip()}"
        self._file = folder / "energy_uj"
        self._range = int((folder / "max_energy_range_uj").read_text())
        self._before = int(self._file.read_text())

    def joules(self) -> float:
        """See Counter."""
        now = int(self._file.read_text())
        used = now - self._before
        self._before = now
        return (used if used >= 0 else used + self._range) / 1e6


class Nvml:
    """A GPU's counter, since the Volta generation; a slice of a GPU (MIG) has none. `uuid` is as torch gives it.

    Raises:
        OSError: there is none.
    """

    def __init__(self, uuid: str) -> None:
        self.name = f"gpu {uuid}"
        self._library: Any = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
        self._device = ctypes.c_void_p()
        self._ask("nvmlInit_v2")
        self._ask("nvmlDeviceGetHandleByUUID", f"GPU-{uuid.removeprefix('GPU-')}".encode(), ctypes.byref(self._device))
        self._before = self._millijoules()

    def joules(self) -> float:
        """See Counter."""
        now = self._millijoules()
        used, self._before = now - self._before, now
        return max(0, used) / 1e3  # a driver that was loaded anew begins at 0

    def _millijoules(self) -> int:
        counted = ctypes.c_ulonglong()
        self._ask("nvmlDeviceGetTotalEnergyConsumption", self._device, ctypes.byref(counted))
        return counted.value

    def _ask(self, function: str, *arguments: Any) -> None:
        try:
            code = getattr(self._library, function)(*arguments)
        except AttributeError:
            raise OSError(f"NVML has no {function}") from None
        if code:
            raise OSError(f"{function}: NVML's error {code}")


class Meter:
    """All counters together, read at most once a second."""

    def __init__(self, counters: list[Counter]) -> None:
        self.counters = counters
        self._read_at = time.monotonic()
        self._counted = 0.0

    def about(self) -> dict[str, list[str]]:
        """For the journal: whose joules they are; nothing where nothing counts."""
        return {"energy_counters": [counter.name for counter in self.counters]} if self.counters else {}

    def joules(self) -> float | None:
        """Since the last answer that was a number. None: there is no counter, it is too soon, or one cannot be read now."""
        if not self.counters or time.monotonic() - self._read_at < _SECONDS_BETWEEN_READINGS:
            return None
        self._read_at = time.monotonic()
        try:
            for counter in self.counters:
                self._counted += counter.joules()
        except (OSError, ValueError):
            return None  # what the others said is kept for the next answer
        counted, self._counted = self._counted, 0.0
        return round(counted, 3)


def machine_meter(device: torch.device, powercap: Path = POWERCAP) -> Meter:
    """A meter of this machine's processors and, if the ranks compute on them, of its GPUs: one a rank."""
    counters: list[Counter] = []
    for folder in sorted(powercap.glob("intel-rapl:*")) if powercap.is_dir() else []:
        with contextlib.suppress(OSError, ValueError):
            counter = Rapl(folder)
            if counter.name.startswith("cpu package"):  # not its parts, nor the whole platform: each joule once
                counters.append(counter)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    for index in range(ranks if device.type == "cuda" else 0):
        with contextlib.suppress(OSError, AttributeError):
            counters.append(Nvml(str(torch.cuda.get_device_properties(index).uuid)))
    return Meter(counters)
