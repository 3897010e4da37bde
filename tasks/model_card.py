"""The README.md of an export, as the Hugging Face Hub reads it: what the network is, how good, and what it was made of."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from model.checkpoint.store import Checkpoint
from model.flops import parameters_by_kind
from model.run_config import RunConfig
from model.run_folder import RunFolder
from model.secrets import redacted
from tasks.project import read_json
from tasks.run_page import words_for

_SCORES = {
    "text_bits_per_byte": "bits per byte of the text",
    "answer_bits_per_byte": "bits per byte of the answer, given question and reasoning",
    "answer_alone_bits_per_byte": "bits per byte of the answer, given the question alone",
    "distractor_accuracy": "the right answer ranks first among four",
    "distractor_rank": "its mean rank, 1 to 4",
    "format_adherence": "well-formed answers",
    "exact_match": "exact answers, of those that can be checked",
    "token_f1": "words shared with the right answer (F1)",
    "validation_loss": "validation loss, nats a token",
}
"""Keys of a row of scores.json that are shown, in this order."""
_SHARES = {"distractor_accuracy", "format_adherence", "exact_match"}


def run_of(checkpoint: Checkpoint) -> RunFolder | None:
    """The run that a checkpoint lies in: `runs/NAME/checkpoints/step_…`; None if it lies elsewhere."""
    checkpoints = checkpoint.path.parent
    return RunFolder(checkpoints.parent) if checkpoints.name == "checkpoints" and checkpoints.parent.parent.name == "runs" else None


def model_card(checkpoint: Checkpoint) -> str:
    """The card of a verified checkpoint, with its scores where its run has them.

    Raises:
        ValueError: its state is not that of a training (pydantic says which field).
        UserError: the run's scores.json is damaged.
    """
    state, run = checkpoint.state(), run_of(checkpoint)
    config = RunConfig.model_validate(state["config"])
    scores = (read_json(run.scores) if run else None) or {}
    row: dict[str, Any] = next((row for row in scores.get("checkpoints", []) if row.get("digest") == checkpoint.digest), {})
    title = f"GPT-2 from scratch: {run.experiment if run else checkpoint.path.parent.name}, step {int(state['step']):,}"
    parts = [_front_matter(config), f"# {title}", _introduction(checkpoint, config, state), _use(config)]
    parts += [_scores(row, scores, config), _limits(config), _lineage(checkpoint, run, config, state), _training(config)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(config: RunConfig) -> str:
    """YAML; JSON's strings are YAML's. A dataset with a revision is one of the Hub's, where its license stands."""
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- gpt2", "- gpt2-from-scratch"]
    lines += ["license: other", "license_name: see-the-dataset"]
    if config.dataset.revision is not None:
        dataset = config.data.path.removeprefix("hf://datasets/").strip("/")
        lines += [f"license_link: {json.dumps(f'https://huggingface.co/datasets/{dataset}')}", "datasets:", f"- {json.dumps(dataset)}"]
    return "\n".join([*lines, "---"])


def _introduction(checkpoint: Checkpoint, config: RunConfig, state: dict[str, Any]) -> str:
    shape = config.model
    tokens = f" on {state['tokens']:,} tokens" if isinstance(state.get("tokens"), int) else ""
    made = "pre-trained from random weights"
    if config.post_training is not None:
        made = f"which began as {_code(words_for(config.post_training.base))} and was fine-tuned to answer"
    return (
        f"A GPT-2 with {parameters_by_kind(shape).total:,} parameters ({shape.n_layer} layers, {shape.n_embd} wide, {shape.n_head} heads, "
        f"context {shape.context_length}), {made}{tokens} of {_code(redacted(config.data.path))}. "
        f"This is {_code(checkpoint.name)} of its training, exported by gpt2-from-scratch."
    )


def _use(config: RunConfig) -> str:
    from model.generation import Frame

    frame = Frame.of(config.data)
    example = frame.prompt("What causes the tides?")
    return f"""## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
prompt = tokenizer({json.dumps(example or "The", ensure_ascii=False)}, return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=128)[0]))
```

Or `gpt2 chat FOLDER`, which puts each question as the training data did:

{_fenced(config.data.text_template)}

The tokenizer is GPT-2's. As in training, a text that spells out `<|endoftext|>` is only text; the token of that name (50256) ends each
document, and beginning a prompt with it says that a new one begins. Windows of {config.data.max_length} tokens were trained on: positions
beyond were not."""


