"""generate, chat and export as people and scripts meet them: in a terminal, and through pipes."""

from __future__ import annotations

import io
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flows import cli
from model.config import ModelConfig
from model.errors import EXIT_USER
from model.generation import Frame, answer
from model.gpt2 import GPT2
from model.huggingface import export

ROOT = Path(__file__).parents[2]
Answer = tuple[int, str, str]
"""Exit code, standard output, standard error."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that writes for as long as it is let: 20,000 tokens."""
    folder = tmp_path_factory.mktemp("exports") / "exported"
    export(GPT2(ModelConfig(preset="nano", context_length=20_000), seed=1), folder, Frame("Q: ", "\n\nA: ", 20_000))
    return folder


@pytest.fixture
def gpt2(exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    monkeypatch.chdir(exported.parent)  # no project is here

    def run(*arguments: str, typed: str = "") -> Answer:
        monkeypatch.setattr(sys, "argv", ["gpt2", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def expected(exported: Path, prompt: str, **settings: float) -> str:
    from model.huggingface import load_export

    return answer(load_export(exported), [prompt], 6, **settings)[0]


def test_generate_writes_on_from_an_export(gpt2: Callable[..., Answer], exported: Path) -> None:
    assert gpt2("generate", "exported", "héllo", "--max-new-tokens", "6") == (0, f"héllo{expected(exported, 'héllo')}\n", "")
    sampled = gpt2(
        "generate", "exported", "", "--max-new-tokens", "6", "--temperature", "1", "--top-k", "9", "--top-p", "0.9", "--seed", "3"
    )
    assert sampled == (0, f"{expected(exported, '', temperature=1.0, top_k=9, top_p=0.9, seed=3)}\n", "")


def test_chat_answers_a_line_with_a_line(gpt2: Callable[..., Answer], exported: Path) -> None:
    questions = ["one", "", "two\n\n", "/temperature 1", "/seed 4", "two", "/quit", "never"]
    code, out, err = gpt2("chat", "exported", "--max-new-tokens", "6", typed="\n".join(questions))
    settings: list[tuple[str, dict[str, float]]] = [("one", {}), ("two", {}), ("two", {"temperature": 1.0, "seed": 4})]
    texts = [" ".join(expected(exported, f"Q: {question}", **more).lstrip().splitlines()) for question, more in settings]
    assert (code, err) == (0, "")
    assert out.split("\n") == [texts[0], "", texts[1], "", "", texts[2], ""]
    assert texts[1] != texts[2]


@pytest.mark.parametrize("command", ["/seed", "/seed x", "/temperature -1", "/temperature nan", "/nonsense"])
def test_a_command_that_is_none_says_which_there_are(gpt2: Callable[..., Answer], command: str) -> None:
    code, out, err = gpt2("chat", "exported", typed=f"{command}\n")
    assert (code, out) == (0, "")
    assert err.startswith(f"{command}: /seed N, /temperature X")


def test_a_mistake_is_one_line(gpt2: Callable[..., Answer]) -> None:
    for arguments in (
        ["chat", "nothing/"],
        ["generate", "nothing/", "Q:"],
        ["export", "exported", "out"],
        ["chat", "exported", "--top-p", "2"],
    ):
        code, out, err = gpt2(*arguments)
        assert (code, out) == (EXIT_USER, "")
        assert err.count("\n") == 1


class Terminal:
    """`gpt2 chat` in a pseudo-terminal."""

    def __init__(self, *arguments: str, cwd: Path) -> None:
        import pty

        self.screen, theirs = pty.openpty()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "xterm", "LANG": "C.UTF-8"}
        environment.pop("NO_COLOR", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli", "chat", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=cwd,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )
        os.close(theirs)
        self.shown = ""

    def until(self, text: str, seconds: float = 60) -> str:
        """What is shown up to `text`, which has not been returned before."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            assert time.monotonic() < deadline, f"no {text!r} in {self.shown[-2000:]!r}"
            if select.select([self.screen], [], [], 0.2)[0]:
                self.shown += os.read(self.screen, 65536).decode(errors="replace")
        before, _, self.shown = self.shown.partition(text)
        return before

    def type(self, keys: str) -> None:
        os.write(self.screen, keys.encode())

    def leave(self, keys: str) -> int:
        """The exit code after these keys. Between showing its prompt and waiting for a key readline hears no Ctrl-C: a person presses
        again."""
        for _ in range(30):
            self.type(keys)
            try:
                return self.process.wait(1)
            except subprocess.TimeoutExpired:
                continue
        raise AssertionError(f"it does not end: {self.shown[-2000:]!r}")

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)
        os.close(self.screen)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals there")
def test_chat_in_a_terminal(exported: Path) -> None:
    terminal = Terminal("exported", "--max-new-tokens", "19000", cwd=exported.parent)
    try:
        greeting = terminal.until("you> ")
        assert "Each question stands alone" in greeting
        assert "\x1b[2m" in greeting, "dim"

        terminal.type("Who?\n")
        terminal.until("Who?\r\n")
        terminal.until("\x1b[2m")  # the reasoning streams
        terminal.type("\x03")  # Ctrl-C, long before 19,000 tokens are written
        stopped = terminal.until("you> ")
        assert "Traceback" not in stopped
        assert len(stopped) < 50_000

        terminal.type("/seed x\n")
        assert "/seed x: /seed N" in terminal.until("you> ").replace("\x1b[2m", "")
        assert terminal.leave("\x03") == 0
    finally:
        terminal.close()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals there")
def test_ctrl_d_leaves_a_terminal(exported: Path) -> None:
    terminal = Terminal("exported", "--max-new-tokens", "3", cwd=exported.parent)
    try:
        terminal.until("you> ")
        terminal.type("Who?\n")
        terminal.until("you> ")
        assert terminal.leave("\x04") == 0
    finally:
        terminal.close()
