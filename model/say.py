"""Telling people something, without secrets, and without harm: a closed terminal or a full disk ends no training."""

from __future__ import annotations

import contextlib
import sys

from model.secrets import redacted


def say(message: str) -> None:
    """Print a message on standard error."""
    with contextlib.suppress(OSError, ValueError):
        print(redacted(message), file=sys.stderr, flush=True)
