"""A small HTTP server for the tests: files in ranges, a listing, faults on order, and as much of the Hub as is asked of it."""

from __future__ import annotations

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


class FileServer:
    """Serves `files` (path to bytes) on loopback. Each entry of `faults` spoils one GET: a status, "reset", "short", "stall" or "less"."""

    def __init__(self, files: dict[str, bytes], hub_dataset: str | None = None) -> None:
        self.files = files
        self.hub_dataset = hub_dataset
        self.faults: deque[int | str] = deque()
        self.requests: list[tuple[str, str, str | None]] = []
        """Method, path and range of each request."""
        self.sent = 0
        """Bytes of bodies of files."""
        self.stall_s = 3.0
        self.ranges = True
        """Whether it knows what a range is."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FileServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    owner: FileServer

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(head=True)

    def do_GET(self) -> None:
        self._answer(head=False)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        self._note()
        match = re.fullmatch(r"/api/datasets/(.+)/paths-info/([^/]+)", self._path())
        if not match or match[1] != self.owner.hub_dataset or match[2] != COMMIT:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        paths = parse_qs(body)["paths"]
        return self._json([_hub_entry(path, self.owner.files[path]) for path in paths if path in self.owner.files])

    def _path(self) -> str:
        return unquote(urlsplit(self.path).path)

    def _note(self) -> None:
        self.owner.requests.append((self.command, self._path(), self.headers.get("Range")))

    def _answer(self, head: bool) -> None:
        self._note()
        path = self._path()
        if self.owner.hub_dataset is not None:
            return self._hub(path, head)
        if path.lstrip("/") in self.owner.files:
            return self._file(self.owner.files[path.lstrip("/")], head)
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
            return self._file(files[match[1]], head, {"X-Repo-Commit": COMMIT})
        return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _file(self, data: bytes, head: bool, extra: dict[str, str] | None = None) -> None:
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes", **(extra or {})}
        fault = self.owner.faults.popleft() if self.owner.faults and not head else None
        if isinstance(fault, int):
            return self._send(fault, b"not now", {"Retry-After": "1"})
        if fault == "stall":
            time.sleep(self.owner.stall_s)
        status = 200
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match and self.owner.ranges:
            start, stop = int(match[1]), int(match[2] or len(data) - 1) + 1
            if fault == "less":  # a well-formed answer, but not all that was asked for
                stop = (start + stop) // 2
            headers["Content-Range"] = f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}"
            data, status = data[start:stop], 206
        if fault in ("reset", "short"):
            self._head(status, len(data), headers)
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            if fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return None
        if not head:
            self.owner.sent += len(data)
        return self._send(status, data, headers, head)

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, head: bool = False) -> None:
        self._head(status, len(body), headers or {})
        if not head:
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
