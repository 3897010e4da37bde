"""GPU types that can be rented, and what an hour of each is assumed to cost. Prices change: edit the list, or use --price."""

from __future__ import annotations

import math
from dataclasses import dataclass

from model.errors import UserError

PRICES_AS_OF = "2026-11"
"""The prices are assumptions of that month: round figures for renting one GPU by the hour. They differ between sellers by half and more."""


@dataclass(frozen=True)
class Offer:
    """A GPU type that can be rented."""

    name: str
    device: str
    """As `model.flops.peak_flops` knows it."""
    memory_gb: int
    """10^9 bytes."""
    usd_per_hour: float
    """An assumption; see PRICES_AS_OF."""


OFFERS = (
    Offer("B200", "B200", 180, 5.00),
    Offer("H200", "H200", 141, 3.50),
    Offer("H100", "H100", 80, 2.50),
    Offer("H100-PCIe", "H100 PCIe", 80, 2.00),
    Offer("MI300X", "MI300X", 192, 2.50),
    Offer("A100", "A100", 80, 1.50),
    Offer("L40S", "L40S", 48, 0.90),
    Offer("L4", "L4", 24, 0.50),
    Offer("RTX-5090", "RTX 5090", 32, 0.70),
    Offer("RTX-4090", "RTX 4090", 24, 0.40),
    Offer("RTX-3090", "RTX 3090", 24, 0.25),
    Offer("T4", "T4", 16, 0.30),
)


def chosen_offers(gpus: list[str], prices: list[str]) -> list[Offer]:
    """The offers that are asked for.

    Args:
        gpus: names of OFFERS, in any case; none: all of them.
        prices: in place of the assumed ones, such as `H100=2.50`.

    Raises:
        UserError: a name that is not in OFFERS, or a price that is no number of USD.
    """
    known = {offer.name.lower(): offer for offer in OFFERS}

    def find(option: str, name: str) -> str:
        if name.lower() not in known:
            raise UserError(f"{option}: no GPU {name!r} here; there are {', '.join(offer.name for offer in OFFERS)}")
        return name.lower()

    for price in prices:
        name, _, text = price.partition("=")
        key = find("--price", name)
        try:
            usd = float(text)
        except ValueError:
            usd = math.nan
        if not 0 <= usd < math.inf:
            raise UserError(f"--price {price}: write GPU=USD an hour, such as H100=2.50")
        known[key] = Offer(known[key].name, known[key].device, known[key].memory_gb, usd)
    return [known[key] for key in dict.fromkeys(find("--gpu", name) for name in gpus)] or list(known.values())
