"""A small HTTP server for the tests: files in ranges, a listing, faults on order, and as much of the Hub as is asked of it."""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"

Fault = int | str | tuple[int, dict[str, str]]


class FileServer:
    """Serves `files` (path to bytes) on loopback.

    A fault is a status, a status with headers, "reset" or "short" (after half the body the connection breaks, or ends), "less" (a whole
    answer that is not all of what was asked for), "stall" (no answer), "half" (half the body, then nothing) or "trickle" (half the
    body, then now and then a byte).
    """

    def __init__(self, files: dict[str, bytes], hub_dataset: str | None = None) -> None:
        self.files = files
        self.hub_dataset = hub_dataset
        self.faults: deque[Fault] = deque()
        """Each spoils one GET of a file."""
        self.refused = 0
        """So many requests of any kind are answered with 503 first."""
        self.broken: dict[str, Fault] = {}
        """Files of which every GET is spoiled."""
        self.requests: list[tuple[str, str, str | None]] = []
        """Method, path and range of each request."""
        self.times: list[float] = []
        """When each came, in seconds."""
        self.sent = 0
        """Bytes of bodies of files."""
        self.spoiled: list[int] = []
        """Places in `requests` of those that a fault met."""
        self.stalled = threading.Event()
        """A request has been left waiting."""
        self.closing = threading.Event()
        self.ranges = True
        """Whether it knows what a range is."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FileServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    disable_nagle_algorithm = True
    owner: FileServer

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # whoever is kept waiting may go
            super().handle()

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        if not self._refuse():
            self._answer(head=True)

    def do_GET(self) -> None:
        if not self._refuse():
            self._answer(head=False)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        if self._refuse():
            return None
        match = re.fullmatch(r"/api/datasets/(.+)/paths-info/([^/]+)", self._path())
        if not match or match[1] != self.owner.hub_dataset or match[2] != COMMIT:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        paths = parse_qs(body)["paths"]
        return self._json([_hub_entry(path, self.owner.files[path]) for path in paths if path in self.owner.files])

    def _path(self) -> str:
        return unquote(urlsplit(self.path).path)

    def _refuse(self) -> bool:
        """Write the request down; whether it has been turned away."""
        self.owner.times.append(time.time())
        self.owner.requests.append((self.command, self._path(), self.headers.get("Range")))
        if not self.owner.refused:
            return False
        self.owner.refused -= 1
        self._send(503, b"", {"Retry-After": "1"})
        return True

    def _answer(self, head: bool) -> None:
        path = self._path()
        if self.owner.hub_dataset is not None:
            return self._hub(path, head)
        if path.lstrip("/") in self.owner.files:
            return self._file(path.lstrip("/"), head)
        folder = path.strip("/") + "/" if path.strip("/") else ""
        entries = sorted({name.removeprefix(folder).partition("/")[0::2] for name in self.owner.files if name.startswith(folder)})
        if not entries:
            return self._send(404, b"nothing here")
        links = "".join(f'<a href="{self.owner.url}/{folder}{name}{"/" if rest else ""}">{name}</a>' for name, rest in entries)
        return self._send(200, f"<html>{links}</html>".encode(), {"Content-Type": "text/html"}, head)

    def _hub(self, path: str, head: bool) -> None:
        name, files = self.owner.hub_dataset, self.owner.files
        if path in (f"/api/datasets/{name}", f"/api/datasets/{name}/revision/main", f"/api/datasets/{name}/revision/{COMMIT}"):
            return self._json(
                {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files], "private": False, "tags": []}
            )
        if path.startswith(f"/api/datasets/{name}/revision/"):
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if match := re.fullmatch(rf"/api/datasets/{name}/tree/{COMMIT}/?(.*)", path):
            found = [_hub_entry(file, files[file]) for file in files if file.startswith(match[1])]
            return self._json(found) if found else self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        if match := re.fullmatch(rf"/datasets/{name}/resolve/{COMMIT}/(.+)", path):
            if match[1] not in files:
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return self._file(match[1], head, {"X-Repo-Commit": COMMIT})
        return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _file(self, name: str, head: bool, extra: dict[str, str] | None = None) -> None:
        data = self.owner.files[name]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes", **(extra or {})}
        fault = None if head else self.owner.broken.get(name) or (self.owner.faults.popleft() if self.owner.faults else None)
        if fault is not None:
            self.owner.spoiled.append(len(self.owner.requests) - 1)
        if isinstance(fault, int | tuple):
            return self._send(*((fault, b"not now") if isinstance(fault, int) else (fault[0], b"not now", fault[1])))
        if fault == "stall":
            return self._stall()
        status = 200
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match and self.owner.ranges:
            start, stop = int(match[1]), int(match[2] or len(data) - 1) + 1
            if fault == "less":  # a well-formed answer, but not all that was asked for
                stop = (start + stop) // 2
            headers["Content-Range"] = f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}"
            data, status = data[start:stop], 206
        if fault in ("reset", "short", "half", "trickle"):
            self._head(status, len(data), headers)
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            if fault in ("half", "trickle"):
                return self._stall(trickle=fault == "trickle")
            if fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return None
        if not head:
            self.owner.sent += len(data)
        return self._send(status, data, headers, head)

    def _stall(self, trickle: bool = False) -> None:
        self.owner.stalled.set()
        while not self.owner.closing.wait(0.2):
            if trickle:
                self.wfile.write(b"?")
        self.close_connection = True

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, head: bool = False) -> None:
        self._head(status, len(body), headers or {})
        if not head:
            with contextlib.suppress(ConnectionError):  # who was kept waiting has gone
                self.wfile.write(body)

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length), "Last-Modified": email.utils.formatdate(0), **headers}.items():
            self.send_header(name, value)
        self.end_headers()


def _hub_entry(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if path.endswith(".parquet"):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry
