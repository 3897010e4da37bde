"""MLflow: where it is, the run that stands for a training, scores, tables, versions and their aliases.

Importing this module is cheap and sets MLflow's own settings; MLflow itself (a second or two) is imported when it is used.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from model import disk
from model.checkpoint.store import MANIFEST, MODEL, STATE, NotWhole
from model.config import Experiment
from model.errors import UserError
from model.params import read_yaml, validated
from model.run_config import RunConfig
from model.run_folder import RunFolder
from model.secrets import redacted
from model.training.journal import read_all
from tasks import recipe, run_page
from tasks.project import Project

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"
"""The registry alias of the version that the champion rule chose."""
BEST = "best"
"""The registry alias of the version with the lowest validation loss."""
IDENTITY_TAG = "data_identity"
"""The tag that says which samples were held out: only versions that agree in it are scored on the same items."""
DIGEST_TAG = "checkpoint_digest"
"""The tag that names the checkpoint of a LoggedModel and of a version."""
BASE_DIGEST_TAG = "base_digest"
"""The tag that names the checkpoint (or the weights of an export) that a post-training begins with."""
EVALUATION = "evaluation"
"""The name under which MLflow files scores by their evaluation set's digest."""
TOKENS = "tokens"
"""The parameter of a LoggedModel that says how many tokens it was trained on."""
BY_TOKENS = {
    "train/loss": "by_tokens/train_loss",
    "validation/loss": "by_tokens/validation_loss",
    "validation/bits_per_byte": "by_tokens/validation_bits_per_byte",
    "evaluation/answer_bits_per_byte": "by_tokens/answer_bits_per_byte",
    "evaluation/text_bits_per_byte": "by_tokens/text_bits_per_byte",
}
"""Curves that the run has a second time, with the tokens trained on in the place of the step. MLflow's charts can take a metric as
x-axis, but join the two curves by the steps of both after thinning each to 320 points: of a long run's validations hardly any are left."""
LOCK_TIMEOUT_S = 120


def quieten() -> None:
    """Settings that MLflow reads from the environment: no telemetry, no pickles, and an end to waiting. To be called before its import."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")


quieten()


def mlflow_folder(project: Project, experiment: Experiment) -> Path:
    """Where the default MLflow keeps its database and artifacts: in the storage, or in the project if the storage is a URL."""
    return (project.storage_folder(experiment) or project.root / "storage") / "mlflow"


def tracking_uri(project: Project, experiment: Experiment) -> str:
    """MLFLOW_TRACKING_URI if it is set, else the SQLite file in the storage."""
    return os.environ.get("MLFLOW_TRACKING_URI") or _sqlite_uri(mlflow_folder(project, experiment))


def _sqlite_uri(folder: Path) -> str:
    """Raises UserError where no URL can name the folder."""
    path = (folder / "mlflow.db").as_posix()
    if "%" not in path and "?" not in path:
        return f"sqlite:///{path}"
    from sqlalchemy import make_url

    # In a database URL ? begins the options; whether % begins an escape depends on SQLAlchemy's version: until 2.0 it does not.
    for written in (path, path.replace("%", "%25").replace("?", "%3F")):
        if make_url(f"sqlite:///{written}").database == path:
            return f"sqlite:///{written}"
    raise UserError(f"storage.base_folder: {folder.parent}: MLflow's database cannot lie in a folder with a ? in its name; rename it")


def connect(project: Project, experiment: Experiment) -> MlflowClient:
    """A client of the project's MLflow; the default one is made if it is not there.

    Raises:
        UserError: the storage cannot be written.
        mlflow.MlflowException: MLflow does not answer.
    """
    from mlflow import MlflowClient

    uri = tracking_uri(project, experiment)
    folder = mlflow_folder(project, experiment)
    if not uri.startswith("sqlite:"):
        return MlflowClient(uri, uri)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Whoever opens a new store makes its tables; two at once destroy each other's.
        with FileLock(folder / ".initialise.lock", timeout=LOCK_TIMEOUT_S):
            client = MlflowClient(uri, uri)
            client.search_registered_models(max_results=1)
    except OSError as error:
        raise UserError(f"storage.base_folder: {folder} cannot be used for MLflow: {error}") from None
    return client


def is_there(project: Project, experiment: Experiment) -> bool:
    """Whether there is an MLflow to ask: a server's address, or the file. Nothing is made."""
    return bool(os.environ.get("MLFLOW_TRACKING_URI")) or (mlflow_folder(project, experiment) / "mlflow.db").exists()


