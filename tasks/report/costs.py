"""What a run took: hours, energy, money. Measured where the machine counted, else estimated from assumptions that are named."""

from __future__ import annotations

import re
from dataclasses import dataclass

from model.flops import peak_flops
from tasks.gpu_offers import OFFERS, Offer
from tasks.report.history import History, Segment

WATTS_PER_CORE = 10.0
"""An assumption: a core's share of a busy processor. 5 to 15 W by its kind."""
BOARD_WATTS = {
    "B200": 1000,
    "H200": 700,
    "H100": 700,
    "H100-PCIe": 350,
    "MI300X": 750,
    "A100": 400,
    "L40S": 350,
    "L4": 72,
    "RTX-5090": 575,
    "RTX-4090": 450,
    "RTX-3090": 350,
    "T4": 70,
}
"""The most that a board may take, by its vendor's data sheet; keys as in `tasks.gpu_offers.OFFERS`."""


@dataclass(frozen=True)
class Costs:
    """Of the whole run. What could neither be measured nor estimated is None."""

    measured_joules: float | None
    measured_seconds: float
    """In which the machine counted."""
    counters: list[str]
    estimated_joules: float | None
    """For the time in which it did not; 0: there was none."""
    assumption: str
    """Behind `estimated_joules`."""
    usd: float | None
    offer: Offer | None
    """Whose price `usd` is."""


def costs(history: History) -> Costs:
    """From the segments of a run's journal."""
    measured = [segment for segment in history.segments if segment.joules is not None]
    others = [segment for segment in history.segments if segment.joules is None]
    estimates = [_estimated(segment) for segment in others]
    offers = {offer for segment in history.segments if (offer := _offer(segment)) is not None}
    usd = [_usd(segment) for segment in history.segments]
    return Costs(
        measured_joules=sum(segment.joules or 0.0 for segment in measured) if measured else None,
        measured_seconds=sum(segment.seconds for segment in measured),
        counters=sorted({name for segment in measured for name in segment.started["energy_counters"]}),
        estimated_joules=None if None in estimates else sum(joules or 0.0 for joules in estimates),
        assumption="; ".join(dict.fromkeys(_assumption(segment) for segment in others)),
        usd=None if None in usd else sum(price or 0.0 for price in usd),
        offer=offers.pop() if len(offers) == 1 else None,
    )


def device_name(segment: Segment) -> str:
    """`NVIDIA H100 80GB HBM3`, `cpu`; older journals know `cuda` only."""
    return str(segment.started.get("device_name") or segment.started["device"].partition(":")[0])


def device(history: History) -> str:
    """What the newest process computed with: `2 × NVIDIA H100 80GB HBM3`, `2 CPU cores`."""
    started, name = history.started, device_name(history.segments[-1])
    if name == "cpu":
        cores = started["threads"] * started["ranks"]
        return f"{cores} CPU core{'s' * (cores != 1)}"
    return f"{started['ranks']} × {name}" if started["ranks"] > 1 else name


def _offer(segment: Segment) -> Offer | None:
    """The type of GPU of that name. Words alone would take an H100 NVL for an H100: its peak tells them apart."""
    name = device_name(segment)
    words = set(re.split(r"[\s-]+", name.upper()))
    for offer in OFFERS:
        wanted = set(offer.device.upper().split())
        if wanted <= words and (peak := peak_flops(name, "fp32")) is not None and peak == peak_flops(offer.device, "fp32"):
            return offer
    return None


def _watts(segment: Segment) -> float | None:
    started = segment.started
    if started["device"] == "cpu":
        return WATTS_PER_CORE * started["threads"] * started["ranks"]
    offer = _offer(segment)
    return BOARD_WATTS[offer.name] * started["ranks"] if offer is not None else None


def _estimated(segment: Segment) -> float | None:
    watts = _watts(segment)
    return None if watts is None else watts * segment.seconds


def _assumption(segment: Segment) -> str:
    started, offer = segment.started, _offer(segment)
    if started["device"] == "cpu":
        cores = started["threads"] * started["ranks"]
        return f"{WATTS_PER_CORE:g} W for each of {cores} core{'s' * (cores != 1)}"
    if offer is None:
        return f"nothing is known of the power of {device_name(segment)}"
    return f"{BOARD_WATTS[offer.name]} W for each of {started['ranks']} {offer.name}, the most its board may take, nothing else"


def _usd(segment: Segment) -> float | None:
    offer = _offer(segment)
    return offer.usd_per_hour * segment.started["ranks"] * segment.seconds / 3600 if offer is not None else None
