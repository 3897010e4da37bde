"""Replay: the first steps of a training once more, from what its MLflow run says of it, to see whether the losses are the same to the bit.

In a new folder lie the code of the run's commit (`code/`), its config and data manifest with what the trainer makes of them (`NAME/`), what
the trainer said (`trainer.log`), and the comparison (`replay.json`). Nothing of it is registered, mirrored, or logged into the run.

Equal bits are promised on the same type of machine with the same versions, ranks and threads. Whatever differs is named.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import struct
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model import disk
from model.errors import EXIT_STOPPED, EXIT_USER, Stopped, UserError
from model.params import validated, write_yaml
from model.run_config import Base
from model.run_folder import RunFolder
from model.secrets import redacted
from model.stream.manifest import DataFile, DatasetManifest
from model.stream.source import is_url
from model.training.identity import code_identity
from model.training.journal import Event, read_current
from tasks import recipe, tracking
from tasks.post_training import place_of
from tasks.project import Project
from tasks.recipe import Recipe
from tasks.starting_point import find_by_digest

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

STEPS = 20
"""How many steps a replay takes, if nobody says otherwise."""
_OURS = Path(__file__).resolve().parents[1]
_POLL_S = 0.3


class ReplayFault(RuntimeError):
    """The replay broke; one line."""


@dataclass(frozen=True)
class Pair:
    """One loss, as the run has it and as the replay has it; None: not finite."""

    step: int
    run: float | None
    replay: float | None

    @property
    def equal(self) -> bool:
        """To the bit."""
        return _bits(self.run) == _bits(self.replay)


@dataclass(frozen=True)
class Replay:
    """What came out."""

    run_id: str
    experiment: str
    folder: str
    code: str
    """Which code computed it, in words."""
    differences: list[str]
    """What is not as it was: code, versions, machine, fields of the config."""
    notes: list[str]
    """What else to know of the comparison."""
    losses: list[Pair]
    validation: list[Pair]

    @property
    def equal(self) -> bool:
        """Whether every loss is the same to the bit."""
        return all(pair.equal for pair in [*self.losses, *self.validation])

    @property
    def first_difference(self) -> Pair | None:
        """The first training loss that is not the same."""
        return next((pair for pair in self.losses if not pair.equal), None)

    def as_json(self) -> dict[str, Any]:
        """The fields, `equal` and the first step that differs."""
        first = self.first_difference
        return {**asdict(self), "equal": self.equal, "first_difference": first.step if first is not None else None}


def replay(
    project: Project,
    run_id: str,
    steps: int = STEPS,
    folder: Path | None = None,
    data: Path | None = None,
    stop: threading.Event | None = None,
) -> Replay:
    """Begin the training of an MLflow run again, and compare the losses of its first `steps` steps.

    Args:
        project: in whose MLflow the run is.
        run_id: the run's.
        steps: to take; fewer if the run has fewer.
        folder: a new one; by default `replays/NAME-…` in the project.
        data: where the files of the run's data lie now, if they have moved.
        stop: set it, and the trainer is stopped.

    Raises:
        UserError: there is no such run, or what it needs is not there any more.
        ConnectionError: MLflow does not answer.
        Stopped: `stop` was set.
        ReplayFault: the trainer broke.
    """
    client, run = _find_run(project, run_id)
    name = run.data.tags["experiment"]
    found = recipe.read(client, run, project)
    fork = (found.config.get("checkpoint") or {}).get("fork_of")
    first = int(fork["checkpoint"].removeprefix("step_")) if fork else 0
    notes: list[str] = []
    losses = _history(client, run_id, "train/loss", notes)
    most = (found.config.get("training") or {}).get("max_steps")
    last = min(first + steps, max(losses, default=0), most or sys.maxsize)
    if not any(first < step <= last for step in losses):
        raise UserError(f"RUN_ID: {run_id} tells of no loss of the steps {first + 1} to {first + steps}; send them: gpt2 sync {name}")
    if last < first + steps:
        extended = ", and was extended later, under another schedule" if max(losses) > last else ""
        notes.append(f"the run has {last - first} steps{extended}, not {steps}")
    manifest = _manifest(found.manifest, data)
    base = (found.config.get("post_training") or {}).get("base")
    checkpoint = (
        place_of(project, validated(Base, base, "post_training.base")) if base else _fork_checkpoint(project, fork) if fork else None
    )
    place = _new_folder(project, name, run_id, folder)
    code = restore_code(project, found.started.get("code") or {}, place / "code")
    run_folder = _write(found, manifest, place / name, notes)
    machine = _machine(project, name, found.started, code.differences)
    _train(code.root, run_folder, place / "trainer.log", machine, checkpoint, found.started.get("threads"), last, stop or threading.Event())
    events = read_current(run_folder.journal)
    result = Replay(
        run_id,
        name,
        str(place),
        code.what,
        code.differences + _config_differences(found, run) + _start_differences(run, found.started, events),
        notes + _gone_on_with(run, found.started),
        _pairs(losses, events, "step", first, last),
        _pairs(_history(client, run_id, "validation/loss", []), events, "validation", first, last),
    )
    disk.write_file(place / "replay.json", (json.dumps(result.as_json(), indent=1) + "\n").encode())
    return result


def _bits(number: float | None) -> bytes | None:
    return struct.pack("<d", number) if number is not None else None


# --- what the run says ---


def _find_run(project: Project, run_id: str) -> tuple[MlflowClient, Run]:
    """The run, wherever the experiments of the project keep their MLflow."""
    from mlflow import MlflowException

    if not re.fullmatch(r"[0-9a-f]{32}", run_id):
        raise UserError(f"RUN_ID: {run_id[:80]!r} is not the id of an MLflow run (32 hexadecimal digits, as in the run's address)")
    asked: list[str] = []
    for name in project.experiment_names():
        experiment = project.experiment(name)
        uri = tracking.tracking_uri(project, experiment)
        if uri in asked or (uri.startswith("sqlite:") and "MLFLOW_TRACKING_URI" not in os.environ and not _has_store(project, name)):
            continue
        asked.append(uri)
        try:
            client = tracking.connect(project, experiment)
            run = client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                continue
            raise ConnectionError(f"{redacted(uri)}: MLflow does not answer: {' '.join(str(error).split())[:300]}") from None
        if not {"config_digest", "experiment"} <= set(run.data.tags):
            raise UserError(f"RUN_ID: {run_id} is no training of this project; its runs have the tags experiment and config_digest")
        return client, run
    raise UserError(f"RUN_ID: no run {run_id} in {', '.join(map(redacted, asked)) or 'MLflow: nothing was trained here yet'}")


def _has_store(project: Project, name: str) -> bool:
    return (tracking.mlflow_folder(project, project.experiment(name)) / "mlflow.db").is_file()


def _history(client: MlflowClient, run_id: str, metric: str, notes: list[str]) -> dict[int, float]:
    """A metric by step. Of a step that was taken again after an interruption the last value counts."""
    found: dict[int, float] = {}
    several: set[int] = set()
    for point in sorted(client.get_metric_history(run_id, metric), key=lambda point: point.timestamp):
        if point.step in found and _bits(found[point.step]) != _bits(point.value):
            several.add(point.step)
        found[point.step] = point.value
    if several:
        notes.append(f"the run has several values of {metric} at {len(several)} steps (from {min(several)} on); the latest were taken")
    return found


def _gone_on_with(run: Run, started: dict[str, Any]) -> list[str]:
    """Other code than the first may have computed some of the steps."""
    with contextlib.suppress(ValueError):
        last = json.loads(run.data.tags.get("code", "null"))
        if last and started.get("code") and last != started["code"]:
            return [f"the run was gone on with by other code ({_in_words(last)}): its later steps are not the first code's"]
    return []


def _config_differences(found: Recipe, run: Run) -> list[str]:
    """Fields of the recipe that are not what was logged as the run's parameters."""
    logged = run.data.params
    fields = ((field, redacted(value)[:6000]) for field, value in tracking._flat(found.config))
    return [f"{field}: {logged[field]}, now {value}" for field, value in fields if field in logged and logged[field] != value]