def experiment_id(client: MlflowClient, project: Project, experiment: Experiment, name: str) -> str:
    """The MLflow experiment `name`, made if it is not there.

    Raises:
        UserError: someone deleted it in MLflow.
    """
    from mlflow import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, _artifact_location(client.tracking_uri, project, experiment)))
        except MlflowException:  # another process was quicker
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise UserError(f"experiment: {name} was deleted in MLflow; bring it back: mlflow experiments restore -x {found.experiment_id}")
    return str(found.experiment_id)


def _artifact_location(uri: str, project: Project, experiment: Experiment) -> str | None:
    """Artifacts lie beside the database, in the storage. A server decides for itself."""
    if uri.startswith(("http://", "https://")):
        return None
    storage = project.storage(experiment)
    if "://" in storage and not storage.startswith(("ssh://", "sftp://")):  # these MLflow cannot write to: beside the database, too
        return f"{storage.rstrip('/')}/mlflow/artifacts"
    return (mlflow_folder(project, experiment) / "artifacts").as_uri()


def read_config(run_folder: RunFolder) -> RunConfig:
    """The resolved config that build-config wrote."""
    return validated(RunConfig, read_yaml(run_folder.config), f"{run_folder.experiment}/{run_folder.config.name}")


def training_run(client: MlflowClient, project: Project, name: str, config: RunConfig, begins: bool = False) -> str:
    """The id of the MLflow run that stands for this config's training, found by the config's digest or made. `begins`: the training itself
    asks, and its run's page is to show its flow run and its storage."""
    from mlflow.entities import ViewType

    run_folder = project.run_folder(name)
    experiment = project.experiment(name)
    place = experiment_id(client, project, experiment, name)
    with FileLock(run_folder.path / ".tracking-run.lock", timeout=LOCK_TIMEOUT_S):
        filters = f"tags.config_digest = '{config.digest}'"
        tags = _tags(run_folder, config)
        runs = client.search_runs([place], filters, ViewType.ACTIVE_ONLY, 1, ["attributes.start_time ASC"])
        if runs:
            run = runs[0]
        else:
            client.create_run(place, _began(run_folder, config), {**tags, **run_page.who()}, run_page.name_of(name, config))
            # A request that was repeated because its answer was lost made two: all take the first.
            run = client.search_runs([place], filters, ViewType.ACTIVE_ONLY, 1, ["attributes.start_time ASC"])[0]
        run_id = str(run.info.run_id)
        if not run.inputs.dataset_inputs:  # logged last: an earlier process may have been killed before
            _describe(client, run_id, run_folder, config)
        parent = _parent(client, run, config)
        run_page.refresh(client, run, name, config, tags, project.storage(experiment), parent, begins)
        recipe.log(client, run, run_folder, config, experiment.hardware)
    return run_id


def _tags(run_folder: RunFolder, config: RunConfig) -> dict[str, str]:
    """What was trained on what, and how DVC knows it."""
    return {
        "experiment": run_folder.experiment,
        "config_digest": config.digest,
        "dataset_digest": config.dataset.digest,
        IDENTITY_TAG: config.data_identity,
        run_page.CONFIG_MD5_TAG: run_page.md5_of(run_folder.config),
        **({"dataset_revision": config.dataset.revision} if config.dataset.revision else {}),
        **base_tags(config),
    }


def base_tags(config: RunConfig) -> dict[str, str]:
    """What a post-training begins with, as tags of its run and of its versions; none for others."""
    if config.post_training is None:
        return {}
    base = config.post_training.base
    return {"base": base.source, BASE_DIGEST_TAG: base.digest}


