"""A Prefect server for one command, where none is configured. It ends with the process that started it, however that one ends.

Prefect's own temporary server shares the terminal's process group: Ctrl-C would end it before the flow could say that it was cancelled.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from typing import Any

from flows.prefect_server import collect_apart
from flows.stop import STOP
from model.errors import Stopped

STARTS_WITHIN_S = 120.0


def use_prefect_server() -> None:
    """From now on, Prefect in this process talks to the server that is configured (PREFECT_API_URL, a profile), or, if none is, to one of
    our own on a free port. Ours ends when this process does: Prefect sends its last logs at the interpreter's exit.

    Raises:
        ConnectionError: the configured server does not answer, or ours did not start.
    """
    from prefect.settings import PREFECT_API_URL, temporary_settings

    configured = PREFECT_API_URL.value()
    if not configured:
        print("starting Prefect (PREFECT_API_URL names no server)", flush=True)
        _SETTINGS.enter_context(temporary_settings({PREFECT_API_URL: _own_server()}))
    elif not answers(f"{configured}/health"):
        raise ConnectionError(f"PREFECT_API_URL: no Prefect server answers at {configured}; start it, or unset it to do without")


_SETTINGS = contextlib.ExitStack()
"""Never closed: the settings hold until the process ends."""


def _own_server() -> str:
    """Start a server; its URL when it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group: dict[str, Any] = {"creationflags": 0x200} if sys.platform == "win32" else {"start_new_session": True}  # CREATE_NEW_PROCESS_GROUP
    command = [sys.executable, "-m", "flows.local_server", str(port)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **group)
    url = f"http://127.0.0.1:{port}/api"
    deadline = time.monotonic() + STARTS_WITHIN_S
    while not answers(f"{url}/health"):
        if STOP.is_set():
            raise Stopped("stopped before anything began")
        if server.poll() is not None or time.monotonic() > deadline:
            raise ConnectionError("Prefect's server did not start; `prefect server start` shows why")
        time.sleep(0.1)
    return url


def answers(url: str) -> bool:
    """Whether a server answers at this URL, be it to say that it wants a key."""
    try:
        with urllib.request.urlopen(url, timeout=5.0):  # noqa: S310 (the user's own setting)
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500
    except (OSError, ValueError):
        return False


def _serve(port: int) -> None:
    """Serve until standard input, a pipe, closes: the process at its other end is gone or done."""

    def end_with_parent() -> None:
        while os.read(0, 64):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5.0)
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ |= {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
    collect_apart()
    import uvicorn

    uvicorn.run("prefect.server.api.server:create_app", factory=True, host="127.0.0.1", port=port, log_level="error", lifespan="on")


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
