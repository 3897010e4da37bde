"""The token cache: the same windows with it, without it, and with whatever a kill or a flipped bit left of it."""

import itertools
import random
from pathlib import Path

import pytest
from corpora import data_config, write_files

from model.digest import checked_line, parse_checked
from model.stream.batches import TrainingWindows
from model.stream.resolve import resolve
from model.stream.token_cache import cache_folder

SEED = 42


@pytest.fixture
def corpus(tmp_path):
    write_files(tmp_path / "data", [60, 60, 60])
    data = data_config(tmp_path / "data", lanes=2, buffer_size=30)
    return resolve(data, SEED, tmp_path), data, tmp_path / "tokens"


def stream(corpus, epochs=2, state=None, cached=True, **options):
    manifest, data, cache = corpus
    return TrainingWindows(manifest, data, SEED, 4, epochs, state, cache=cache if cached else None, **options)


def delivered(batches):
    return [(batch.windows.tolist(), batch.state, batch.odd_rows) for batch in batches]


def files_of(corpus, kind):
    manifest, data, cache = corpus
    return sorted(cache_folder(cache, manifest, data, SEED).glob(f"*.{kind}"))


def test_the_second_epoch_needs_the_data_no_more(corpus):
    manifest, _, _ = corpus
    expected = delivered(stream(corpus, epochs=3, cached=False))
    batches = stream(corpus, epochs=3)
    before = delivered(itertools.takewhile(lambda batch: batch.epoch == 0, batches))
    batches.close()
    for file in manifest.files:
        Path(file.url).unlink()
    after = delivered(stream(corpus, epochs=3, state=before[-1][1], threads=2))
    assert before + after == expected


def test_a_block_is_kept_once(corpus):
    delivered(stream(corpus, epochs=1))
    sizes = [path.stat().st_size for path in files_of(corpus, "tokens")]
    assert delivered(stream(corpus, epochs=3)) == delivered(stream(corpus, epochs=3, cached=False))
    assert [path.stat().st_size for path in files_of(corpus, "tokens")] == sizes
    assert all(sizes)


def test_interrupted_anywhere_the_windows_are_the_same_and_the_cache_fills(corpus):
    expected = delivered(stream(corpus, cached=False))
    rng, got, state = random.Random(1), [], None
    while True:
        batches = stream(corpus, state=state)
        for batch in batches:
            got += delivered([batch])
            state = batch.state
            if rng.random() < 0.3:
                break
        else:
            break
        batches.close()
    assert got == expected


@pytest.mark.parametrize("kind", ["tokens", "index"])
def test_what_a_kill_or_a_flipped_bit_left_is_made_again(corpus, kind):
    expected = delivered(stream(corpus))
    rng = random.Random(kind)
    path = files_of(corpus, kind)[0]
    whole = path.read_bytes()
    for _ in range(12):
        damaged = bytearray(whole)
        if rng.random() < 0.5:
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        else:
            del damaged[rng.randrange(len(damaged)) :]
        path.write_bytes(damaged)
        assert delivered(stream(corpus)) == expected
    path.unlink()
    assert delivered(stream(corpus)) == expected


def test_a_record_under_another_blocks_name_is_not_trusted(corpus):
    expected = delivered(stream(corpus))
    path = files_of(corpus, "index")[0]
    records = [parse_checked(line) for line in path.read_bytes().splitlines(keepends=True)]
    first, second = [record for record in records if record["documents"] == records[0]["documents"]][:2]
    names = [(record["file"], record["start"]) for record in (first, second)]
    (second["file"], second["start"]), (first["file"], first["start"]) = names
    path.write_bytes(b"".join(map(checked_line, records)))
    assert delivered(stream(corpus)) == expected


def test_experiments_on_the_same_samples_share_it_and_others_do_not(corpus):
    manifest, data, cache = corpus
    ours = cache_folder(cache, manifest, data, SEED)
    assert cache_folder(cache, manifest, data.model_copy(update={"max_length": 99, "path": "elsewhere"}), SEED) == ours
    changes = ({"text_template": "{text}"}, {"filter": None}, {"lanes": 4})
    others = [cache_folder(cache, manifest, data.model_copy(update=change), SEED) for change in changes]
    assert len({ours, cache_folder(cache, manifest, data, SEED + 1), *others}) == 5


def test_a_second_process_reads_but_does_not_write(corpus):
    first = stream(corpus, epochs=1)
    next(first)
    assert delivered(stream(corpus)) == delivered(stream(corpus, cached=False))
    assert all(
        parse_checked(line)["documents"] for path in files_of(corpus, "index") for line in path.read_bytes().splitlines(keepends=True)
    )
    written = sum(path.stat().st_size for path in files_of(corpus, "tokens"))
    delivered(first)
    assert sum(path.stat().st_size for path in files_of(corpus, "tokens")) > written


def test_a_cache_that_cannot_be_written_is_said_and_does_without(corpus, tmp_path):
    (tmp_path / "tokens").write_text("a file where the folder should be")
    batches = stream(corpus)
    assert delivered(batches) == delivered(stream(corpus, cached=False))
    assert "data.cache: lane_000.tokens cannot be written" in batches.warnings[0]