def _start_differences(run: Run, then: dict[str, Any], events: list[Event]) -> list[str]:
    """What the replay's start does not have in common with the run's."""
    now = next(event for event in events if event["event"] == "started")
    found = []
    if now["config_digest"] != run.data.tags["config_digest"]:
        found.append(f"the config's digest: {run.data.tags['config_digest'][:12]}, now {now['config_digest'][:12]}")
    for key in ("device", "device_name", "precision", "ranks", "micro_batch", "threads", "total_steps"):
        if key in then and key in now and then[key] != now[key]:
            found.append(f"{key}: {then[key]}, now {now[key]}")
    for package, version in (then.get("versions") or {}).items():
        if package != "gpt2-from-scratch" and now["versions"].get(package) != version:  # ours is said by the commit
            found.append(f"{package}: {version}, now {now['versions'].get(package)}")
    return found


# --- what it needs ---


@dataclass
class Code:
    """Where the trainer is started, which code that is, and what is not the run's about it."""

    root: Path
    what: str
    differences: list[str] = dataclasses.field(default_factory=list)


def restore_code(project: Project, then: dict[str, Any], folder: Path) -> Code:
    """The run's code, from its commit in the project's git repository into `folder`; the working tree stays as it is. Where that cannot be
    had, today's code, and what differs."""
    own = project.root if (project.root / "model" / "training" / "__main__.py").is_file() else _OURS
    today = code_identity(own)
    commit, diff = then.get("commit"), then.get("diff_sha256")
    if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]{40,64}", commit):
        return Code(own, f"today's ({_in_words(today)})", ["the run does not say which code trained it"])
    if diff is None and _extract(own, commit, folder):
        return Code(folder, f"commit {commit[:12]}, in {folder}")
    if then == today:
        return Code(own, f"today's, which is the run's ({_in_words(today)})")
    why = "" if diff is not None else ", which this git repository does not have (git fetch may bring it)"
    return Code(own, f"today's ({_in_words(today)})", [f"the code: {_in_words(then)}{why}; now {_in_words(today)}"])


