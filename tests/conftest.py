"""Options of all tests."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--kills", type=int, default=200, help="how often tests/faults/test_kills.py kills a training (200)")
    group.addoption("--kill-seed", type=int, default=0, help="decides whom it kills, and when (0)")
