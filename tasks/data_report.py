"""What an experiment trains on: where the data lie, some samples, the split, lengths, the size and time of an epoch."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from model.config import Experiment
from model.errors import Stopped, UserError
from model.run_config import RunConfig
from model.run_folder import RunFolder
from model.stream.manifest import DataFile, DatasetManifest
from model.stream.packing import OddRows
from model.stream.reader import Reader, Texts, document
from model.stream.resolve import resolve
from model.stream.source import DamagedFile, changed, describe, filesystem, is_url, open_parquet, patiently
from model.stream.split import PARTS, Part, names_of
from model.training.journal import read_current
from tasks.build_config import resolved
from tasks.built_config import built, is_of_same_data
from tasks.length_plot import draw_lengths
from tasks.project import Project

_ROWS = 2048
"""So many samples are looked at, …"""
_FILES = 16
"""… from the beginnings of so many files, evenly spread."""
_LAST_STEPS = 100
"""The trainer's speed is the median of so many steps."""
_ANSWER_S = 5.0
"""A URL answers in this time, or the report ends."""
_HEAD, _TAIL = 600, 200
"""Characters shown of a long text's beginning and end."""


@dataclass(frozen=True)
class Share:
    """One part of the split."""

    sampled: int
    """Of the sampled rows."""
    share: float
    """The same as a share, 0 to 1."""
    samples: int
    """Of all samples of an epoch: counted for `train`, estimated for the other two."""


@dataclass(frozen=True)
class Tokens:
    """Tokens a document, end-of-text included, over the sampled rows."""

    mean: float
    median: int
    p5: int
    p95: int
    max: int


@dataclass(frozen=True)
class Shown:
    """A sample as the trainer sees it."""

    id: str
    part: Part
    tokens: int
    """End-of-text included."""
    characters: int
    """Of the whole text."""
    text: str
    """By `data.text_template`; of a long one the beginning and the end."""


@dataclass(frozen=True)
class Epoch:
    """Estimates for one pass over the training samples, from the sampled rows' mean length."""

    tokens: int
    windows: int
    """Of `data.max_length` tokens."""
    steps: int
    seconds: float | None
    """At `training_speed`; None: not known yet."""


@dataclass(frozen=True)
class Speed:
    """How fast the run's last steps were, without waiting for data, validations and checkpoints."""

    tokens_per_s: float
    """Median."""
    steps: int
    """So many steps."""
    device: str | None


@dataclass(frozen=True)
class DataReport:
    """Everything `gpt2 data` says; `--json` prints these fields by their names."""

    experiment: str
    path: str
    """`data.path`."""
    location: str
    """The folder or URL under which the files lie."""
    revision: str | None
    """The pinned commit of a dataset of the Hub."""
    built: bool
    """The files are those that build-config found; else they were looked up just now, and nothing of it was kept."""
    files: int
    """Files that hold the samples."""
    bytes: int
    """Their size."""
    left_out: list[str]
    """What is wrong with files that are left out (`data.quarantine`)."""
    filter: str | None
    samples: int
    """Samples an epoch, train and validation together."""
    split: dict[Part, Share]
    """By `train`, `choose`, `report`."""
    sampled_rows: int
    sampled_files: int
    tokens: Tokens
    odd_rows: dict[str, int]
    """Of the sampled rows: `empty_field`, `not_utf8`, `end_of_text` (see model/stream/packing.py)."""
    shown: list[Shown]
    max_length: int
    global_batch: int
    epoch: Epoch
    planned_steps: int
    """Of the whole run: its epochs, or `training.max_steps`."""
    training_speed: Speed | None
    """None: the run has no steps of this model and batch yet."""
    stream_tokens_per_s: float
    """What one thread read and tokenized a second, here and now, without any training."""
    plot: str
    """The histogram of document lengths, an SVG."""

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)


