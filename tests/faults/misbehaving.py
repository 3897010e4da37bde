"""A toy server that misbehaves: it stands in front of a real one, on a port of its own, and spoils what passes through it.

`mode` says how, from the next request on:

    answers     passes everything on
    closed      nobody listens at the port
    slow        answers after `seconds`
    black hole  takes the request and never answers
    429, 500, 503, 400, 413    answers with that, 429 and 503 with `Retry-After: 3600`
    portal      answers 200 with a page that asks for a password
    garbage     answers with bytes that are not HTTP
    cut         passes the request on, and closes in the middle of the answer
    lost        passes the request on, has it executed, and drops the connection before the answer
    flaky       loses every third answer
    reset       resets the connection before anything is done
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import urlsplit

MODES = ("closed", "slow", "black hole", "429", "500", "503", "400", "413", "portal", "garbage", "cut", "lost", "flaky", "reset")
_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "host"}


class Misbehaving:
    """Stands in front of the server at `target`. Point clients at `uri`."""

    def __init__(self, target: str, seconds: float = 0.3) -> None:
        self.target = urlsplit(target)
        self.seconds = seconds
        self.hits: Counter[str] = Counter()
        """How many requests met which mode."""
        self._mode = "answers"
        self._changed = threading.Event()
        self._listening: ThreadingHTTPServer | None = None
        self._port = 0
        self._listen()
        self.uri = f"http://127.0.0.1:{self._port}"

    @property
    def mode(self) -> str:
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        assert mode == "answers" or mode in MODES
        self._mode = mode
        self._changed.set()  # lets go of what hangs in a black hole
        self._changed = threading.Event()
        if mode == "closed":
            self._shut()
        elif self._listening is None:
            self._listen()

    def close(self) -> None:
        self.mode = "closed"

    def _listen(self) -> None:
        handler = type("Handler", (_Handler,), {"toy": self})
        self._listening = _Server(("127.0.0.1", self._port), handler)
        self._port = self._listening.server_address[1]
        threading.Thread(target=self._listening.serve_forever, args=(0.02,), daemon=True).start()

    def _shut(self) -> None:
        if self._listening is not None:
            self._listening.shutdown()
            self._listening.server_close()
            self._listening = None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that gave up is no error of ours."""


class _Handler(BaseHTTPRequestHandler):
    toy: ClassVar[Misbehaving]

    def handle_one_request(self) -> None:
        super().handle_one_request()
        self.close_connection = True

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        mode, changed = self.toy.mode, self.toy._changed
        self.toy.hits[mode] += 1
        if mode == "slow":
            time.sleep(self.toy.seconds)
        elif mode == "black hole":
            changed.wait(60)
            return
        elif mode.isdigit():
            self._answer(int(mode), [("Retry-After", "3600")] if mode in ("429", "503") else [], b"<html>not now</html>")
            return
        elif mode == "portal":
            self._answer(200, [("Content-Type", "text/html")], b"<html>Your password, please</html>")
            return
        elif mode == "garbage":
            self.wfile.write(b"\x00\xff\x13 not HTTP at all \r\n\r\n" * 20)
            return
        elif mode == "reset":
            # to linger for 0 s is to reset
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._drop()
            return
        status, headers, content = self._pass_on(body)
        if mode == "lost" or (mode == "flaky" and self.toy.hits["flaky"] % 3 == 0):
            self._drop()
        elif mode == "cut":
            self._answer(status, headers, content, length=len(content) + 1)
        else:
            self._answer(status, headers, content)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _any

    def _pass_on(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.toy.target.hostname or "", self.toy.target.port, timeout=60)
        with contextlib.closing(connection):
            kept = {key: value for key, value in self.headers.items() if key.lower() not in _HOP}
            connection.request(self.command, self.path, body, kept)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, length: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers:
            if key.lower() not in {*_HOP, "server", "date"}:
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def _drop(self) -> None:
        self.connection.close()
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""
