"""A checkpoint as MLflow loads it: finds the weights, makes sure that they are the registered ones, and answers prompts.

MLflow keeps a copy of this file with each registered checkpoint (a model from code) and runs it wherever the model is loaded, so it
imports nothing of `tasks`. The weights are looked for in this order, and their digests are verified before they are used:

1. `checkpoint/` beside this file: there once the version was made champion (`checkpoint_register.materialise`);
2. where they lay when they were registered: the absolute path, then the same path below the current folder;
3. any checkpoint with this digest in the project's run folders: it may have been set aside.

A reference that was tampered with leads nowhere: whatever the path, weights with another digest are refused, and nothing of a checkpoint
is unpickled. The code is the model's own, as with every model from code: who can write the registry's artifacts can change what runs.
Load with MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false in the environment, so that nobody's pickle takes the place of this file.

Another place can be named when loading: `mlflow.pyfunc.load_model(uri, model_config={"path": "/disk/step_00001000"})`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas  # type: ignore[import-untyped]
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

from model.checkpoint.store import MANIFEST, MODEL, STATE
from model.digest import file_sha256

BESIDE = "checkpoint"
"""The folder in the model's artifacts that holds a champion's weights."""
NEEDED = (MODEL, STATE)
"""What answering takes of a checkpoint; the optimizer's state stays at home."""
PARAMETERS: dict[str, float | int] = {"max_new_tokens": 128, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}
"""What `predict` takes beside the prompts, with its default; temperature 0 takes the likeliest token, top_k 0 means all."""
BATCH = 32
"""Prompts answered at once, however many a request has."""


def complaint_about(folder: Path, digest: str) -> str | None:
    """Why `folder` is not the checkpoint with `digest`; None if it is, and its weights are whole."""
    try:
        manifest = (folder / MANIFEST).read_bytes()
        if hashlib.sha256(manifest).hexdigest() != digest:
            return "another checkpoint"
        for name in NEEDED:
            if file_sha256(folder / name) != json.loads(manifest)["files"][name]["sha256"]:
                return f"{name} is not what was written (SHA-256 differs)"
    except (ValueError, LookupError, TypeError, RecursionError) as error:  # a path with a NUL; a manifest that is none
        return f"not a checkpoint ({error!r:.100})"
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror or error}"
    return None


def places(config: dict[str, Any], beside: Path) -> Iterator[Path]:
    """Folders that may hold the checkpoint, likeliest first."""
    yield beside
    yield Path(config["path"])
    yield Path(config["relative_path"]).absolute()
    for project in dict.fromkeys([Path(config["project"]), Path.cwd()]):
        yield from (manifest.parent for manifest in sorted((project / "runs").glob(f"*/**/step_*/{MANIFEST}")))


def find_checkpoint(config: dict[str, Any], beside: Path) -> Path:
    """The folder of the checkpoint with the digest `config["digest"]`, its weights verified.

    Raises:
        FileNotFoundError: it is in none of the places; the message says what was wrong with each.
    """
    complaints = []
    for folder in dict.fromkeys(places(config, beside)):
        complaint = complaint_about(folder, config["digest"])
        if complaint is None:
            return folder
        complaints.append(f"{folder}: {complaint}")
    raise FileNotFoundError(f"{config['checkpoint']} with digest {config['digest']} is in none of these: {'; '.join(complaints)}")


class CheckpointByReference(PythonModel):  # type: ignore[misc]
    """Answers a list (or one column) of prompts; the answers are what the network writes after each."""

    def load_context(self, context: PythonModelContext) -> None:
        """Find, verify and load the weights."""
        from model.device import pick_device
        from model.huggingface import load_model

        folder = find_checkpoint(context.model_config, Path(__file__).parent / BESIDE)
        self.network = load_model(folder, pick_device("auto"))

    def predict(self, context: PythonModelContext, model_input: pandas.DataFrame, params: dict[str, Any] | None = None) -> list[str]:
        """The answer to each prompt of the one column. MLflow makes that table of the list in a request; the hint keeps it from
        inferring another signature than the one given, which has the parameters."""
        from model.generation import answer

        prompts = [str(prompt) for prompt in model_input.iloc[:, 0]]
        settings = {**PARAMETERS, **(params or {})}
        settings["top_k"] = settings["top_k"] or None
        return answer(self.network, prompts, **settings, batch_size=BATCH) if prompts else []


set_model(CheckpointByReference())
