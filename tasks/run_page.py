"""What a person sees of a training's run in MLflow: its name, its description, the tags and inputs that say where it comes from."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from model.config import ForkOf
from model.errors import UserError
from model.run_config import Base, RunConfig
from model.run_folder import RunFolder
from model.secrets import redacted
from model.stream.manifest import DatasetManifest

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, LoggedModel, Run

FLOW_RUN_URL = "GPT2_FLOW_RUN_URL"
"""Environment: the page of the Prefect flow run that this process works for."""
FLOW_RUN_TAG = "prefect.flow_run"
"""The tag that holds it: of the flow run that trained last."""
CONFIG_MD5_TAG = "dvc.config_md5"
"""The tag with the MD5 by which dvc.lock names the run's config: `git log -S MD5 -- dvc.lock` finds the commits that pin the run."""
DIGEST_LENGTH = 32
"""MLflow keeps at most 36 characters of a dataset's digest."""
_NOTE = "mlflow.note.content"
_LONGEST_NOTE = 8000
"""MLflow takes no more."""
_VIEW = "?workflowType=machine_learning"
"""Without it, MLflow's pages may show what it has for language models in use."""
_BEGIN, _END = "<!-- written by gpt2 train -->", "<!-- what follows stays -->"
"""Around our part of the description; MLflow shows neither. What people write before or after it is theirs."""
_TYPES = {"large_string": "string", "int64": "long", "int32": "integer", "bool": "boolean"}
"""MLflow's words for Arrow's types; the others have the same, or none."""
_NAMES = re.compile(r" \d+-\d+ \(seed \d+, [0-9a-f]{8}\)|-[0-9a-f]{8}")
"""What our names look like after the experiment's; the second is how they looked before."""


def name_of(experiment: str, config: RunConfig) -> str:
    """`samples2m 0-30000 (seed 42, 1799204f)`: the steps that it goes from and to, and the beginning of the config's digest, which tells
    apart what differs in anything else."""
    fork = config.checkpoint.fork_of
    first = int(fork.checkpoint.removeprefix("step_")) if fork else 0
    return f"{experiment} {first}-{config.total_steps} (seed {config.seed}, {config.digest[:8]})"


def words_for(begun: ForkOf | Base) -> str:
    """`step_00000900 of quickstart`, or the folder of an export."""
    return f"{begun.checkpoint} of {begun.experiment}" if begun.experiment else redacted(begun.source if isinstance(begun, Base) else "")


def md5_of(config: Path) -> str:
    """What dvc.lock calls this file."""
    return hashlib.md5(config.read_bytes(), usedforsecurity=False).hexdigest()


def who() -> dict[str, str]:
    """The tag that MLflow shows as "Created by"; none where the system knows no name."""
    try:
        return {"mlflow.user": getpass.getuser()}
    except (OSError, KeyError, ImportError):
        return {}


def refresh(
    client: MlflowClient,
    run: Run,
    name: str,
    config: RunConfig,
    tags: dict[str, str],
    storage: str,
    parent: LoggedModel | None,
    begins: bool,
) -> None:
    """Bring name, tags and description up to date. What people changed in MLflow stays: another name, text beside our part of the
    description, or all of it without our part.

    Args:
        run: as MLflow has it.
        name: the experiment's.
        tags: what they should be.
        storage: where its checkpoints are kept.
        parent: what a fork or a post-training begins with, if MLflow has it.
        begins: the training itself asks; others write what is missing, but say nothing anew.
    """
    from mlflow.entities import RunTag

    there, wanted = run.data.tags, dict(tags)
    flow_run = redacted(os.environ.get(FLOW_RUN_URL, ""))[:1000]
    if flow_run and (begins or FLOW_RUN_TAG not in there):
        wanted[FLOW_RUN_TAG] = flow_run
    if begins or _NOTE not in there or FLOW_RUN_TAG in wanted:
        note = _description(run, name, config, storage, parent, wanted.get(FLOW_RUN_TAG) or there.get(FLOW_RUN_TAG))
        wanted |= _in_place(there.get(_NOTE), note)
    changed = [RunTag(key, value) for key, value in wanted.items() if there.get(key) != value]
    if changed:
        client.log_batch(run.info.run_id, tags=changed, synchronous=True)
    had, called = run.info.run_name or "", name_of(name, config)
    if had != called and had.startswith(name) and _NAMES.fullmatch(had.removeprefix(name)):
        client.update_run(run.info.run_id, name=called)


