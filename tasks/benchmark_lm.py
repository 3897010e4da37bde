"""Downstream benchmarks: tasks of EleutherAI's lm-evaluation-harness on exported checkpoints.

`lm_eval` runs as a process of its own, on the checkpoint in Hugging Face's format: it needs nothing of this project, and may have an
environment of its own (GPT2_LM_EVAL_PYTHON). `runs/NAME/benchmarks/step_….json` holds what it found; with `--limit 10`, which is for trying
out and is no score, `step_….limit-10.json`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model import disk
from model.checkpoint.store import Checkpoint, CheckpointStore, NotWhole, name_of
from model.digest import digest_of
from model.errors import Stopped, UserError
from model.secrets import redacted
from tasks import tracking, use
from tasks.project import Project, read_json

TASKS = ("hellaswag", "lambada_openai", "arc_easy", "piqa")
"""What is run where neither `--tasks` nor `evaluation.benchmarks` says otherwise."""
PYTHON = "GPT2_LM_EVAL_PYTHON"
"""Environment: the interpreter that has lm_eval; by default ours."""
GPT2_124M = {("hellaswag", "acc_norm"): 0.3114}
"""What GPT-2 124M scores in lm-evaluation-harness, zero-shot. (Its 0.2955 on HellaSwag, which is also quoted, is of completion style:
another metric, never to be put beside `acc_norm`.)"""
_NEEDS = ("lm_eval", "transformers", "accelerate", "torch")
_ASK = (
    f"import importlib.metadata as m, importlib.util as u; gone = [n for n in {_NEEDS!r} if u.find_spec(n) is None];"
    "print('missing ' + ' '.join(gone) if gone else 'version ' + m.version('lm_eval'))"
)
_POLL_S = 0.3

Results = dict[str, dict[str, float]]
"""By task: its metrics, and the standard error of each as `METRIC_stderr`."""
Report = Callable[[str], None]


class BenchmarkFault(RuntimeError):
    """lm_eval broke; one line."""


@dataclass(frozen=True)
class Benchmarked:
    """What is known of one checkpoint: the fields of its file."""

    checkpoint: str
    step: int
    digest: str
    lm_eval_version: str
    limit: int | None
    """Only so many examples of each task: no score."""
    results: Results


def chosen_checkpoints(project: Project, name: str, which: str | None, report: Report) -> list[Checkpoint]:
    """The one named; without a name the champion and the checkpoints of `evaluation.milestones`, in the order of their steps.

    Raises:
        UserError: there is none.
    """
    found = {chosen.step: chosen for chosen in [use.pick_checkpoint(project, name, which)]}
    if which is None:
        folder = project.run_folder(name).checkpoints
        store = {checkpoint.step: checkpoint for checkpoint in CheckpointStore(folder).checkpoints()}
        for step in project.experiment(name).evaluation.milestones:
            if step not in store:
                report(f"evaluation.milestones: {step}: {name_of(step)} is not in {folder} (yet, or any more: see checkpoint.keep_last)")
                continue
            try:
                store[step].verify()
            except NotWhole as error:
                report(f"evaluation.milestones: {error}")
                continue
            found[step] = store[step]
    return [found[step] for step in sorted(found)]


def benchmark_lm(
    project: Project,
    name: str,
    checkpoints: Iterable[Checkpoint],
    tasks: Sequence[str] = (),
    limit: int | None = None,
    include_path: Path | None = None,
    again: bool = False,
    report: Report = lambda message: None,
    stop: threading.Event | None = None,
) -> list[Benchmarked]:
    """Run the tasks on the checkpoints, store what they say, and log it to MLflow. What is known of a checkpoint's bytes under this version
    of lm_eval and this limit is not run again.

    Args:
        project: the project.
        name: the experiment's.
        checkpoints: verified ones.
        tasks: names that lm_eval knows; without any `evaluation.benchmarks`, or else `TASKS`.
        limit: only so many examples of each task.
        include_path: a folder with tasks of one's own (YAML).
        again: run what is known, too.
        report: gets a line about what goes on, and what went wrong beside.
        stop: set it, and lm_eval is ended.

    Raises:
        UserError: lm_eval is not installed, or does not know a task.
        BenchmarkFault: it broke.
        Stopped: `stop` was set; what was finished is stored.
    """
    experiment = project.experiment(name)
    names = list(dict.fromkeys(tasks)) or list(experiment.evaluation.benchmarks) or list(TASKS)
    if wrong := [task for task in names if not re.fullmatch(r"[\w.-]{1,200}", task) or task.startswith("-")]:
        raise UserError(f"--tasks: {wrong[0][:80]!r} is not a task's name, such as hellaswag; separate several by commas")
    if include_path is not None and not include_path.is_dir():
        raise UserError(f"--include-path: {include_path} is not a folder")
    python = os.environ.get(PYTHON) or sys.executable
    version = _version(python)
    folder = project.run_folder(name).path / "benchmarks"
    folder.mkdir(exist_ok=True)
    done = []
    for checkpoint in checkpoints:
        path = folder / f"{checkpoint.name}{f'.limit-{limit}' if limit else ''}.json"
        known = {} if (stored := _stored(path, checkpoint, version, limit)) is None else stored.results
        missing = [task for task in names if again or task not in known]
        if missing:
            if remote := [task for task in missing if task not in _own_tasks(include_path)]:
                report(f"{checkpoint.name}: {', '.join(remote)}: their data come from the Hub if they are not on this machine yet")
            run = _Run(python, include_path, limit, experiment.hardware.device, experiment.evaluation.batch_size, folder / "lm_eval.log")
            known = {**known, **run.results(checkpoint, missing, stop or threading.Event())}
        found = Benchmarked(checkpoint.name, checkpoint.step, checkpoint.digest, version, limit, known)
        if missing:
            disk.write_file(path, (json.dumps(vars(found), indent=1) + "\n").encode())
        _log(project, name, found, report)
        done.append(found)
    return done


def _version(python: str) -> str:
    """lm_eval's, if that interpreter has all it needs."""
    try:
        # Not in this folder, whose packages are none of its own.
        asked = subprocess.run([python, "-c", _ASK], capture_output=True, text=True, timeout=120, cwd=tempfile.gettempdir(), check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{PYTHON}: {python} cannot be run: {error}") from None
    what, _, rest = asked.stdout.strip().partition(" ")
    if what == "version":
        return rest
    raise UserError(
        f"{python} has no {rest or 'working Python'}: pip install 'lm-eval[hf]' (here: pip install -c constraints.txt -e '.[lm-eval]'), or "
        f"name the interpreter of an environment that has it: {PYTHON}=/path/to/python"
    )


def _stored(path: Path, checkpoint: Checkpoint, version: str, limit: int | None) -> Benchmarked | None:
    """What the file holds, if it is of these bytes, this lm_eval and this limit: figures of others do not stand beside new ones."""
    fields = read_json(path)
    try:
        stored = Benchmarked(**fields) if fields is not None else None
    except TypeError:
        raise UserError(f"{path}: is not what gpt2 benchmark-lm wrote; remove it and run it again") from None
    same = stored is not None and (stored.digest, stored.lm_eval_version, stored.limit) == (checkpoint.digest, version, limit)
    return stored if same else None


def _own_tasks(include_path: Path | None) -> set[str]:
    """Names that the YAML files of a folder define. (They may hold tags of lm_eval's own: not read as YAML.)"""
    texts = (
        (path.read_text(encoding="utf-8", errors="replace") for path in include_path.rglob("*.yaml")) if include_path is not None else ()
    )
    return {name for text in texts for name in re.findall(r"^(?:task|group):\s*[\"']?([\w.-]+)", text, re.MULTILINE)}


@dataclass(frozen=True)
class _Run:
    """How lm_eval is called."""

    python: str
    include_path: Path | None
    limit: int | None
    device: str
    batch_size: int
    log: Path

    def results(self, checkpoint: Checkpoint, tasks: list[str], stop: threading.Event) -> Results:
        """What it says about these tasks."""
        from model.device import pick_device

        with tempfile.TemporaryDirectory() as scratch:
            place = Path(scratch)
            use.export(checkpoint, place / "model")
            options = ["--model", "hf", "--model_args", f"pretrained={place / 'model'},dtype=float32", "--tasks", ",".join(tasks)]
            options += [
                "--device",
                pick_device(self.device).type,
                "--batch_size",
                str(self.batch_size),
                "--output_path",
                str(place / "out"),
            ]
            options += ["--limit", str(self.limit)] if self.limit else []
            options += ["--include_path", str(self.include_path.resolve())] if self.include_path is not None else []
            self._call(options, place, stop)
            files = list((place / "out").rglob("results_*.json"))
            if not files:
                raise BenchmarkFault(f"lm_eval wrote no results; what it said: {self.log}")
            found = _read(json.loads(files[0].read_text(encoding="utf-8")))
        if not any(found.values()):
            raise BenchmarkFault(f"lm_eval tells nothing of {', '.join(tasks)}; what it said: {self.log}")
        return {**{task: {} for task in tasks}, **found}  # a tag, such as ai2_arc, has no figures of its own

    def _call(self, options: list[str], place: Path, stop: threading.Event) -> None:
        with self.log.open("wb") as said:
            group: dict[str, Any] = {"creationflags": 0x200} if sys.platform == "win32" else {"start_new_session": True}
            process = subprocess.Popen([self.python, "-m", "lm_eval", *options], cwd=place, stdout=said, stderr=said, **group)
            try:
                while process.poll() is None and not stop.is_set():
                    time.sleep(_POLL_S)
            finally:
                if process.poll() is None:
                    process.kill()
                process.wait()
        if stop.is_set() and process.returncode:
            raise Stopped("lm_eval was ended; what was finished before is stored, and the same command goes on")
        if process.returncode:
            raise _fault(self.log.read_text(encoding="utf-8", errors="replace"), process.returncode, self.log)


def _fault(said: str, code: int, log: Path) -> Exception:
    """What went wrong, by the last words of lm_eval."""
    if unknown := re.findall(r"^\w+: Tasks not found: (.+)$", said, re.MULTILINE):
        return UserError(f"--tasks: lm_eval knows no task {unknown[-1].strip()[:200]}; its list: lm_eval ls tasks")
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["nothing"]
    return BenchmarkFault(f"lm_eval broke (exit code {code}): {redacted(lines[-1])[:300]}; all of it: {log}")


def _read(told: dict[str, Any]) -> Results:
    """The numbers of lm_eval's file: `acc,none` becomes `acc`, `acc_stderr,none` `acc_stderr`; of other filters `exact_match.FILTER`."""
    found: Results = {}
    for task, figures in told["results"].items():
        numbers = {key: value for key, value in figures.items() if "," in key and isinstance(value, int | float)}
        found[task] = {key.removesuffix(",none").replace(",", "."): float(value) for key, value in numbers.items()}
    return found


def _log(project: Project, name: str, found: Benchmarked, report: Report) -> None:
    """The figures on the checkpoint's LoggedModel and, at its step, on the run. They lie in the file, whatever MLflow says."""
    entries = read_json(project.run_folder(name).registered) or []
    entry = next((entry for entry in entries if entry["digest"] == found.digest), None)
    if entry is None:
        report(f"{found.checkpoint} is not registered, so its figures are not in MLflow: run gpt2 evaluate {name}, then this again")
        return
    group = f"benchmark_first_{found.limit}" if found.limit else "benchmark"
    metrics = {
        re.sub(r"[^\w./ -]", "_", f"{group}/{task}/{metric}"): value
        for task, values in found.results.items()
        for metric, value in values.items()
    }
    settings = digest_of({"lm_eval": found.lm_eval_version, "limit": found.limit})
    try:
        client = tracking.connect(project, project.experiment(name))
        tracking.log_scores(client, entry["model_id"], entry["run_id"], metrics, found.step, settings)
    except Exception as error:
        why = " ".join(str(error).split())[:300]
        report(f"MLflow did not take the figures of {found.checkpoint} (the same command sends them again): {why}")
