"""build-config: from `params.yaml` to everything that decides a run: `config.yaml`, the dataset manifest, the evaluation's config.

`python -m tasks.build_config EXPERIMENT`
"""

from __future__ import annotations

from model.config import Experiment
from model.errors import UserError
from model.params import write_yaml
from model.run_config import Base, DatasetSummary, PostTraining, RunConfig
from model.stream.manifest import DatasetManifest
from model.stream.resolve import resolve, tokens_per_row
from tasks.built_config import expected_steps
from tasks.post_training import base_of
from tasks.project import Project
from tasks.steps import run_step


def build_config(project: Project, name: str) -> None:
    """Validate the experiment, find its data, and write what the later stages read. Equal input gives equal files.

    Raises:
        UserError: a field is wrong, or the data cannot be reached; nothing was changed.
    """
    experiment = project.experiment(name)
    manifest = resolve(experiment.data, experiment.seed, project.storage_folder(experiment) or project.root / "storage")
    base = base_of(project, experiment) if experiment.post_training is not None else None
    config = resolved(experiment, manifest, base)
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
    if base is not None:
        print(f"begins with {base.source}{f', {base.checkpoint} of {base.experiment}' if base.experiment else ''} ({base.digest[:12]})")
    print(
        f"{manifest.samples:,} samples from {len(manifest.files)} files, "
        f"{manifest.train_samples:,} to train on; {config.total_steps:,} steps of {config.global_batch} windows; "
        f"config {config.digest[:12]}"
    )


def resolved(experiment: Experiment, manifest: DatasetManifest, base: Base | None = None) -> RunConfig:
    """The experiment with its data known: the revision pinned, the steps of its epochs estimated. `base`: of a post-training."""
    training, data = experiment.training, experiment.data
    length = manifest.tokens_per_sample
    post_training = None
    if base is not None:
        assert experiment.post_training is not None
        post_training = PostTraining(base=base, packing=experiment.post_training.packing)
        length = tokens_per_row(data, experiment.seed, manifest, one_each=not post_training.packing)
    steps = expected_steps(training, data, manifest.train_samples, length)
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
            tokens_per_sample=length,
        ),
        training=training,
        checkpoint=experiment.checkpoint,
        total_steps=min(training.max_steps or steps, steps),
        post_training=post_training,
    )


if __name__ == "__main__":
    run_step(build_config)
