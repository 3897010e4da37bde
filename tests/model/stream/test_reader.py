"""Reading and splitting: which rows, in which part, as which text, in how much memory."""

import itertools
import random
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import SCHEMA, data_config, make_rows, text_of, write_file, write_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model import tokenizer
from model.errors import UserError
from model.stream import reader as reader_module
from model.stream.manifest import DataFile
from model.stream.packing import OddRows
from model.stream.reader import Reader, document
from model.stream.resolve import resolve
from model.stream.split import PARTS, Splitter
from model.tokenizer import END_OF_TEXT, decode, encode


def ids(manifest, data, seed, *parts):
    reader = Reader(data, seed)
    return [name for file in manifest.files for rows in reader.samples(file, parts, ["id"]) for name in rows.column("id").to_pylist()]


def texts_of(reader, file):
    """Every sample's text."""
    found = [reader.texts(rows) for rows in reader.samples(file, PARTS, reader.data.text_columns)]
    return [texts[row] for texts in found for row in range(len(texts))]


def test_no_article_is_in_two_parts_and_all_parts_are_filled(tmp_path):
    rows = make_rows(3000, articles=400)
    write_file(tmp_path / "a.parquet", rows[:1700])
    write_file(tmp_path / "b.parquet", rows[1700:])
    data = data_config(tmp_path, filter=None, train_ratio=0.8)
    manifest = resolve(data, 42, tmp_path)
    article = {row["id"]: row["article"] or row["id"] for row in rows}
    parts = {part: ids(manifest, data, 42, part) for part in PARTS}
    articles = {part: {article[name] for name in names} for part, names in parts.items()}
    assert sorted(name for names in parts.values() for name in names) == sorted(article)
    assert not articles["train"] & articles["choose"]
    assert not articles["train"] & articles["report"]
    assert not articles["choose"] & articles["report"]
    shares = {part: len(found) / len(set(article.values())) for part, found in articles.items()}
    assert shares == {"train": pytest.approx(0.8, abs=0.06), "choose": pytest.approx(0.1, abs=0.05), "report": pytest.approx(0.1, abs=0.05)}
    assert manifest.train_samples == len(parts["train"])


def test_the_split_does_not_depend_on_the_order_or_number_of_files(tmp_path):
    rows = make_rows(400)
    write_file(tmp_path / "one" / "all.parquet", rows)
    shuffled = random.Random(1).sample(rows, len(rows))
    for number in range(5):
        write_file(tmp_path / "five" / f"{number}.parquet", shuffled[number::5])
    found = []
    for folder in ("one", "five"):
        data = data_config(tmp_path / folder, filter=None)
        found.append({part: sorted(ids(resolve(data, 7, tmp_path), data, 7, part)) for part in PARTS})
    assert found[0] == found[1]


def test_split_by_sample_looks_at_the_id_alone(tmp_path):
    write_file(tmp_path / "a.parquet", [{"id": f"s{number}", "article": "the only one"} for number in range(500)])
    by_article, by_sample = (data_config(tmp_path, filter=None, split_by=by, lanes=1) for by in ("article", "sample"))
    assert resolve(by_article, 1, tmp_path).train_samples in (0, 500)
    assert 400 < resolve(by_sample, 1, tmp_path).train_samples < 490


def test_another_seed_splits_otherwise():
    splits = [[Splitter(data_config("x"), seed).part(b"%d" % number) for number in range(300)] for seed in (1, 1, 2)]
    assert splits[0] == splits[1]
    assert splits[0] != splits[2]


def test_rows_without_article_and_id_are_their_own(tmp_path):
    write_file(tmp_path / "a.parquet", [{"text": str(number)} for number in range(2000)])
    data = data_config(tmp_path, filter=None)
    (file,) = resolve(data, 1, tmp_path).files
    held_out = {
        int(text) for rows in Reader(data, 1).samples(file, ["choose", "report"], ["text"]) for text in rows.column("text").to_pylist()
    }
    assert 140 < len(held_out) < 260
    assert len({number % 1000 for number in held_out}) > 140  # also where a new record batch begins


@pytest.fixture
def small_record_batches(monkeypatch):
    monkeypatch.setattr(reader_module, "_BATCH_ROWS", 7)


