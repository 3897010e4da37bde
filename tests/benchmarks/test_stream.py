"""benchmarks/stream.py says of every contestant what it should, on both kinds of files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONTESTANTS = {"datasets_plain", "datasets_batched", "ours", "ours_threads", "tokenizer", "memmap", "ours_cached"}


@pytest.mark.slow
def test_every_contestant_is_measured_on_both_kinds_of_files(tmp_path):
    options = ["--rows", "1700", "--tokens", "30000", "--data", str(tmp_path / "data"), "--json", str(tmp_path / "figures.json")]
    done = subprocess.run([sys.executable, "-m", "benchmarks.stream", *options], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["machine"]["cores"] >= 1
    for dataset in ("small", "hub_shaped"):
        assert figures[dataset].keys() == CONTESTANTS
        for contestant, found in figures[dataset].items():
            assert contestant in done.stdout
            assert found["tokens"] >= 30_000
            assert found["tokens_per_cpu_s"] > 0
            assert found["tokens_per_wall_s"] > 0
            assert found["seconds_to_first_batch"] > 0
            assert found["peak_rss_mb"] > 10
            if Path("/proc/self/io").exists():
                assert found["bytes_to_first_batch"] >= 0
            else:
                assert found["bytes_to_first_batch"] is None
        assert figures[dataset]["tokenizer"]["peak_rss_mb"] < figures[dataset]["datasets_plain"]["peak_rss_mb"]
