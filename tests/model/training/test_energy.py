"""Counters of energy, in a folder laid out like /sys/class/powercap; NVML where there is a GPU that has one."""

import time

import pytest
import torch

from model.training import energy
from model.training.energy import Meter, Nvml, Rapl, machine_meter

CPU = torch.device("cpu")


@pytest.fixture
def powercap(tmp_path):
    """Two processors, a part of the first, and the platform, which holds both."""
    names = {"intel-rapl:0": "package-0", "intel-rapl:1": "package-1", "intel-rapl:0:0": "core", "intel-rapl:2": "psys"}
    for folder, name in names.items():
        write(tmp_path / folder, 1_000_000, name)
    (tmp_path / "intel-rapl").mkdir()
    return tmp_path


def write(folder, microjoules, name=None):
    folder.mkdir(exist_ok=True)
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    if name is not None:
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text("262143328850\n")


@pytest.fixture
def any_time(monkeypatch):
    monkeypatch.setattr(energy, "_SECONDS_BETWEEN_READINGS", 0.0)


def test_each_processor_counts_once(powercap, any_time):
    meter = machine_meter(CPU, powercap)
    assert meter.about() == {"energy_counters": ["cpu package-0", "cpu package-1"]}
    for folder in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0", "intel-rapl:2"):
        write(powercap / folder, 3_500_000)
    assert meter.joules() == 5.0
    assert meter.joules() == 0.0


def test_a_counter_that_starts_anew_goes_on(powercap):
    write(powercap / "intel-rapl:0", 262_143_328_850 - 4_000_000)
    counter = Rapl(powercap / "intel-rapl:0")
    write(powercap / "intel-rapl:0", 6_000_000)
    assert counter.joules() == 10.0
    write(powercap / "intel-rapl:0", 7_000_000)
    assert counter.joules() == 1.0


def test_what_cannot_be_read_now_is_counted_later(powercap, any_time):
    meter = machine_meter(CPU, powercap)
    write(powercap / "intel-rapl:0", 2_000_000)
    (powercap / "intel-rapl:1" / "energy_uj").unlink()
    assert meter.joules() is None
    write(powercap / "intel-rapl:0", 3_000_000)
    write(powercap / "intel-rapl:1", 9_000_000)
    assert meter.joules() == 2.0 + 8.0


def test_it_is_read_once_a_second(powercap):
    meter = machine_meter(CPU, powercap)
    write(powercap / "intel-rapl:0", 5_000_000)
    assert meter.joules() is None
    time.sleep(1.05)
    assert meter.joules() == 4.0
    assert meter.joules() is None


def test_a_machine_without_counters_says_nothing(tmp_path, any_time):
    for place in (tmp_path, tmp_path / "not there"):
        meter = machine_meter(CPU, place)
        assert (meter.about(), meter.joules()) == ({}, None)
    write(tmp_path / "intel-rapl:0", 0)  # no name and no range
    assert machine_meter(CPU, tmp_path).counters == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_no_counter_of_one(tmp_path):
    with pytest.raises(OSError, match=r"."):
        Nvml("00000000-0000-0000-0000-000000000000")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_counts(tmp_path, any_time):
    meter = machine_meter(torch.device("cuda"), tmp_path)
    if not meter.counters:
        pytest.skip("this GPU has no counter")
    a = torch.randn(4096, 4096, device="cuda")
    until = time.monotonic() + 2
    while time.monotonic() < until:
        a = (a @ a).clamp(-1, 1)
    torch.cuda.synchronize()
    joules = meter.joules()
    assert 20 < joules < 4000, "two seconds at 10 to 2000 W"
    assert isinstance(meter, Meter)
