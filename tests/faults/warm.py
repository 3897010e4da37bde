"""A warm starter: imports torch and the trainer once, then starts modules as processes by forking, in milliseconds instead of seconds.

`Warm` starts `python -m tests.faults.warm` and asks it, over a socket, for processes. Each is a child in a session of its own (so that
`killpg` kills it and what it started), with the environment, folder, standard input and error that it was given, in which the module runs
as `__main__`. Nothing was computed before the fork and there is one thread, so a child does, bit for bit, what `python -m MODULE` does.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import json
import os
import resource
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_IMPORTED = (
    "model.training.__main__",
    "model.training.trainer",
    "model.evaluation.scoring",
    "model.disk",
    "model.device",
    "torch._inductor",
    "pytest",
)
_READS_THE_ENVIRONMENT = ("model.disk", "model.training.trainer")
"""… when they are imported."""
_ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}
"""Several processes share few cores, and a fork takes one thread along."""


class WarmProcess:
    """What `subprocess.Popen` is to a process, to one that `Warm` started."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._ended = threading.Event()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, negative for a signal."""
        if not self._ended.wait(timeout):
            raise subprocess.TimeoutExpired(f"warm process {self.pid}", timeout or 0)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int, group: bool = False) -> None:
        """Signal the process, or its whole group."""
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if group else os.kill)(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL, group=True)

    def _end(self, status: int) -> None:
        self.returncode = os.waitstatus_to_exitcode(status)
        self._ended.set()


