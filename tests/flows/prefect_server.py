"""A real Prefect server on a free loopback port, and what it says; and a webhook that it may tell of things."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64encode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from tests.tasks.conftest import free_port, wait_until_it_answers


class PrefectServer:
    """As `gpt2 services` starts it, with its database below `home`."""

    def __init__(self, home: Path, auth: str | None = None) -> None:
        self.home = home
        self.auth = auth
        self.port = free_port()
        self.api = f"http://127.0.0.1:{self.port}/api"
        self.process: subprocess.Popen[bytes] | None = None
        unset = ("PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_API_AUTH_STRING")
        plain = {key: value for key, value in os.environ.items() if key not in unset}
        self._serving = plain | {"PREFECT_HOME": str(home), "PREFECT_API_URL": self.api, "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
        self._serving |= {"PREFECT_SERVER_API_AUTH_STRING": auth} if auth else {}
        self.environment = plain | {"PREFECT_HOME": str(home / "client"), "PREFECT_API_URL": self.api, "PREFECT_LOGGING_LEVEL": "ERROR"}
        """Of whoever talks to it."""
        self.environment |= {"PREFECT_API_AUTH_STRING": auth} if auth else {}

    def start(self) -> None:
        """Until it answers."""
        options = ["--host", "127.0.0.1", "--port", str(self.port), "--no-ui"]
        command = [sys.executable, "-m", "flows.prefect_server", "server", "start", *options]
        self.home.mkdir(exist_ok=True)
        with (self.home / "log").open("ab") as log:
            self.process = subprocess.Popen(command, env=self._serving, stdout=log, stderr=log, start_new_session=True)
        wait_until_it_answers(f"{self.api}/health", self.process)

    def away_for(self, seconds: float) -> None:
        """It answers nobody meanwhile. (To end it and start it again takes as long as the machine is busy.)"""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.killpg(self.process.pid, signal.SIGCONT)

    def stop(self) -> None:
        """For good. Twice is no fault."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def ask(self, path: str, body: Any = None) -> Any:
        """A POST of `body`, or a GET."""
        return ask(f"{self.api}/{path}", body, self.auth)

    def state(self, flow_run_id: str) -> str:
        """The name of a flow run's state."""
        return str(self.ask(f"flow_runs/{flow_run_id}")["state"]["name"])


def ask(url: str, body: Any = None, auth: str | None = None) -> Any:
    """What a Prefect server answers to a POST of `body`, or to a GET."""
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Basic {b64encode(auth.encode()).decode()}"} if auth else {}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers)
    for _ in range(20):
        try:
            with urllib.request.urlopen(request, timeout=90) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            if error.code != 503:  # SQLite is busy: Prefect's own client tries again, too
                raise
            time.sleep(0.5)
    raise AssertionError(f"{url}: Prefect's database stays busy")


class Webhook:
    """An HTTP server that keeps what is posted to it; `answer` is the status that it gives."""

    def __init__(self) -> None:
        self.received: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.answer = 200
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.paths.append(self.path)
                outer.received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(outer.answer)
                self.end_headers()

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def texts(self) -> list[str]:
        """The texts of the alerts, in their order."""
        return [each["text"] for each in self.received]

    def close(self) -> None:
        """No more."""
        self._server.shutdown()
        self._server.server_close()
