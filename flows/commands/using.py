"""Commands that use what was trained: generate, chat, export."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from flows.commands.shared import Which
from model.errors import UserError

if TYPE_CHECKING:
    from tasks.use import Writer

What = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="An experiment of params.yaml, a registered version (models:/quickstart@best), a checkpoint's folder, or an exported one.",
    ),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens to write at most.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")]
TopK = Annotated[int | None, typer.Option(min=1, help="Choose among the k likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Choose among the likeliest tokens that reach p.")]
Seed = Annotated[int, typer.Option(help="Equal seeds give equal text.")]

_CONTROL = {code: "\ufffd" for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}
"""A network may write what a terminal takes for a command."""
_LINE_ENDS = dict.fromkeys(map(ord, "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"), " ")


def generate(
    name: What,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the text begins with.")],
    checkpoint: Which = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
) -> None:
    """Let the champion (or any checkpoint, alias or export) write on.

    Example: gpt2 generate quickstart "Q: What is 12 + 30?"
    """
    from tasks.use import open_writer

    writer = open_writer(name, checkpoint)
    pieces = writer.write(prompt, max_new_tokens, temperature, top_k, top_p, seed)
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece.translate(_CONTROL) if sys.stdout.isatty() else piece, end="", flush=True)
    print()


def chat(
    name: What,
    checkpoint: Which = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
) -> None:
    """Ask question after question; Ctrl-D leaves. From a pipe: a line a question, a line an answer.

    An experiment whose champion was post-trained answers with that one, unless --checkpoint names one of its own.

    Example: gpt2 chat quickstart --temperature 0.7
    """
    from tasks.use import open_writer, who_answers

    if checkpoint is None:
        name = who_answers(name)
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    conversation = Chat(open_writer(name, checkpoint), Settings(max_new_tokens, temperature, top_k, top_p, seed))
    if sys.stdin.isatty() and sys.stdout.isatty():
        conversation.with_a_person()
    else:
        conversation.with_a_pipe()


def export(name: What, folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder.")], checkpoint: Which = None) -> None:
    """Export the champion (or any checkpoint or alias) in Hugging Face's format, with a model card.

    Example: gpt2 export quickstart out/
    """
    from tasks import use

    found = use.find(name, checkpoint)
    if isinstance(found, Path):
        raise UserError(f"experiment: {name} is an export already; copy it")
    use.export(found, folder)
    print(f"{use.title(found)} is in {folder}")


@dataclass(frozen=True)
class Settings:
    """How answers are written."""

    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int


class Chat:
    """Questions, each on its own, and commands that begin with a slash."""

    HELP = "/seed N, /temperature X: from the next answer on; /quit or Ctrl-D leaves, Ctrl-C stops an answer"

    def __init__(self, writer: Writer, settings: Settings) -> None:
        self._writer, self._settings = writer, settings
        self._screen = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)

    def with_a_person(self) -> None:
        """In a terminal, until Ctrl-D, /quit, or Ctrl-C at the prompt."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  lines can be edited, and come back with the arrow keys
        self._screen.print(f"{self._writer.name}. Each question stands alone: it remembers none.\n{self.HELP}", style="dim")
        while True:
            try:
                line = input("you> ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if line.startswith("/"):
                if not self._obeys(line, lambda message: self._screen.print(message, style="dim")):
                    return
            elif line:
                with contextlib.suppress(KeyboardInterrupt):
                    for is_answer, piece in self._parts(line):
                        self._screen.print(piece.translate(_CONTROL), end="", style=None if is_answer else "dim")
                        self._screen.file.flush()
                print()

    def with_a_pipe(self) -> None:
        """To the end of standard input. Commands have no line in the answer; what is wrong with one is said on standard error."""
        for line in map(str.strip, sys.stdin):
            if line.startswith("/"):
                if not self._obeys(line, lambda message: print(message, file=sys.stderr, flush=True)):
                    return
                continue
            for _, piece in self._parts(line) if line else ():
                print(piece.translate(_LINE_ENDS), end="", flush=True)
            print(flush=True)

    def _parts(self, question: str) -> Iterator[tuple[bool, str]]:
        """The text after a question in pieces, each with whether it belongs to the answer; it begins with no space."""
        frame, settings = self._writer.frame, self._settings
        prompt = frame.prompt(question) if frame else question
        pieces = self._writer.write(prompt, settings.max_new_tokens, settings.temperature, settings.top_k, settings.top_p, settings.seed)
        begun = False
        for is_answer, piece in frame.parts(pieces) if frame else ((True, piece) for piece in pieces):
            shown = piece if begun else piece.lstrip()
            begun = begun or bool(shown)
            if shown:
                yield is_answer, shown

    def _obeys(self, line: str, say: Callable[[str], None]) -> bool:
        """Do what a command says, or say what it should be; False: leave."""
        command, _, value = line.partition(" ")
        try:
            if command == "/seed":
                self._settings = replace(self._settings, seed=int(value))
            elif command == "/temperature" and 0 <= float(value) < float("inf"):
                self._settings = replace(self._settings, temperature=float(value))
            elif command != "/quit":
                raise ValueError
        except ValueError:
            say(f"{line.translate(_CONTROL)}: {self.HELP}")
        return command != "/quit"