def data_report(project: Project, name: str, show: int) -> DataReport:
    """Look at the experiment's data, and draw `document_lengths.svg` into its report's folder; nothing else is written.

    The same data give the same answer (but for the speeds). Of the rows only those to be shown are kept in memory.

    Args:
        project: where the experiment is.
        name: its name.
        show: how many samples to show.

    Raises:
        UserError: no such experiment, or its data are not there, cannot be reached or cannot be read.
        Stopped: a URL stopped answering.
    """
    experiment, folder = project.experiment(name), project.run_folder(name)
    data, config = experiment.data, built(folder)
    manifest = _built_manifest(experiment, folder, config)
    was_built = manifest is not None
    if manifest is None:
        with contextlib.chdir(project.root):  # where build-config looks for a relative data.path
            manifest = resolve(data, experiment.seed, project.storage_folder(experiment) or project.root / "storage")
    plan = resolved(experiment, manifest)
    sample = _sample(Reader(data, experiment.seed), manifest, show)
    tokens = _tokens(sample.lengths)
    speed = _training_speed(folder) if config is None or _as_fast(config, plan) else None
    folder.report.mkdir(parents=True, exist_ok=True)
    plot = folder.report / "document_lengths.svg"
    draw_lengths(plot, name, sample.lengths, data.max_length)
    return DataReport(
        experiment=name,
        path=data.path,
        location=_location(manifest.files[0]),
        revision=manifest.revision,
        built=was_built,
        files=len(manifest.files),
        bytes=sum(file.size for file in manifest.files),
        left_out=[*manifest.left_out, *sample.left_out],
        filter=data.filter,
        samples=manifest.samples,
        split=_split(manifest, sample.parts),
        sampled_rows=len(sample.lengths),
        sampled_files=sample.files,
        tokens=tokens,
        odd_rows={field: getattr(sample.odd, field) for field in ("empty_field", "not_utf8", "end_of_text")},
        shown=sample.shown,
        max_length=data.max_length,
        global_batch=plan.global_batch,
        epoch=_epoch(plan, tokens, speed),
        planned_steps=plan.total_steps,
        training_speed=speed,
        stream_tokens_per_s=round(sample.tokens_per_s, 1),
        plot=str(plot),
    )


def _built_manifest(experiment: Experiment, folder: RunFolder, config: RunConfig | None) -> DatasetManifest | None:
    """The manifest that build-config wrote, if it was for this data; to find that out nothing of the data is read."""
    if config is None or not is_of_same_data(config, experiment):
        return None
    with contextlib.suppress(UserError):
        manifest = DatasetManifest.read(folder.dataset)
        if (manifest.digest, manifest.train_samples) == (config.dataset.digest, config.dataset.train_samples):
            return manifest
    return None


class _Sample(NamedTuple):
    """What was found in the sampled rows."""

    lengths: np.ndarray
    """Tokens of each document, int64."""
    files: int
    parts: dict[Part, int]
    odd: OddRows
    shown: list[Shown]
    left_out: list[str]
    tokens_per_s: float