def _in_words(code: dict[str, Any]) -> str:
    if not code.get("commit"):
        return "no git commit"
    diff = code.get("diff_sha256")
    return f"commit {code['commit'][:12]}" + (f" with changes that were not committed (diff {diff[:12]})" if diff else "")


def _extract(root: Path, commit: str, folder: Path) -> bool:
    """Put the package `model`, all that the trainer is, as it was at a commit into `folder`; whether there is such a commit."""
    try:
        command = ["git", "-C", str(root), "archive", "--format=tar", commit, "model"]
        result = subprocess.run(command, capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    if result.returncode:
        return False
    with tarfile.open(fileobj=io.BytesIO(result.stdout)) as archive:
        # Python 3.11.0 to 3.11.3 know no filters; what git makes of a commit has no way out of the folder.
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # type: ignore[arg-type]  # noqa: S202
    return (folder / "model" / "training" / "__main__.py").is_file()


def _manifest(manifest: DatasetManifest, data: Path | None) -> DatasetManifest:
    """With every local file there; that they are the same files the trainer finds out."""
    if data is not None:
        moved = [dataclasses.replace(file, url=str((data / file.name).resolve()), modified_ns=None) for file in manifest.files]
        manifest = dataclasses.replace(manifest, files=moved)
    gone = [file for file in manifest.files if _gone(file)]
    if gone:
        field = "--data" if data is not None else "data.path"
        raise UserError(
            f"{field}: {gone[0].url} is not there ({len(gone)} of {len(manifest.files)} files of the run's data are missing); put them "
            "back, or name the folder that holds them now: --data FOLDER"
        )
    return manifest


def _gone(file: DataFile) -> bool:
    return not is_url(file.url) and not Path(file.url).is_file()


def _fork_checkpoint(project: Project, fork: dict[str, Any]) -> Path:
    place = find_by_digest(project, fork["digest"])
    if place is None:
        raise UserError(
            f"checkpoint.fork_of: the run began with {fork['checkpoint']} of {fork['experiment']} ({fork['digest'][:12]}), which is not in "
            f"runs/; bring it back: dvc pull train@{fork['experiment']}"
        )
    return place


def _new_folder(project: Project, name: str, run_id: str, folder: Path | None) -> Path:
    place = (folder or project.root / "replays" / f"{name}-{run_id[:8]}-{time.strftime('%Y%m%d-%H%M%S')}").resolve()
    try:
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise UserError(f"--folder: {place} is not empty; replay into a new folder")
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--folder: {place}: {error.strerror or error}") from None
    return place


def _write(found: Recipe, manifest: DatasetManifest, path: Path, notes: list[str]) -> RunFolder:
    """The run folder that the trainer is given."""
    fields = found.config
    checkpoint = fields.get("checkpoint") or {}
    if checkpoint.get("checkpoint_to_resume") is not None:  # no part of a run's identity: the weights after a step are the same
        notes.append(
            f"checkpoint.checkpoint_to_resume ({checkpoint['checkpoint_to_resume']}) was left out: a replay begins at the beginning"
        )
        fields = {**fields, "checkpoint": {**checkpoint, "checkpoint_to_resume": None}}
    path.mkdir()
    run_folder = RunFolder(path)
    write_yaml(run_folder.config, fields)
    manifest.write(run_folder.dataset)
    return run_folder


def _machine(project: Project, name: str, started: dict[str, Any], differences: list[str]) -> dict[str, Any]:
    """The fields of `hardware` that make this machine compute as the run's did, as far as it can."""
    hardware = started.get("hardware")
    if hardware is None:
        known = name in project.experiment_names()
        hardware = project.experiment(name).hardware.model_dump(mode="json") if known else {}
        differences.append(
            f"the run does not say what hardware.* was; {f'{name} has it from params.yaml' if known else 'the defaults are used'}"
        )
    fields = dict(hardware)
    fields |= {ours: started[theirs] for ours, theirs in (("micro_batch", "micro_batch"), ("devices", "ranks")) if theirs in started}
    kind = str(started.get("device", "cpu")).split(":")[0]
    if kind == "cpu":
        return {**fields, "device": kind} if "device" in started else fields
    import torch

    there = torch.cuda.device_count() if kind == "cuda" else int(kind == "mps" and torch.backends.mps.is_available())
    if not there:
        differences.append(f"the device: {kind}, which this machine does not have")
        return {**fields, "device": "cpu"}
    if isinstance(ranks := fields.get("devices"), int) and ranks > there:
        fields |= {"devices": there, "micro_batch": None}  # the comparison of the starts names it
    return {**fields, "device": kind}


# --- the training ---


def _train(
    root: Path,
    run_folder: RunFolder,
    log: Path,
    machine: dict[str, Any],
    checkpoint: Path | None,
    threads: int | None,
    last: int,
    stop: threading.Event,
) -> None:
    """Run the trainer until it has told all of step `last`."""
    options = ["--watch-stdin", *(f"--set=hardware.{field}={json.dumps(value)}" for field, value in machine.items())]
    options += [f"--checkpoint={checkpoint}"] if checkpoint is not None else []
    # The folder may lie in a git repository, whose commit is not what is in it.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(root.parent)}
    environment |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    command = [sys.executable, "-m", "model.training", str(run_folder.path), *options]
    group: dict[str, Any] = {"creationflags": 0x200} if sys.platform == "win32" else {"start_new_session": True}
    with log.open("wb") as said:
        trainer = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=said, stderr=said, env=environment, **group)
    assert trainer.stdin is not None
    try:
        while trainer.poll() is None:
            if stop.is_set() or _is_past(run_folder, last):
                break
            time.sleep(_POLL_S)
    finally:
        trainer.stdin.close()  # that asks for a resumable stop, on every system
        trainer.wait()
    step = max((step for step, _ in _told(read_current(run_folder.journal), "step")), default=0)
    if stop.is_set() and step < last:
        raise Stopped(f"the replay was stopped at step {step}; what it has is in {run_folder.path.parent}")
    line = _last_line(log)
    if trainer.returncode == EXIT_USER:
        raise UserError(f"the replay in {run_folder.path.parent} cannot train: {line}")
    if trainer.returncode not in (0, EXIT_STOPPED) or step < last:
        raise ReplayFault(f"the replay broke at step {step} (exit code {trainer.returncode}): {line}; all of it: {log}")


def _is_past(run_folder: RunFolder, last: int) -> bool:
    """Whether the replay went on to the next step: then it has told all of `last`, the validation after it, too."""
    return any(step > last for step, _ in _told(read_current(run_folder.journal), "step"))


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return redacted(lines[-1].removeprefix("error: ")) if lines else "it said nothing"


def _told(events: list[Event], kind: str) -> Iterator[tuple[int, float | None]]:
    """Step and loss of the events of a kind."""
    return ((event["step"], event["loss"]) for event in events if event["event"] == kind)


def _pairs(run: dict[int, float], events: list[Event], kind: str, first: int, last: int) -> list[Pair]:
    """Both losses of each step; of a validation, which may have been due at other steps before, where both have one."""
    here = dict(_told(events, kind))
    steps = {*run, *here} if kind == "step" else run.keys() & here.keys()
    return [Pair(step, run.get(step), here.get(step)) for step in sorted(steps) if first < step <= last]
