"""Where a run's files lie: `runs/<experiment>/`. Names only; nothing here opens a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """The folder of one experiment's run. `path` is absolute; what DVC tracks is named in `dvc.yaml`."""

    path: Path

    @property
    def experiment(self) -> str:
        """The experiment's name: the folder's own."""
        return self.path.name

    @property
    def config(self) -> Path:
        """The resolved config (build-config)."""
        return self.path / "config.yaml"

    @property
    def dataset(self) -> Path:
        """The dataset manifest (build-config)."""
        return self.path / "dataset.json"

    @property
    def evaluation_config(self) -> Path:
        """How checkpoints are scored (build-config)."""
        return self.path / "evaluation.yaml"

    @property
    def checkpoints(self) -> Path:
        """Sealed checkpoints (train)."""
        return self.path / "checkpoints"

    @property
    def journal(self) -> Path:
        """The trainer's append-only record (train)."""
        return self.path / "journal.jsonl"

    @property
    def metrics(self) -> Path:
        """Final figures of training, for `dvc metrics` (train)."""
        return self.path / "metrics.json"

    @property
    def curves(self) -> Path:
        """Loss, validation loss and speed by step, for `dvc plots` (train)."""
        return self.path / "curves"

    @property
    def validation_windows(self) -> Path:
        """The windows that the loss is measured on while training (train)."""
        return self.path / ".validation_windows.safetensors"

    @property
    def token_caches(self) -> Path:
        """Token caches, shared among the runs beside this one."""
        return self.path.parent / ".tokens"

    @property
    def registered(self) -> Path:
        """Which checkpoint is which version of the registered model (register)."""
        return self.path / "registered.json"

    @property
    def aliases(self) -> Path:
        """What the registry's aliases name: `{"champion": digest}`; written by whoever asked MLflow last."""
        return self.path / ".aliases.json"

    @property
    def evaluation(self) -> Path:
        """Per-item scores, one folder an evaluation key (evaluate)."""
        return self.path / "evaluation"

    @property
    def scores(self) -> Path:
        """Summary of every checkpoint's scores and the champion, for `dvc metrics` (evaluate)."""
        return self.path / "scores.json"

    @property
    def report(self) -> Path:
        """Pages and plots for people to look at; made anew whenever they are asked for."""
        return self.path / "report"

    @property
    def aside(self) -> Path:
        """What another configuration left behind; kept until it is collected."""
        return self.path / "aside"

    @property
    def begin_anew(self) -> Path:
        """There while nothing that the storage holds of this run is to be gone on with."""
        return self.path / ".begin-anew"

    @property
    def lock(self) -> Path:
        """Held by the trainer while it runs."""
        return self.path / ".trainer.lock"
