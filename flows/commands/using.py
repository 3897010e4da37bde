"""Commands that use what was trained: generate, export."""

from pathlib import Path
from typing import Annotated

import typer

from flows.commands.shared import Name, Which
from tasks.project import find_project


def generate(
    name: Name,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the text begins with.")],
    checkpoint: Which = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Choose among the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Choose among the likeliest tokens that reach p.")] = None,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal text.")] = 0,
) -> None:
    """Let the champion write on.

    Example: gpt2 generate quickstart "Q: What is 12 + 30?"
    """
    from tasks import use

    chosen = use.pick_checkpoint(find_project(), name, checkpoint)
    print(prompt, end="", flush=True)
    for piece in use.generate(chosen, prompt, max_new_tokens, temperature, top_k, top_p, seed):
        print(piece, end="", flush=True)
    print()


def export(name: Name, folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder.")], checkpoint: Which = None) -> None:
    """Export the champion in Hugging Face's format (safetensors), for AutoModelForCausalLM and AutoTokenizer.

    Example: gpt2 export quickstart out/
    """
    from tasks import use

    chosen = use.pick_checkpoint(find_project(), name, checkpoint)
    use.export(chosen, folder)
    print(f"{chosen.name} of {name} is in {folder}")