def _sample(reader: Reader, manifest: DatasetManifest, show: int) -> _Sample:
    files = manifest.files[:: -(-len(manifest.files) // _FILES)]
    quota = -(-_ROWS // len(files))
    total = sum(min(quota, file.samples) for file in files)
    show = min(show, total)
    to_show = {(2 * number + 1) * total // (2 * show) for number in range(show)}
    lengths: list[int] = []
    parts: dict[Part, int] = dict.fromkeys(PARTS, 0)
    odd = OddRows()
    shown: list[Shown] = []
    left_out: list[str] = []
    _ask(files[0])
    document("")  # loads the tokenizer before the clock starts, …
    pa.array(np.arange(1))  # … and what pyarrow imports for its first array
    began = time.perf_counter()
    for file in files:
        try:
            for names, found, texts in _first_samples(reader, file, quota):
                documents = list(texts.documents())
                odd = odd.plus(*(oddity for some in documents for oddity in some.odd.values()))
                counts = [count for some in documents for count in np.diff(some.starts).tolist()]
                for row, (name, part, count) in enumerate(zip(names, found, counts, strict=True)):
                    if len(lengths) in to_show:
                        shown.append(_shown(name, part, count, texts[row]))
                    lengths.append(count)
                    parts[part] += 1
        except DamagedFile as fault:
            if not reader.data.quarantine or (file is files[-1] and not lengths):
                raise
            left_out.append(str(fault))
    seconds = time.perf_counter() - began
    return _Sample(np.array(lengths), len(files), parts, odd, shown, left_out, sum(lengths) / seconds)


def _first_samples(reader: Reader, file: DataFile, quota: int) -> Iterator[tuple[list[bytes], list[Part], Texts]]:
    """The file's first `quota` samples: their ids, parts and texts."""
    columns = list(dict.fromkeys([reader.data.id_column, *reader.data.text_columns]))
    limit = min(quota, file.samples)
    first_row = found = 0
    with open_parquet(file) as parquet:
        for batch, rows, parts in reader.split(parquet, file, columns, limit):
            samples = batch.select(columns).take(pa.array(rows))
            names = names_of(samples, [reader.data.id_column], file.name, first_row + rows).to_pylist()
            yield names, [PARTS[part] for part in parts.tolist()], reader.texts(samples)
            first_row += batch.num_rows
            found += len(rows)
    if found != limit:
        raise changed(file.name, f"{found:,} rows pass the filter instead of at least {limit:,}")


def _ask(file: DataFile) -> None:
    """A person waits: whether a URL answers at all is found out in seconds, not after the trainer's patience."""
    if is_url(file.url):
        fs, path = filesystem(file.url)
        try:
            patiently(file.name, lambda: fs.info(path), _ANSWER_S)
        except Stopped as stopped:
            cause = describe(stopped.__cause__ or stopped)
            raise UserError(f"data.path: {file.name} cannot be reached ({cause}); check the address and the network") from stopped


def _shown(name: bytes, part: Part, tokens: int, raw: bytes) -> Shown:
    text = raw.decode("utf-8", errors="replace")
    left_out = len(text) - _HEAD - _TAIL
    cut = text if left_out <= _TAIL else f"{text[:_HEAD]} […{left_out:,} characters left out…] {text[-_TAIL:]}"
    return Shown(name.decode("utf-8", errors="replace"), part, tokens, len(text), cut)


def _tokens(lengths: np.ndarray) -> Tokens:
    p5, median, p95 = np.percentile(lengths, [5, 50, 95], method="inverted_cdf").tolist()
    return Tokens(mean=round(float(lengths.mean()), 1), median=int(median), p5=int(p5), p95=int(p95), max=int(lengths.max()))


def _split(manifest: DatasetManifest, parts: dict[Part, int]) -> dict[Part, Share]:
    """Shares of the sample; how many samples are trained on is known, the rest is shared out as in the sample."""
    rows, held_out = sum(parts.values()), manifest.samples - manifest.train_samples
    choosing = parts["choose"] / max(1, parts["choose"] + parts["report"])
    choose = round(held_out * choosing)
    samples: dict[Part, int] = {"train": manifest.train_samples, "choose": choose, "report": held_out - choose}
    return {part: Share(parts[part], round(parts[part] / rows, 4), samples[part]) for part in PARTS}


def _epoch(plan: RunConfig, tokens: Tokens, speed: Speed | None) -> Epoch:
    total = round(plan.dataset.train_samples * tokens.mean)
    windows = total // plan.data.max_length
    seconds = round(total / speed.tokens_per_s, 1) if speed is not None else None
    return Epoch(total, windows, -(-windows // plan.global_batch), seconds)


def _training_speed(folder: RunFolder) -> Speed | None:
    """From the journal; None if it has no steps."""
    events = read_current(folder.journal)
    steps = [event["tokens_per_s"] for event in events if event["event"] == "step"][-_LAST_STEPS:]
    devices = [event.get("device") for event in events if event["event"] == "started"]
    return Speed(statistics.median(steps), len(steps), devices[-1] if devices else None) if steps else None


def _as_fast(config: RunConfig, plan: RunConfig) -> bool:
    """Whether what was trained takes as long a token as what is planned."""
    fields = [(of.model, of.data.max_length, of.training.batch_size, of.training.precision) for of in (config, plan)]
    return fields[0] == fields[1]


def _location(file: DataFile) -> str:
    place = file.url if is_url(file.url) else Path(file.url).as_posix()
    return place.removesuffix(file.name).rstrip("/")
