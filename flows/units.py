"""Numbers as people read them."""

from __future__ import annotations


def count(number: int, noun: str) -> str:
    """`1 step`, `2,000 steps`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def rounded(number: float) -> str:
    """Three significant digits: it is an estimate."""
    return f"{float(f'{number:.3g}'):,.0f}"


def size(number: int) -> str:
    """Bytes: `1.49 GB`."""
    unit = max(0, min(4, (len(str(number)) - 1) // 3))
    return f"{number / 1000**unit:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[unit]}"


def duration(seconds: float) -> str:
    """`78 minutes`, `8.7 days`."""
    units = [("days", 86_400), ("hours", 3600), ("minutes", 60)]
    unit, length = next(((unit, length) for unit, length in units if seconds >= 1.5 * length), ("seconds", 1))
    number = seconds / length
    return f"{number:.2g} {unit}" if number < 10 else f"{number:,.0f} {unit}"