def _description(run: Run, name: str, config: RunConfig, storage: str, parent: LoggedModel | None, flow_run: str | None) -> str:
    """Markdown. Links begin with #: they hold wherever MLflow's pages are served."""
    page = f"#/experiments/{run.info.experiment_id}"
    training, windows = config.training, f"{config.global_batch} windows of {config.data.max_length} tokens"
    kind = "Post-training" if config.post_training else "GPT-2"
    what = f"{kind} on `{redacted(config.data.path)[:500]}`: {config.total_steps:,} steps of {windows}"
    links = [
        ("report", f"{page}/runs/{run.info.run_id}/artifacts/report/report.html{_VIEW}"),
        ("checkpoints and scores", f"{page}/models{_VIEW}"),
        ("versions and champion", f"#/models/{name}{_VIEW}"),
    ]
    if flow_run:
        links.append(("flow run in Prefect", flow_run))
    begun, begins_with = config.begins_with, ""
    if begun:
        begins_with = words_for(begun)
        if parent:
            begins_with = f"[{begins_with}](#/experiments/{parent.experiment_id}/models/{parent.model_id}{_VIEW})"
        begins_with = f" It begins with {begins_with}."
    lines = [
        _BEGIN,
        " · ".join(f"[{words}]({place})" for words, place in links),
        "",
        f"{what}, learning rate {training.learning_rate:g}, {training.optimizer}, seed {config.seed}.{begins_with}",
        "",
        f"Storage: `{redacted(storage)[:500]}`",
        "",
        "```",
        f"gpt2 {'post-train' if config.post_training else 'train'} {name}    # goes on, or skips what is done",
        f'gpt2 generate {name} "Q: What is 12 + 30?"    # from the champion',
        f"gpt2 replay {run.info.run_id} --steps 20    # the same losses elsewhere?",
        "```",
        _END,
    ]
    return "\n".join(lines)


def _in_place(before: str | None, ours: str) -> dict[str, str]:
    """The description's tag with our part anew; none if it is somebody's own, without our part in it, or would get too long."""
    if before is None:
        return {_NOTE: ours}
    begin, end = before.find(_BEGIN), before.find(_END)
    together = before[:begin] + ours + before[end + len(_END) :]
    return {_NOTE: together} if 0 <= begin < end and len(together) <= _LONGEST_NOTE else {}


def data_key(config: RunConfig) -> tuple[str, str]:
    """The name and the digest under which MLflow files the data that it trains on."""
    return redacted(config.data.path)[:500], config.dataset.digest[:DIGEST_LENGTH]


def dataset_input(config: RunConfig, folder: RunFolder) -> DatasetInput:
    """The data that it trains on, as MLflow's pages show them. An experiment has one entry for all of its runs on the same data: what
    depends on the run's own config, such as how many samples are held out, is among the run's parameters."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = config.dataset
    kind, source = _source(redacted(config.data.path), dataset.revision)
    schema, profile = None, {"samples": dataset.samples, "files": dataset.files, "tokens_per_sample": round(dataset.tokens_per_sample, 1)}
    with contextlib.suppress(UserError):  # build-config writes it anew
        files = DatasetManifest.read(folder.dataset).files
        profile["megabytes"] = round(sum(file.size for file in files) / 1e6, 1)
        schema = _schema(files[0].url)
    logged = Dataset(*data_key(config), kind, json.dumps(source), schema, json.dumps(profile))
    return DatasetInput(logged, [InputTag("mlflow.data.context", "training")])


def _schema(file: str) -> str | None:
    """The columns of a parquet file of this machine; of one elsewhere, None: nobody waits for it here."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        columns = pq.read_schema(file) if Path(file).is_file() else []
    except (OSError, pa.ArrowException):
        return None
    found = [{"name": column.name, "type": _TYPES.get(str(column.type), str(column.type)), "required": False} for column in columns]
    return json.dumps({"mlflow_colspec": found}) if found else None


def _source(path: str, revision: str | None) -> tuple[str, dict[str, object]]:
    """MLflow's word for the kind of place, and the place as its pages read it."""
    if revision is not None:
        return "hugging_face", {"path": path, "revision": revision}
    if path.startswith(("http://", "https://")):
        return "http", {"url": path}
    if path.startswith("s3://"):
        return "s3", {"uri": path}
    if path == "quickstart":
        return "code", {"tags": {"mlflow.source.name": "model/stream/quickstart.py"}}
    return "local", {"uri": path}


def evaluation_input(name: str, digest: str, metrics: dict[str, float]) -> DatasetInput:
    """The held-out items that a checkpoint's scores are of, so that the scores' dataset is one that MLflow can show."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    counts = {key.rpartition("/")[2]: value for key, value in metrics.items() if key.rpartition("/")[2] in ("items", "questions")}
    source = json.dumps({"tags": {"mlflow.source.name": "gpt2 evaluate"}})
    dataset = Dataset(name, digest[:DIGEST_LENGTH], "code", source, profile=json.dumps(counts))
    return DatasetInput(dataset, [InputTag("mlflow.data.context", "evaluation")])
