"""build-config: from `params.yaml` to everything that decides a run: `config.yaml`, the dataset manifest, the evaluation's config.

`python -m tasks.build_config EXPERIMENT`
"""

from __future__ import annotations

import contextlib
import math

from model.config import DataConfig, DatasetSummary, Experiment, RunConfig, TrainingConfig
from model.errors import UserError
from model.params import read_yaml, validated, write_yaml
from model.run_folder import RunFolder
from model.stream.manifest import DatasetManifest
from model.stream.resolve import resolve
from tasks.project import Project
from tasks.steps import run_step

_NOT_DECIDING = {"revision", "max_length", "buffer_size", "lanes", "cache"}
"""Fields of the data config that do not decide what a dataset manifest says. (The revision is compared by itself.)"""


def build_config(project: Project, name: str) -> None:
    """Validate the experiment, find its data, and write what the later stages read. Equal input gives equal files.

    Raises:
        UserError: a field is wrong, or the data cannot be reached; nothing was changed.
    """
    experiment = project.experiment(name)
    manifest = resolve(experiment.data, experiment.seed, project.storage_folder(experiment) or project.root / "storage")
    config = resolved(experiment, manifest)
    folder = project.run_folder(name)
    folder.path.mkdir(parents=True, exist_ok=True)
    manifest.write(folder.dataset)
    write_yaml(folder.evaluation_config, experiment.evaluation.model_dump(mode="json"))
    write_yaml(folder.config, config.model_dump(mode="json"))
    for fault in manifest.left_out:
        print(f"left out: {fault}")
    asked = experiment.data.num_samples
    if asked is not None and manifest.samples < asked:
        print(f"data.num_samples asks for {asked:,} samples, the data hold {manifest.samples:,} that pass the filter")
    print(
        f"{manifest.samples:,} samples from {len(manifest.files)} files, "
        f"{manifest.train_samples:,} to train on; {config.total_steps:,} steps of {config.global_batch} windows; "
        f"config {config.digest[:12]}"
    )


def expected_steps(training: TrainingConfig, data: DataConfig, train_samples: int, tokens_per_sample: float) -> int:
    """Steps of all epochs, by the mean length of a sample."""
    windows = training.num_epochs * train_samples * tokens_per_sample / data.max_length
    return math.ceil(windows / (training.batch_size * training.gradient_accumulation))


def built(folder: RunFolder) -> RunConfig | None:
    """The config that build-config wrote last, if there is one and this code can read it."""
    with contextlib.suppress(UserError):
        if folder.config.exists():
            return validated(RunConfig, read_yaml(folder.config), folder.config.name)
    return None


def is_of_same_data(config: RunConfig, experiment: Experiment) -> bool:
    """Whether what a resolved config says of its dataset holds for the experiment, too."""
    same = config.data.model_dump(exclude=_NOT_DECIDING) == experiment.data.model_dump(exclude=_NOT_DECIDING)
    return same and config.seed == experiment.seed and experiment.data.revision in (None, config.data.revision)


def resolved(experiment: Experiment, manifest: DatasetManifest) -> RunConfig:
    """The experiment with its data known: the revision pinned, the steps of its epochs estimated."""
    training, data = experiment.training, experiment.data
    steps = expected_steps(training, data, manifest.train_samples, manifest.tokens_per_sample)
    if steps < 1:
        raise UserError(f"data.path: {data.path} holds no sample that passes data.filter ({data.filter})")
    return RunConfig(
        seed=experiment.seed,
        model=experiment.model,
        data=data.model_copy(update={"revision": manifest.revision}),
        dataset=DatasetSummary(
            digest=manifest.digest,
            revision=manifest.revision,
            files=len(manifest.files),
            samples=manifest.samples,
            train_samples=manifest.train_samples,
            tokens_per_sample=manifest.tokens_per_sample,
        ),
        training=training,
        checkpoint=experiment.checkpoint,
        total_steps=min(training.max_steps or steps, steps),
    )


if __name__ == "__main__":
    run_step(build_config)