def _parent(client: MlflowClient, run: Run, config: RunConfig) -> LoggedModel | None:
    """The LoggedModel that a fork or a post-training begins with, an input of its run from then on; None while this MLflow has none."""
    from mlflow.entities import LoggedModelInput

    parent = config.begins_with
    if parent is None or parent.experiment is None:
        return None
    theirs = client.get_experiment_by_name(parent.experiment)
    found = client.search_logged_models([theirs.experiment_id], f"tags.{DIGEST_TAG} = '{parent.digest}'", max_results=1) if theirs else []
    if not found:
        return None
    if found[0].model_id not in {entry.model_id for entry in run.inputs.model_inputs or []}:
        client.log_inputs(run.info.run_id, models=[LoggedModelInput(found[0].model_id)])
    return found[0]


def _describe(client: MlflowClient, run_id: str, run_folder: RunFolder, config: RunConfig) -> None:
    from mlflow.entities import Param

    params = [Param(field, redacted(value)[:6000]) for field, value in _flat(config.model_dump(mode="json"))]
    for start in range(0, len(params), 100):  # MLflow's own limit
        client.log_batch(run_id, params=params[start : start + 100], synchronous=True)
    client.log_inputs(run_id, [run_page.dataset_input(config, run_folder)])


def _began(run_folder: RunFolder, config: RunConfig) -> int | None:
    """When training of this config began, in ms since 1970; None if it has not."""
    started = (event for event in read_all(run_folder.journal) if event["event"] == "started")
    return next((round(1000 * event["time"]) for event in started if event["config_digest"] == config.digest), None)


def _flat(fields: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """`data.max_length`, `512`: one pair a field."""
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", str(value)


def log_scores(client: MlflowClient, model_id: str, run_id: str, metrics: dict[str, float], step: int, dataset_digest: str) -> None:
    """A checkpoint's scores on its LoggedModel and, at its step, on the run; on the run the main ones at its tokens, too. Logging the
    same again adds nothing."""
    from mlflow.entities import Metric

    digest = dataset_digest[: run_page.DIGEST_LENGTH]
    model = client.get_logged_model(model_id)
    logged = {(m.key, m.value) for m in model.metrics or [] if (m.step, m.dataset_digest) == (step, digest)}
    now = round(1000 * time.time())
    new = [
        Metric(key, value, now, step, model_id, EVALUATION, digest, run_id) for key, value in metrics.items() if (key, value) not in logged
    ]
    if not new:
        return
    tokens = (model.params or {}).get(TOKENS)
    if tokens is not None:
        new += [Metric(BY_TOKENS[m.key], m.value, now, int(tokens)) for m in new if m.key in BY_TOKENS]
    client.log_inputs(run_id, [run_page.evaluation_input(EVALUATION, digest, metrics)])
    client.log_batch(run_id, new, synchronous=True)


def log_table(client: MlflowClient, run_id: str, rows: list[dict[str, Any]], artifact_file: str) -> None:
    """`rows` as a table that MLflow shows and `mlflow.load_table` reads; in place of the one that was there (MLflow's own appends)."""
    columns = list(rows[0]) if rows else []
    client.log_dict(run_id, {"columns": columns, "data": [[row[column] for column in columns] for row in rows]}, artifact_file)
    tables = json.loads(client.get_run(run_id).data.tags.get("mlflow.loggedArtifacts", "[]"))
    entry = {"path": artifact_file, "type": "table"}
    if entry not in tables:
        # A tag holds 8,000 characters; older tables can still be opened among the run's artifacts.
        client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps([*tables[-50:], entry]))


@dataclass(frozen=True)
class Version:
    """A version of a registered model that holds a checkpoint."""

    version: str
    digest: str | None
    """The checkpoint's; None if somebody registered something else."""
    model_id: str
    tags: dict[str, str]


def versions(client: MlflowClient, name: str) -> list[Version]:
    """All versions of the registered model, oldest first."""
    found: list[Version] = []
    token = None
    while True:
        page = client.search_model_versions(f"name = '{name}'", page_token=token)
        found += [as_version(version) for version in page]
        token = page.token
        if not token:
            return sorted(found, key=lambda version: int(version.version))


def as_version(found: ModelVersion) -> Version:
    """What MLflow tells of a version, as far as this project needs it."""
    return Version(str(found.version), found.tags.get(DIGEST_TAG), (found.source or "").removeprefix("models:/"), dict(found.tags))


