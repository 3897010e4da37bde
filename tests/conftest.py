"""Options of all tests, and the signals that they and what they start hear."""

import signal

import pytest


def pytest_configure() -> None:
    """A shell that runs the tests in the background has SIGINT ignored, and so would all that they start; a terminal's commands hear it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--kills", type=int, default=200, help="how often tests/faults/test_kills.py kills a training (200)")
    group.addoption("--kill-seed", type=int, default=0, help="decides whom it kills, and when (0)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: where files run side by side, none of them is left for the end."""
    longest = ["test_kills", "test_dead_services", "test_crash_at", "end_to_end", "test_secrets_stay", "test_signals", "test_distributed"]

    def rank(item: pytest.Item) -> int:
        return next((number for number, name in enumerate(longest) if name in item.nodeid), len(longest))

    items.sort(key=rank)