def _scores(row: dict[str, Any], scores: dict[str, Any], config: RunConfig) -> str:
    shown = [key for key in _SCORES if isinstance(row.get(key), int | float)]
    if not shown:
        return "## Scores\n\nNot evaluated when it was exported."
    intervals = row.get("intervals") or {}
    lines = [(_SCORES[key], _figure(key, row[key]), _interval(key, intervals.get(key))) for key in shown]
    counts = [
        f"{row[key]:,} {word}" for key, word in (("items", "samples"), ("questions", "questions asked")) if isinstance(row.get(key), int)
    ]
    apart = "article" if config.data.split_by == "article" and config.data.article_column else "sample"
    about = f"On held-out data, which share no {apart} with the training data{': ' + ', '.join(counts) if counts else ''}."
    reason = f"Champion rule: {_in_one_line(row['reason']).rstrip('.')}." if row.get("reason") else ""
    aliases = [alias for alias in ("champion", "best") if row.get(alias) or (scores.get(alias) or {}).get("digest") == row.get("digest")]
    marked = f"In the registry it is {' and '.join(_code(alias) for alias in aliases)}. " if aliases else ""
    return f"## Scores\n\n{about}\n\n{_table(('score', 'value', '95 % interval'), lines)}\n\n{marked}{reason}".rstrip()


def _figure(key: str, value: float) -> str:
    return f"{value:.1%}" if key in _SHARES else f"{value:.4f}"


def _interval(key: str, interval: Sequence[float] | None) -> str:
    return f"{_figure(key, interval[0])} to {_figure(key, interval[1])}" if interval else ""


def _limits(config: RunConfig) -> str:
    untuned = "It writes on; it was not tuned to follow instructions, to converse, or to refuse."
    tuned = "It answers single questions of the kind in its data; it was not tuned to converse, or to refuse."
    return _LIMITS.format(untuned if config.post_training is None else tuned)


_LIMITS = """## Intended use and limits

For studying pre-training: how a small language model learns, and what it can and cannot do after how many tokens. {}
What it says may be wrong, made up, biased or offensive, as its data may be. Each question stands alone. Use it for no decision about
people, and publish nothing that it wrote unread.

License: the data decide, see the dataset. The code that trained it is Apache-2.0."""


def _lineage(checkpoint: Checkpoint, run: RunFolder | None, config: RunConfig, state: dict[str, Any]) -> str:
    code = state.get("code") or {}
    changed = f", and changes with SHA-256 {code['diff_sha256']}" if code.get("diff_sha256") else ""
    versions = ", ".join(f"{name} {version}" for name, version in (state.get("versions") or {}).items())
    rows = {
        "experiment": run.experiment if run else None,
        "checkpoint": checkpoint.name,
        "step": f"{int(state['step']):,} of {config.total_steps:,}",
        "tokens seen": f"{state['tokens']:,}" if isinstance(state.get("tokens"), int) else None,
        "checkpoint digest": checkpoint.digest,
        "SHA-256 of its weights": checkpoint.model_sha256,
        "config digest": state.get("config_digest") or config.digest,
        "dataset": redacted(config.data.path),
        "dataset revision": config.dataset.revision,
        "dataset digest": config.dataset.digest,
        "filter": config.data.filter,
        "samples an epoch": f"{config.dataset.samples:,}, of which {config.dataset.train_samples:,} are trained on",
        "begun with": _begun(config),
        "code": f"{code['commit']}{changed}" if code.get("commit") else None,
        "versions": versions or None,
    }
    return "## Lineage\n\n" + _table(("what", "value"), [(key, _code(value)) for key, value in rows.items() if value])


def _begun(config: RunConfig) -> str | None:
    begun = config.begins_with
    return f"{words_for(begun)}, {begun.digest}" if begun else None


def _training(config: RunConfig) -> str:
    fields = {"seed": config.seed, **config.training.model_dump(mode="json"), "dropout": config.model.dropout}
    fields |= {"max_length": config.data.max_length, "initializer_range": config.model.initializer_range}
    rows = [(_code(key), _code(json.dumps(value))) for key, value in fields.items() if value is not None]
    return "## Training\n\n" + _table(("setting", "value"), rows)


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _in_one_line(text: Any) -> str:
    return " ".join(str(text).split())


def _code(text: Any) -> str:
    """In one line and as it is, whatever it holds: between more backticks than it has."""
    line = _in_one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if len(fence) > 1 else ""
    return f"{fence}{space}{line}{space}{fence}"


def _fenced(text: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"
