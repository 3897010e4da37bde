"""The resolved config, which names a run: everything that decides the result of training and nothing that does not.

`build-config` makes it of an `Experiment` (model/config.py) and what it found out about the data. Its digest is the run's identity.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from model.config import CheckpointConfig, DataConfig, ForkOf, ModelConfig, PositiveInt, Section, TrainingConfig
from model.digest import digest_of


class DatasetSummary(Section):
    """What build-config found out about the data: enough to recognise it, and to plan the run."""

    digest: str
    """SHA-256 of the dataset manifest."""
    revision: str | None
    """The pinned commit on the Hub, or null."""
    files: int
    """Files that hold the samples."""
    samples: int
    """Samples an epoch, train and validation together."""
    train_samples: int
    """Samples an epoch that are trained on."""
    tokens_per_sample: float
    """Mean over the first samples, end-of-text included: an estimate for planning, never for the order of the data. In post-training a
    sample that no window holds has none."""


class Base(Section):
    """The network that a post-training begins with, pinned."""

    source: str
    """Where it was found: `models:/quickstart/3`, or a folder."""
    experiment: str | None = None
    """Whose training it comes from, where that is known."""
    checkpoint: str | None = None
    """Its name there."""
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """The checkpoint's digest; an export's SHA-256 of `model.safetensors`."""


class PostTraining(Section):
    """`PostTrainingConfig` with its base known."""

    base: Base
    packing: bool


Windows = Literal["text", "rows", "row"]
"""What a window holds. text: documents back to back, cut where it ends, every token learned. rows: whole rows that do not see each other,
of which the completion is learned; row: one of them."""


class RunConfig(Section):
    """Everything that decides the result of training and nothing that does not (`runs/<experiment>/config.yaml`)."""

    seed: int
    tokenizer: Literal["gpt2"] = "gpt2"
    model: ModelConfig
    data: DataConfig
    dataset: DatasetSummary
    training: TrainingConfig
    checkpoint: CheckpointConfig
    total_steps: PositiveInt
    """Steps the learning-rate schedule spans: `max_steps`, or the epochs' expected length."""
    post_training: PostTraining | None = Field(default=None, exclude_if=lambda value: value is None)
    """What it begins with if it is a post-training; not there if it begins with random weights."""

    @property
    def begins_with(self) -> ForkOf | Base | None:
        """What it begins with in the place of random weights."""
        return self.post_training.base if self.post_training is not None else self.checkpoint.fork_of

    @property
    def windows(self) -> Windows:
        """What its windows hold."""
        if self.post_training is None:
            return "text"
        return "rows" if self.post_training.packing else "row"

    @property
    def global_batch(self) -> int:
        """Windows one optimizer step sees."""
        return self.training.batch_size * self.training.gradient_accumulation

    @property
    def identity(self) -> dict[str, Any]:
        """What training may not go on without: all that decides the weights after a step.

        Not in it: where the data lie (`dataset.digest` names them) and their cache; where to go on; how often to look and to save (unless
        rollbacks go by it), what to keep; and how far to go: `max_steps` may change, although the schedule changes with it.
        """
        left_out = {
            "data": {"path", "revision", "cache"},
            "dataset": {"revision"},
            "training": {"max_steps", "eval_freq", "eval_iters"},
            "checkpoint": {"checkpoint_to_resume", "keep_last"},
            "total_steps": True,
        }
        fields = self.model_dump(mode="json", exclude=left_out)  # type: ignore[arg-type]
        if self.training.spike.action != "rollback":
            del fields["checkpoint"]["save_every_n_iterations"]
        if self.post_training is not None:
            fields["post_training"] = {"base": {"digest": self.post_training.base.digest}, "packing": self.post_training.packing}
        return fields

    @property
    def digest(self) -> str:
        """The run's identity: SHA-256 of the canonical JSON of `identity`."""
        return digest_of(self.identity)

    @property
    def data_identity(self) -> str:
        """SHA-256 over what decides which samples are held out. Runs of equal data identity are scored on the same items, whatever their
        network, their window and their training."""
        names = {"filter", "text_template", "id_column", "article_column", "num_samples", "split_by", "train_ratio"}
        return digest_of([self.seed, self.dataset.digest, self.data.model_dump(mode="json", include=names)])

    def differences(self, other: RunConfig) -> list[str]:
        """What keeps training from going on with `other`'s checkpoints, by name: `seed: 42, now 43` (other's value first)."""
        ours, theirs = dict(_flat(self.identity)), dict(_flat(other.identity))
        names = [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]
        found = [f"{name}: {theirs.get(name)}, now {ours.get(name)}" for name in names if not name.startswith("dataset.")]
        if self.dataset.digest != other.dataset.digest:
            revisions = f"data.revision: {other.dataset.revision}, now {self.dataset.revision}; " if self.dataset.revision else ""
            found.append(f"{revisions}the dataset: {other.dataset.digest[:12]}, now {self.dataset.digest[:12]}")
        return found


def _flat(fields: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`training.batch_size`, 8: one pair a field."""
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
