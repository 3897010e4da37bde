"""Where a project's files lie, and what its experiments are: `params.yaml` plus what the last run changed (`overrides.yaml`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from model import disk
from model.config import Experiment
from model.errors import UserError
from model.params import check_experiment_name, load_experiment, read_yaml
from model.run_folder import RunFolder

PARAMS = "params.yaml"
OVERRIDES = "overrides.yaml"
STAGES = "dvc.yaml"

_OVERRIDES_HEADER = """\
# The experiments that were started: DVC knows the stages of these. After each name what `--set` or a deployment's parameters changed
# when it was last run; `{}`: nothing. Then which of them are trained from random weights, and which from a trained network.
# Written by `gpt2 train` and `gpt2 post-train`. To change an experiment for good, edit params.yaml instead.
"""
_PRE, _POST = "pre_training", "post_training"


@dataclass(frozen=True)
class Project:
    """A folder with params.yaml, overrides.yaml and dvc.yaml. `root` is absolute."""

    root: Path

    def run_folder(self, experiment: str) -> RunFolder:
        """Where the experiment's run lies: `runs/<experiment>`."""
        return RunFolder(self.root / "runs" / check_experiment_name(experiment))

    def experiment_names(self) -> list[str]:
        """The experiments of params.yaml, in its order."""
        params = read_yaml(self.root / PARAMS)
        experiments = params.get("experiments") if isinstance(params, dict) else None
        return list(experiments) if isinstance(experiments, dict) else []

    def is_post_training(self, name: str) -> bool:
        """Whether the experiment begins with a trained network: its entry has `post_training`."""
        params = read_yaml(self.root / PARAMS)
        experiments = params.get("experiments") if isinstance(params, dict) else None
        entry = experiments.get(name) if isinstance(experiments, dict) else None
        return isinstance(entry, dict) and entry.get("post_training") is not None

    def training_stage(self, name: str) -> str:
        """Which stage of dvc.yaml trains the experiment: `train` or `post-train`; and which command, `gpt2 train` or `gpt2 post-train`."""
        return "post-train" if self.is_post_training(name) else "train"

    def was_started(self, name: str) -> bool:
        """Whether DVC knows the experiment's stages: it was run once, on this machine or where the clone comes from."""
        return name in self._all_overrides()

    def experiment(self, name: str) -> Experiment:
        """The experiment as it stands: params.yaml and its recorded overrides.

        Raises:
            UserError: no such experiment, or a field is wrong.
        """
        return self.with_overrides(name, self.overrides(name))

    def with_overrides(self, name: str, overrides: dict[str, Any]) -> Experiment:
        """The experiment with `overrides` instead of the recorded ones. Records nothing; raises as `experiment` does."""
        return load_experiment(read_yaml(self.root / PARAMS), name, overrides)

    def overrides(self, name: str) -> dict[str, Any]:
        """The recorded overrides of one experiment; `{}` if none are."""
        return self._all_overrides().get(name) or {}

    def record_overrides(self, name: str, overrides: dict[str, Any]) -> None:
        """Make `overrides` the experiment's recorded ones, in place of what was recorded. From now on DVC knows the experiment's stages.
        Equal ones leave the file alone."""
        check_experiment_name(name)
        scratch = self.scratch_folder()
        with FileLock(scratch / "overrides.lock"):
            started = {**self._all_overrides(), name: overrides}
            kinds: dict[str, list[str]] = {_PRE: [], _POST: []}
            for each in started:
                kinds[_POST if self.is_post_training(each) else _PRE].append(each)
            if {"overrides": started, **kinds} == self._recorded():
                return
            text = yaml.safe_dump({"overrides": started, **kinds}, sort_keys=False, allow_unicode=True, width=120)
            disk.write_file(self.root / OVERRIDES, (_OVERRIDES_HEADER + text).encode())

    def storage(self, experiment: Experiment) -> str:
        """`storage.base_folder`: an absolute local folder, or the URL as it is."""
        base = experiment.storage.base_folder
        return base if "://" in base else str((self.root / Path(base).expanduser()).resolve())

    def storage_folder(self, experiment: Experiment) -> Path | None:
        """The storage as an absolute local folder; None if it is a URL."""
        storage = self.storage(experiment)
        return None if "://" in storage else Path(storage)

    def scratch_folder(self) -> Path:
        """For locks and the like: on this machine only, ignored by git. Made if missing."""
        scratch = self.root / ".dvc" / "tmp" / "gpt2"
        scratch.mkdir(parents=True, exist_ok=True)
        return scratch

    def _all_overrides(self) -> dict[str, Any]:
        overrides: dict[str, Any] = self._recorded()["overrides"]
        return overrides

    def _recorded(self) -> dict[str, Any]:
        path = self.root / OVERRIDES
        recorded = read_yaml(path) if path.exists() else {"overrides": {}}
        fits = isinstance(recorded, dict) and "overrides" in recorded and set(recorded) <= {"overrides", _PRE, _POST}
        if not fits or not isinstance(recorded["overrides"], dict):
            raise UserError(f"{OVERRIDES}: must be one group `overrides` of fields by experiment, such as `quickstart: {{}}`")
        return dict(recorded)


def find_project(start: Path | None = None) -> Project:
    """The project of `start` (the current folder): itself or the nearest parent with params.yaml and dvc.yaml.

    Raises:
        UserError: there is none.
    """
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / PARAMS).is_file() and (folder / STAGES).is_file():
            return Project(folder)
    raise UserError(f"no {PARAMS} with a {STAGES} in {start} or above it: run this in the project's folder")


def read_json(path: Path) -> Any:
    """The value of a JSON file that a stage wrote; None if it is not there (yet).

    Raises:
        UserError: it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: is not JSON any more; bring it back (dvc checkout), or remove it and run its stage again") from None