class Warm:
    """Starts modules by forking. Any thread may ask."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        command = [sys.executable, "-m", "tests.faults.warm", str(theirs.fileno())]
        environment = {**os.environ, **_ONE_THREAD}
        for name in ("CRASH_AT", "CRASH_COUNT"):
            environment.pop(name, None)
        self._server = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        theirs.close()
        self._asking = threading.Lock()
        self._answer = threading.Semaphore(0)
        self._started: dict[int, WarmProcess] = {}
        self._newest: WarmProcess | None = None
        threading.Thread(target=self._listen, name="warm", daemon=True).start()

    def start(
        self,
        module: str,
        *arguments: str,
        environment: dict[str, str] | None = None,
        folder: Path = ROOT,
        stdin: int | None = None,
        stderr: Path | None = None,
        prepare: Sequence[Sequence[Any]] = (),
    ) -> WarmProcess:
        """Start `python -m module arguments…`.

        Args:
            module: run as `__main__`.
            arguments: its command line.
            environment: added to the starter's own.
            folder: where it runs.
            stdin: a file descriptor; the caller closes its own one. None: /dev/null.
            stderr: a file that is written anew, with standard output, too. None: as the starter's own.
            prepare: functions of this module to call in the child first, each with its arguments.
        """
        request = {
            "module": module,
            "arguments": arguments,
            "environment": environment or {},
            "folder": str(folder),
            "stderr": str(stderr) if stderr else None,
            "prepare": list(prepare),
        }
        if stderr is not None and not stderr.is_char_device():
            stderr.write_bytes(b"")
        with self._asking:
            socket.send_fds(self._socket, [json.dumps(request).encode() + b"\n"], [stdin] if stdin is not None else [])
            assert self._answer.acquire(timeout=60), "the warm starter does not answer"
            assert self._newest is not None, "the warm starter has gone"
            return self._newest

    def _listen(self) -> None:
        with self._socket.makefile("r", encoding="utf-8") as lines, contextlib.suppress(OSError):
            for line in lines:
                told = json.loads(line)
                if "status" in told:
                    self._started.pop(told["pid"])._end(told["status"])
                else:
                    self._newest = self._started[told["pid"]] = WarmProcess(told["pid"])
                    self._answer.release()
        self._newest = None
        self._answer.release()

    def close(self) -> None:
        """End the starter, and with it everything that it started."""
        for process in list(self._started.values()):
            process.kill()
        self._socket.shutdown(socket.SHUT_RDWR)
        self._server.wait(30)
        self._socket.close()


def limit_file_size(size: int) -> None:
    """No file can grow beyond so many bytes: a write fails with EFBIG."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def obey_permissions() -> None:
    """Even if the tests run as root: a file or folder that cannot be written by its mode cannot be written."""
    libc, over_permissions = ctypes.CDLL(None, use_errno=True), (1 << 1) | (1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    header = struct.pack("=Ii", 0x20080522, 0)
    found = ctypes.create_string_buffer(24)
    if libc.capget(header, found) == 0:
        low_effective, low_permitted, low_inherited, *high = struct.unpack("=6I", found.raw)
        for number in (1, 2):
            libc.prctl(24, number, 0, 0, 0)  # PR_CAPBSET_DROP: for what it executes
        kept = [sets & ~over_permissions for sets in (low_effective, low_permitted, low_inherited)]
        if libc.capset(header, struct.pack("=6I", *kept, *high)):
            raise OSError(ctypes.get_errno(), "capset")


def enter_namespaces(pid: int) -> None:
    """See the file systems that process `pid` of another user and mount namespace sees."""
    libc = ctypes.CDLL(None, use_errno=True)
    here = Path.cwd()
    for kind in ("user", "mnt"):
        with Path(f"/proc/{pid}/ns/{kind}").open() as namespace:
            if libc.setns(namespace.fileno(), 0):
                raise OSError(ctypes.get_errno(), f"setns {kind}")
    os.chdir(here)


def _serve(own: socket.socket) -> None:
    """Fork on request, tell of each child's end; until the other side has gone."""
    for module in _IMPORTED:
        importlib.import_module(module)
    sys.modules["model.tokenizer"].encode("reads the vocabulary")  # type: ignore[attr-defined]
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a fork takes one thread along"
    wake, waker = socket.socketpair()
    wake.setblocking(False)
    waker.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(waker.fileno())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C in the terminal is for pytest
    watched = selectors.DefaultSelector()
    for each in (own, wake):
        watched.register(each, selectors.EVENT_READ)
    while True:
        ready = [key.fileobj for key, _ in watched.select()]
        if own in ready:
            data, descriptors, _, _ = socket.recv_fds(own, 1 << 20, 1)
            while data and not data.endswith(b"\n"):
                data += own.recv(1 << 20)
            if not data:
                return
            sys.stdout.flush()
            pid = os.fork()
            if not pid:
                for each in (own, wake, waker, watched):
                    each.close()
                _be(json.loads(data), descriptors)
            for descriptor in descriptors:
                os.close(descriptor)
            own.sendall(json.dumps({"pid": pid}).encode() + b"\n")
        if wake in ready:
            with contextlib.suppress(BlockingIOError):
                wake.recv(1 << 16)
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                own.sendall(json.dumps({"pid": ended[0], "status": ended[1]}).encode() + b"\n")


def _be(request: dict[str, Any], descriptors: list[int]) -> None:
    """In the child: become the module asked for. Never returns."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.setsid()
        os.environ.update(request["environment"])
        os.chdir(request["folder"])
        stdin = descriptors[0] if descriptors else os.open(os.devnull, os.O_RDONLY)
        os.dup2(stdin, 0)
        os.close(stdin)
        if request["stderr"] is not None:
            stderr = os.open(request["stderr"], os.O_WRONLY)
            os.dup2(stderr, 1)
            os.dup2(stderr, 2)
            os.close(stderr)
        faulthandler.register(signal.SIGUSR1)  # prints where each thread is, for a test that waits in vain
        for module in _READS_THE_ENVIRONMENT:
            importlib.reload(sys.modules[module])
        for name, *arguments in request["prepare"]:
            globals()[name](*arguments)
        sys.modules.pop(request["module"], None)
        sys.modules.pop(f"{request['module']}.__main__", None)
        sys.argv = [request["module"], *request["arguments"]]
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_until(condition: Any, seconds: float, what: str) -> None:
    """Wait for something, at most so long."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.002)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