@pytest.mark.usefixtures("small_record_batches")
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.integers(0, 25), min_size=1, max_size=5), st.integers(1, 90), st.sampled_from([None, "language == 'en'", "words > 30"]))
def test_num_samples_is_exact_and_means_the_first_ones(tmp_path_factory, sizes, wanted, condition):
    folder = tmp_path_factory.mktemp("data")
    rows = [row for file in write_files(folder, sizes) for row in file]
    keep = {None: lambda row: True, "language == 'en'": lambda row: row["language"] == "en", "words > 30": lambda row: row["words"] > 30}
    passing = [row["id"] for row in rows if keep[condition](row)]
    data = data_config(folder, filter=condition, num_samples=wanted)
    if not passing:
        with pytest.raises(UserError, match=r"^data\.path: "):
            resolve(data, 5, folder)
        return
    manifest = resolve(data, 5, folder)
    assert ids(manifest, data, 5, *PARTS) == passing[:wanted]
    assert manifest.samples == len(passing[:wanted])
    assert manifest.train_samples == len(ids(manifest, data, 5, "train"))


def test_only_as_many_files_are_opened_as_num_samples_needs(tmp_path):
    write_files(tmp_path, [50, 50])
    (tmp_path / "part_002.parquet").write_bytes(b"never looked at")
    data = data_config(tmp_path, filter=None, num_samples=60)
    assert [(file.name, file.samples) for file in resolve(data, 1, tmp_path).files] == [("part_000.parquet", 50), ("part_001.parquet", 10)]


def test_texts_of_odd_rows():
    """Null is empty, bytes that are not UTF-8 are replaced, numbers are written out, the special token's name is ordinary text."""
    rows = pa.RecordBatch.from_arrays(
        [
            pa.array(["a", None, "", "<|endoftext|>", "é文"]),
            pa.array([1, None, 3, 4, 5]),
            pa.Array.from_buffers(pa.string(), 5, pa.array([b"\xff", b"ok", b"", b"\xc3(", b"z"], pa.binary()).buffers()),
        ],
        names=["text", "number", "raw"],
    )
    reader = Reader(data_config("x", filter=None, text_template="Q: {text}\n{{{number}}} {raw}{text}"), 1)
    texts = reader.texts(rows)
    expected = ["Q: a\n{1} �a", "Q: \n{} ok", "Q: \n{3} ", "Q: <|endoftext|>\n{4} �(<|endoftext|>", "Q: é文\n{5} zé文"]
    assert [texts[row].decode("utf-8", errors="replace") for row in range(len(texts))] == expected
    (documents,) = texts.documents()
    pieces = [documents.tokens[start : stop - 1] for start, stop in itertools.pairwise(documents.starts)]
    assert [decode(piece.tolist()) for piece in pieces] == expected
    odd = [OddRows(not_utf8=1), OddRows(empty_field=1), OddRows(empty_field=1), OddRows(not_utf8=1, end_of_text=1)]
    assert documents.odd == dict(enumerate(odd))
    later = reader.texts(rows.slice(3))
    assert [later[row] for row in range(2)] == [texts[row] for row in (3, 4)]


def test_a_document_ends_with_the_only_end_of_text():
    tokens = document("say <|endoftext|> twice: <|endoftext|>")
    assert tokens.dtype == np.uint16
    assert tokens[-1] == END_OF_TEXT
    assert END_OF_TEXT not in tokens[:-1]
    assert decode(tokens[:-1].tolist()) == "say <|endoftext|> twice: <|endoftext|>"
    assert tokens[:-1].tolist() == encode("say <|endoftext|> twice: <|endoftext|>")
    assert document("").tolist() == [END_OF_TEXT]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(st.text("ab \n\t'é文1.,<|>😀", max_size=30), st.sampled_from(["<|endoftext|>", "x <|endoftext|> y"])),
        min_size=1,
        max_size=80,
    ),
    st.randoms(),
)
def test_documents_tokenized_together_are_those_tokenized_alone(texts, rng):
    rows = pa.RecordBatch.from_pydict({"text": texts})
    order = np.array(rng.sample(range(len(texts)), len(texts)))
    together = list(Reader(data_config("x", text_template="{text}"), 1).texts(rows).take(order).documents())
    alone = [document(texts[place]).tolist() for place in order]
    starts = [(documents, start, stop) for documents in together for start, stop in itertools.pairwise(documents.starts)]
    assert [documents.tokens[start:stop].tolist() for documents, start, stop in starts] == alone
    empty = [oddity.empty_field for documents in together for oddity in documents.odd.values()]
    assert sum(empty) == texts.count("")


