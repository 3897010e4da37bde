"""What `gpt2 data` prints."""

from __future__ import annotations

import os
import shutil
import textwrap
import unicodedata

from flows.units import count, duration, rounded, size
from tasks.data_report import DataReport
from tasks.project import Project


def print_data(project: Project, report: DataReport) -> None:
    """Print what `gpt2 data` shows."""
    places = {path: path.removeprefix(f"{project.root}{os.sep}") for path in (report.location, report.plot)}
    found = "as build-config found them" if report.built else "as they are now; build-config has not pinned them yet"
    _print_lines(
        report.experiment,
        f"{report.path}, {found}",
        f"{places[report.location]}: {count(report.files, 'file')}, {size(report.bytes)}",
        f"revision {report.revision}" if report.revision else "not on the Hub: no revision to pin",
        *(f"left out: {fault}" for fault in report.left_out),
    )
    rule = f"rows where {report.filter}" if report.filter else "every row"
    _print_lines("samples", f"{report.samples:,} an epoch: {rule}")
    for part, share in report.split.items():
        about = "" if part == "train" else "about "
        label = "split" if part == "train" else ""
        _print_lines(
            label, f"{part:<7}{share.sampled:>6,} of {report.sampled_rows:,} sampled, {share.share:.1%} · {about}{share.samples:,} an epoch"
        )
    for sample in report.shown:
        print(f"\nsample {sample.id} · {sample.part} · {sample.tokens:,} tokens · {sample.characters:,} characters")
        _print_text(sample.text)
    print()
    tokens, odd, epoch = report.tokens, report.odd_rows, report.epoch
    _print_lines(
        "tokens",
        f"mean {tokens.mean:,} · median {tokens.median:,} · p5 {tokens.p5:,} · p95 {tokens.p95:,} · max {tokens.max:,} a document",
        f"{report.sampled_rows:,} rows sampled from the beginnings of {count(report.sampled_files, 'file')}",
        f"{odd['empty_field']:,} with an empty field · {odd['not_utf8']:,} not UTF-8 · {odd['end_of_text']:,} that contain <|endoftext|>",
    )
    _print_lines(
        "epoch",
        f"about {rounded(epoch.tokens)} tokens to train on: {rounded(epoch.windows)} windows of {report.max_length:,}, "
        f"{rounded(epoch.steps)} steps of {count(report.global_batch, 'window')}",
        f"the run is planned for {report.planned_steps:,} steps",
    )
    speed = report.training_speed
    if speed is None or epoch.seconds is None:
        _print_lines("time", f"not known yet; train some steps to find out: gpt2 train {report.experiment} --set training.max_steps=20")
    else:
        _print_lines(
            "time",
            f"about {duration(epoch.seconds)} an epoch at {rounded(speed.tokens_per_s)} tokens/s, as in the run's last "
            f"{count(speed.steps, 'step')} on {speed.device or 'this machine'}; validations and checkpoints come on top",
        )
    alone = duration(epoch.tokens / report.stream_tokens_per_s)
    _print_lines("", f"the stream alone: {rounded(report.stream_tokens_per_s)} tokens/s here on one thread, an epoch in {alone}")
    _print_lines("plot", places[report.plot])


def _print_lines(label: str, *lines: str) -> None:
    """The first line behind its label, the others below it."""
    for number, line in enumerate(lines):
        print(f"{label if number == 0 else '':<11} {line}")


def _print_text(text: str) -> None:
    """A sample's text, indented and wrapped; what a terminal would take for a command is written out."""
    width = min(110, shutil.get_terminal_size().columns) - 4
    for line in text.split("\n"):
        shown = "".join(c if c == "\t" or unicodedata.category(c) != "Cc" else c.encode("unicode_escape").decode() for c in line)
        for piece in textwrap.wrap(shown, width, replace_whitespace=False, break_on_hyphens=False) or [""]:
            print(f"  │ {piece}".rstrip())
