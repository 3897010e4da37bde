"""The recipe of a training: what `gpt2 replay` begins again with. It lies among the artifacts of the MLflow run, in `recipe/`.

    config.yaml    the resolved config
    dataset.json   the data manifest
    started.json   the first `started` event (code, versions, device, ranks, …) and the fields of `hardware`

Secrets are redacted, as in everything that is logged: a recipe that holds one cannot be begun again with, and says so.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from model.config import HardwareConfig
from model.digest import sealed, unsealed
from model.errors import UserError
from model.params import parse_yaml, read_yaml, validated
from model.run_config import RunConfig
from model.run_folder import RunFolder
from model.say import say
from model.secrets import HIDDEN, redacted
from model.stream.manifest import DatasetManifest
from model.training.journal import read_all
from tasks.project import Project

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

FOLDER = "recipe"
"""Among the run's artifacts; and the run's tag that says how much of it is there: `begun` or `whole`."""
CONFIG, DATASET, STARTED = "config.yaml", "dataset.json", "started.json"


@dataclass(frozen=True)
class Recipe:
    """What a training is begun again with."""

    config: dict[str, Any]
    """The fields of the resolved config. Not a RunConfig: the run's code may have had other fields."""
    manifest: DatasetManifest
    started: dict[str, Any]
    """What is known of the first start: all of its event and `hardware`, or only what the run's tags tell of the last one."""
    source: str
    """Where it was found, in words."""


def log(client: MlflowClient, run: Run, run_folder: RunFolder, config: RunConfig, hardware: HardwareConfig) -> None:
    """Put the recipe among the run's artifacts, its last part when training has begun. Once; what was logged stays.

    MLflow's files may be away while its database is not: that is told of and tried again the next time the run is looked up.
    """
    there = run.data.tags.get(FOLDER)
    if there == "whole" or not run_folder.dataset.exists():
        return
    began = first_start(run_folder, config.digest)
    if there and began is None:
        return
    run_id = run.info.run_id
    try:
        if not there:
            manifest = unsealed(run_folder.dataset.read_text(encoding="utf-8"))
            if manifest["digest"] != config.dataset.digest:
                return  # build-config is at work
            fields = _redacted(config.model_dump(mode="json"))
            client.log_text(run_id, yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=120), f"{FOLDER}/{CONFIG}")
            client.log_text(run_id, sealed(_redacted(manifest)), f"{FOLDER}/{DATASET}")
        if began is not None:
            client.log_dict(run_id, _redacted({**began, "hardware": hardware.model_dump(mode="json")}), f"{FOLDER}/{STARTED}")
        client.set_tag(run_id, FOLDER, "whole" if began is not None else "begun")
    except Exception as error:
        say(f"warning: MLflow does not take what a replay of the run needs (tried again the next time): {' '.join(str(error).split())}")


def _redacted(value: Any) -> Any:
    """The same with every string in it redacted."""
    if isinstance(value, dict):
        return {key: _redacted(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_redacted(each) for each in value]
    return redacted(value) if isinstance(value, str) else value


def first_start(run_folder: RunFolder, config_digest: str) -> dict[str, Any] | None:
    """The first `started` event of this configuration in the run's journal; None if there is none."""
    events = (event for event in read_all(run_folder.journal) if event["event"] == "started")
    return next((event for event in events if event["config_digest"] == config_digest), None)


def read(client: MlflowClient, run: Run, project: Project) -> Recipe:
    """The recipe of a run: from its artifacts, or else (it is older than recipes, or holds a secret) from its folder in `runs/`.

    Raises:
        UserError: it is in neither.
    """
    found, why = _logged(client, run)
    if found is None:
        found = _in_runs(run, project)
    if found is None:
        name = run.data.tags["experiment"]
        raise UserError(
            f"RUN_ID: {run.info.run_id} {why}, and runs/{name} does not hold its configuration ({run.data.tags['config_digest'][:12]}) any "
            "more; bring it back (git checkout, dvc checkout), or replay it where it was trained"
        )
    return found


def _logged(client: MlflowClient, run: Run) -> tuple[Recipe | None, str]:
    """The recipe among the run's artifacts; None and why it is of no use."""
    from mlflow import MlflowException

    if FOLDER not in run.data.tags:
        return None, "was logged without its recipe (config.yaml, dataset.json)"
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            place = Path(client.download_artifacts(run.info.run_id, FOLDER, scratch))
        except (MlflowException, OSError) as error:
            return None, f"has no recipe that can be read ({' '.join(str(error).split())[:200]})"
        missing = [name for name in (CONFIG, DATASET) if not (place / name).is_file()]
        if missing:
            return None, f"has no {FOLDER}/{missing[0]} any more"
        try:
            config = parse_yaml((place / CONFIG).read_text(encoding="utf-8"), f"{FOLDER}/{CONFIG}")
            manifest = DatasetManifest.read(place / DATASET)
            started = json.loads((place / STARTED).read_text(encoding="utf-8")) if (place / STARTED).is_file() else _told_by_tags(run)
        except ValueError:
            return None, f"has a damaged recipe (the artifacts in {FOLDER}/)"
    if not isinstance(config, dict) or not isinstance(started, dict):
        return None, f"has a recipe that is not one (the artifacts in {FOLDER}/)"
    if HIDDEN in json.dumps({**config, "data": {**config.get("data", {}), "path": ""}}):
        return None, f"holds a secret in its configuration, which is not in {FOLDER}/{CONFIG}"
    if any(HIDDEN in file.url for file in manifest.files):
        return None, f"holds a secret in the addresses of its data, which is not in {FOLDER}/{DATASET}"
    return Recipe(config, manifest, started, "the run's artifacts"), ""


def _in_runs(run: Run, project: Project) -> Recipe | None:
    """The recipe in `runs/`, if the folder still holds this configuration and its data."""
    folder = project.run_folder(run.data.tags["experiment"])
    digest = run.data.tags["config_digest"]
    try:
        fields = read_yaml(folder.config)
        config = validated(RunConfig, fields, folder.config.name)
        manifest = DatasetManifest.read(folder.dataset)
    except UserError:
        return None
    if config.digest != digest or manifest.digest != config.dataset.digest:
        return None
    return Recipe(fields, manifest, first_start(folder, digest) or _told_by_tags(run), f"runs/{folder.experiment}")


def _told_by_tags(run: Run) -> dict[str, Any]:
    """What the run's tags tell of its last start."""
    tags = run.data.tags
    told: dict[str, Any] = {key: tags[key] for key in ("device", "precision") if key in tags}
    for key in ("code", "versions"):
        try:
            value = json.loads(tags.get(key, "null"))
        except ValueError:  # cut short, or redacted
            continue
        if isinstance(value, dict):
            told[key] = value
    return told