def test_a_cut_in_white_space_changes_no_token(monkeypatch):
    """The tokenizer gives up on a million white spaces; where the text is cut then, it would have been anyway."""
    rng = random.Random(1)
    monkeypatch.setattr(tokenizer, "_LONG_WHITE_SPACE", re.compile(tokenizer._LONG_WHITE_SPACE.pattern.replace("100000", "2")))
    whole = tokenizer.load_tokenizer()

    class GivesUp:
        """As it does on the whole text; its pieces it takes."""

        def encode_to_numpy(self, piece, **options):
            if piece == text:
                raise ValueError("Regex error")
            return whole.encode_to_numpy(piece, **options)

    monkeypatch.setattr(tokenizer, "load_tokenizer", GivesUp)
    for _ in range(3000):
        text = "".join(rng.choices(" \n\t\u00a0\x1cab1.'é<|endoftext|>", k=rng.randrange(2, 30))) + "  x"
        assert tokenizer.encode_to_numpy(text).tolist() == whole.encode_ordinary(text)
    text = " " * 1_000_000 + "x"
    assert document(text)[-2] == whole.encode_ordinary(" x")[0]


def test_other_types_of_columns_work(tmp_path):
    schema = pa.schema(
        [
            ("id", pa.int64()),
            ("article", pa.dictionary(pa.int32(), pa.string())),
            ("language", pa.string()),
            ("text", pa.large_binary()),
            ("words", pa.float64()),
        ]
    )
    write_file(tmp_path / "a.parquet", [{"id": n, "article": f"a{n % 9}", "text": b"x%d" % n, "words": n / 2} for n in range(50)], schema)
    data = data_config(tmp_path, filter="words < 20 and article != 'a3'", text_template="{text} {words}")
    manifest = resolve(data, 1, tmp_path)
    texts = texts_of(Reader(data, 1), manifest.files[0])
    assert manifest.samples == len(texts) == len([n for n in range(40) if n % 9 != 3])
    assert texts[1] == b"x1 0.5"


def test_a_conversion_in_the_template_is_refused():
    with pytest.raises(UserError, match=r"^data\.text_template: "):
        Reader(data_config("x", text_template="{text!r}"), 1)


def test_the_row_group_is_never_in_memory_as_a_whole(tmp_path):
    """60 MB of text in one row group: what Arrow holds at once stays far below that."""
    rng = np.random.default_rng(1)
    table = pa.table(
        {
            "id": [str(number) for number in range(20_000)],
            "article": [str(number % 500) for number in range(20_000)],
            "language": ["en"] * 20_000,
            "text": [rng.bytes(1500).hex() for _ in range(20_000)],
            "words": range(20_000),
        },
        schema=SCHEMA,
    )
    pq.write_table(table, tmp_path / "big.parquet", row_group_size=len(table))
    raw, rows = table.nbytes, len(table)
    del table
    assert pq.read_metadata(tmp_path / "big.parquet").num_row_groups == 1
    data = data_config(tmp_path)
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    try:
        manifest = resolve(data, 1, tmp_path)
        counting = pool.max_memory()
        texts = sum(len(rows) for rows in Reader(data, 1).samples(manifest.files[0], PARTS, ["text"]))
    finally:
        pa.set_memory_pool(before)
    assert manifest.samples == texts == rows
    assert counting < raw / 4
    assert pool.max_memory() < raw / 3


def test_counting_reads_only_the_columns_that_decide(tmp_path):
    rows = [{**row, "article": row["article"] or "somewhere"} for row in make_rows(2000)]
    write_file(tmp_path / "a.parquet", rows)
    reader = Reader(data_config(tmp_path, filter=None), 1)
    with pq.ParquetFile(tmp_path / "a.parquet") as parquet:
        file = DataFile("", "a.parquet", 0, None, 2000, 2000, 0, 0)
        assert {tuple(found.schema.names) for found, _, _ in reader.split(parquet, file, [], 2000)} == {("article",)}
        filtered = Reader(data_config(tmp_path), 1)
        assert {tuple(found.schema.names) for found, _, _ in filtered.split(parquet, file, [], 2000)} == {("language", "article")}


def test_text_of_matches_the_template(tmp_path):
    rows = write_files(tmp_path, [40])[0]
    data = data_config(tmp_path, filter=None)
    reader, manifest = Reader(data, 1), resolve(data, 1, tmp_path)
    assert texts_of(reader, manifest.files[0]) == [text_of(row).encode() for row in rows]