def version_with(client: MlflowClient, name: str, alias: str) -> Version | None:
    """What the alias marks; None if nothing is marked, or nothing registered."""
    from mlflow import MlflowException

    try:
        return as_version(client.get_model_version_by_alias(name, alias))
    except MlflowException as error:
        # No such model. The other code also stands for requests that are wrong: whether there is no such alias, the model says.
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        if error.error_code != "INVALID_PARAMETER_VALUE" or alias in client.get_registered_model(name).aliases:
            raise
        return None


def note_aliases(client: MlflowClient, run_folder: RunFolder) -> None:
    """Write down in the run folder which checkpoints the registry's aliases name, whoever set them: the trainer, which asks no server,
    deletes none of these."""
    from mlflow import MlflowException

    name = run_folder.experiment
    try:
        versions = client.get_registered_model(name).aliases
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        versions = {}
    digests = {alias: client.get_model_version(name, str(version)).tags.get(DIGEST_TAG) for alias, version in versions.items()}
    text = json.dumps({alias: digest for alias, digest in digests.items() if digest}, indent=1, sort_keys=True) + "\n"
    if not run_folder.aliases.exists() or run_folder.aliases.read_text(encoding="utf-8") != text:
        disk.write_file(run_folder.aliases, text.encode())


def alias_lock(project: Project, experiment: Experiment, name: str) -> FileLock:
    """Whoever moves an alias of `name` holds it: the registry has no compare-and-set. It keeps out every process that can reach its folder.
    MLflow's SQLite file has the lock beside it: that is all who use the file, clones that share a storage included, as far as the file
    system has locks. At an MLflow server it is this project folder's processes only: others can move an alias at the same time."""
    folder = _database_folder(tracking_uri(project, experiment)) or project.scratch_folder()
    return FileLock(folder / f".aliases-{name}.lock", timeout=LOCK_TIMEOUT_S, poll_interval=0.01)


def _database_folder(uri: str) -> Path | None:
    """Where a SQLite file lies; None if the URI is a server's."""
    if not uri.startswith("sqlite:"):
        return None
    from sqlalchemy import make_url

    database = make_url(uri).database
    return Path(database).absolute().parent if database else None


def tag_version(client: MlflowClient, name: str, version: str, tags: dict[str, str]) -> None:
    """Set tags of one version, in place of those with the same keys."""
    for key, value in tags.items():
        client.set_model_version_tag(name, version, key, value)


def materialise(client: MlflowClient, model_id: str, folder: Path) -> None:
    """Put the weights of the checkpoint in `folder` into its LoggedModel, so that it serves without the run folder. Once is enough.

    Raises:
        NotWhole: the weights are not what was written, or not this LoggedModel's.
    """
    from tasks.served_model import BESIDE, complaint_about

    digest = client.get_logged_model(model_id).tags[DIGEST_TAG]
    if complaint := complaint_about(folder, digest):
        raise NotWhole(f"{folder}: {complaint}; its weights were not put into the registry")
    there = {Path(file.path).name for file in client.list_logged_model_artifacts(model_id, BESIDE)}
    if MANIFEST not in there:
        for name in (MODEL, STATE, MANIFEST):  # the manifest last: with it, the folder is complete
            client.log_model_artifact(model_id, str(folder / name), BESIDE)


def fetch_materialised(client: MlflowClient, version: Version, folder: Path) -> None:
    """Bring the weights that `materialise` put into the registry here, as `folder` (there is none yet): without the optimizer's state.

    Raises:
        NotWhole: they are not in the registry, or not the version's.
    """
    from mlflow import MlflowException
    from mlflow.artifacts import download_artifacts

    from tasks.served_model import BESIDE, complaint_about

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        try:
            location = client.get_logged_model(version.model_id).artifact_location
            place = Path(download_artifacts(f"{location}/{BESIDE}", dst_path=scratch, tracking_uri=client.tracking_uri))
        except (MlflowException, OSError) as error:
            raise NotWhole(f"its weights are not in the registry: {error}") from None
        if complaint := complaint_about(place, version.digest or ""):
            raise NotWhole(f"its weights in the registry: {complaint}")
        shutil.move(place, folder)
