"""The Hub's real client code against a server on loopback. `HF_ENDPOINT` is read at import, hence a process of its own for each test."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from corpora import data_config, write_files
from servers import COMMIT, FileServer

from model.stream.batches import TrainingWindows
from model.stream.resolve import resolve

pytestmark = pytest.mark.slow

README = b"---\nlicense: cc-by-4.0\n---\nA dataset.\n"
PROGRAM = """
import json, sys, time
from pathlib import Path
from model.config import DataConfig
from model.errors import Stopped, UserError
from model.stream.batches import TrainingWindows
from model.stream.manifest import DatasetManifest
from model.stream.resolve import resolve

what, folder, fields = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
data = DataConfig(**fields)
began = time.monotonic()
try:
    if what == "resolve":
        manifest = resolve(data, 42, folder)
        manifest.write(folder / "dataset.json")
        print(json.dumps([manifest.revision, manifest.digest]))
    else:
        manifest = DatasetManifest.read(folder / "dataset.json")
        print(json.dumps([batch.windows.tolist() for batch in TrainingWindows(manifest, data, 42, 4, 1)]))
        assert "datasets" not in sys.modules
except UserError as error:
    sys.exit(str(error))
except Stopped as stopped:
    sys.exit(f"after {time.monotonic() - began:.0f} s: {stopped}")
"""


def ask(what, folder, endpoint, silence_s=60, **fields):
    """The program's output as JSON, or its error message."""
    data = json.loads(data_config("PleIAs/SYNTH").model_dump_json()) | fields
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    environment["GPT2_SILENCE_S"] = str(silence_s)
    arguments = [sys.executable, "-c", PROGRAM, what, str(folder), json.dumps(data)]
    # `-c` puts the working directory on the path; there must be no folder PleIAs in it
    done = subprocess.run(arguments, env=environment, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=120)
    return json.loads(done.stdout) if done.returncode == 0 else done.stderr.strip()


@pytest.fixture
def corpus(tmp_path):
    write_files(tmp_path / "data", [90, 90, 90])
    files = {f"part_{number:03d}.parquet": (tmp_path / "data" / f"part_{number:03d}.parquet").read_bytes() for number in range(3)}
    with FileServer({"README.md": README, **files}, hub_dataset="PleIAs/SYNTH") as server:
        yield server, tmp_path


def test_a_dataset_of_the_hub_is_pinned_and_read_like_a_folder(corpus):
    server, folder = corpus
    local = data_config(folder / "data")
    manifest = resolve(local, 42, folder)
    assert ask("resolve", folder, server.url) == [COMMIT, manifest.digest]
    written = json.loads((folder / "dataset.json").read_text())
    assert [file["url"] for file in written["files"]] == [
        f"hf://datasets/PleIAs/SYNTH@{COMMIT}/part_{number:03d}.parquet" for number in range(3)
    ]
    assert [file["digest"] for file in written["files"]] == [file.digest for file in manifest.files]
    server.requests.clear()
    server.times.clear()
    server.refused = 1
    server.faults.extend([503, "reset", "stall", (429, {"Retry-After": "2"})])
    assert ask("train", folder, server.url, silence_s=8) == [batch.windows.tolist() for batch in TrainingWindows(manifest, local, 42, 4, 1)]
    assert not server.faults
    fetched = [(path, span) for method, path, span in server.requests if method == "GET" and path.endswith(".parquet")]
    assert fetched
    assert all(span and f"/resolve/{COMMIT}/" in path for path, span in fetched)
    last = server.spoiled[-1]
    assert server.times[last + 1] - server.times[last] >= 2  # the Hub's own client does not come back before


def test_a_file_of_the_hub_that_stays_away_or_changed_is_named_in_time(corpus):
    """The Hub's own client would try for minutes."""
    server, folder = corpus
    ask("resolve", folder, server.url)
    for fault in ("half", 503):
        server.broken = dict.fromkeys(server.files, fault)
        answer = ask("train", folder, server.url, silence_s=3)
        assert re.match(r"after [2-5] s: data\.path: part_00\d\.parquet could not be read for \d s .*; the same command goes on", answer)
    server.broken = {}
    for path in server.files:
        server.files[path] = server.files[path][:-1] + b"!"
    assert re.match(r"data\.path: part_00\d\.parquet changed since build-config \(its digest", ask("train", folder, server.url))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "PleIAs/SYNTHETIC"}, "data.path: PleIAs/SYNTHETIC is neither a folder here nor a dataset on the Hub"),
        ({"revision": "v99"}, "data.revision: PleIAs/SYNTH has no revision 'v99' on the Hub"),
    ],
)
def test_what_the_hub_does_not_know(corpus, fields, message):
    server, folder = corpus
    answer = ask("resolve", folder, server.url, **fields)
    assert answer.startswith(message)
    assert "\n" not in answer


def test_a_hub_that_falls_silent_while_it_lists_is_one_line(corpus):
    server, folder = corpus
    server.broken = {"README.md": "stall"}
    answer = ask("resolve", folder, server.url, silence_s=4)
    assert answer.startswith("data.path: PleIAs/SYNTH cannot be listed (TimeoutError: no answer within 4 s); check the network")
    assert "\n" not in answer


def test_a_dataset_that_is_not_parquet(tmp_path):
    with FileServer({"README.md": README, "train.csv": b"id,text\n1,a\n"}, hub_dataset="PleIAs/SYNTH") as server:
        answer = ask("resolve", tmp_path, server.url)
    assert answer.startswith("data.path: PleIAs/SYNTH has no parquet files to train on")
    assert "\n" not in answer


@pytest.mark.parametrize("how", ["refused", "silent", "unknown host"])
def test_a_hub_out_of_reach_is_one_line_within_seconds(tmp_path, how):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if how == "silent":
            listener.listen()
        endpoint = "http://nosuch.invalid" if how == "unknown host" else f"http://127.0.0.1:{listener.getsockname()[1]}"
        started = time.monotonic()
        answer = ask("resolve", tmp_path, endpoint)
    assert answer.startswith("data.path: PleIAs/SYNTH cannot be reached (")
    assert "\n" not in answer
    assert time.monotonic() - started < 15
