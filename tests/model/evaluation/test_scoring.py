"""Scores of a checkpoint: what they are made of, and that nothing but the checkpoint and the items decides them."""

import json
import math

import pytest
import torch
from safetensors.torch import save

from model.checkpoint.store import CheckpointStore
from model.config import EvaluationConfig, Experiment
from model.evaluation.intervals import clustered
from model.evaluation.likelihood import continuation_bits
from model.evaluation.scoring import EvaluationSet, evaluation_set, score
from model.gpt2 import GPT2
from model.huggingface import to_hugging_face
from model.params import merge
from model.run_config import DatasetSummary, RunConfig
from model.stream.quickstart import write_corpus
from model.stream.resolve import resolve
from model.tokenizer import END_OF_TEXT, encode

SETTINGS = EvaluationConfig(items=24, questions=7, max_new_tokens=12, batch_size=8, prompts=["Copy moon.", "Is 4 2 even or odd?"])
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A run's config and manifest, of a small corpus."""
    folder = tmp_path_factory.mktemp("data")
    write_corpus(folder / "corpus", seed=1, rows=2500, files=3)
    experiment = Experiment.model_validate(
        {
            "model": {"preset": "nano", "dropout": 0.3, "initializer_range": 0.1},
            "data": {"path": str(folder / "corpus"), "max_length": 32, "train_ratio": 0.7},
        }
    )
    manifest = resolve(experiment.data, experiment.seed, folder)
    fields = experiment.model_dump(mode="json", include={"seed", "model", "data", "training", "checkpoint"})
    summary = DatasetSummary(digest=manifest.digest, revision=None, files=3, samples=2000, train_samples=1400, tokens_per_sample=30.0)
    return RunConfig.model_validate({**fields, "dataset": summary.model_dump(), "total_steps": 10}), manifest


def sealed(folder, config, model, step=10):
    """A checkpoint of this network."""
    state = json.dumps({"step": step, "config": config.model_dump(mode="json")}).encode()
    files = {"model.safetensors": save(to_hugging_face(model.state_dict())), "optimizer.safetensors": save({}), "state.json": state}
    return CheckpointStore(folder).write(step, {name: [content] for name, content in files.items()})


@pytest.fixture(scope="module")
def checkpoint(data, tmp_path_factory):
    return sealed(tmp_path_factory.mktemp("checkpoints"), data[0], GPT2(data[0].model, seed=4))


@pytest.fixture(scope="module")
def scores(data, checkpoint):
    return score(checkpoint, evaluation_set(*data, SETTINGS), CPU)


def test_items_are_those_of_the_data_and_the_settings_alone(data):
    config, manifest = data
    items = evaluation_set(config, manifest, SETTINGS)
    for change in (
        {"training": {"batch_size": 3, "max_steps": 7, "learning_rate": 1e-4}, "total_steps": 7},
        {"model": {"n_layer": 1, "context_length": 64}},
        {"data": {"max_length": 64, "lanes": 1, "buffer_size": 9}},
    ):
        other = RunConfig.model_validate(merge(config.model_dump(mode="json"), change))
        assert other.data_identity == config.data_identity
        assert evaluation_set(other, manifest, SETTINGS) == items
        assert evaluation_set(other, manifest, SETTINGS).digest == items.digest


def test_the_key_names_what_decides_the_scores(data, checkpoint, tmp_path):
    config, manifest = data
    items = evaluation_set(config, manifest, SETTINGS)
    for same in ({}, {"batch_size": 1}, {"benchmarks": ["hellaswag"], "milestones": [10]}):
        assert evaluation_set(config, manifest, SETTINGS.model_copy(update=same)).key(checkpoint) == items.key(checkpoint)
    for other in ({"items": 23}, {"questions": 6}, {"max_new_tokens": 11}, {"prompts": ["Copy moon."]}, {"kind_column": None}):
        assert evaluation_set(config, manifest, SETTINGS.model_copy(update=other)).key(checkpoint) != items.key(checkpoint), other
    other_seed = RunConfig.model_validate(merge(config.model_dump(mode="json"), {"seed": 7}))
    assert evaluation_set(other_seed, manifest, SETTINGS).key(checkpoint) != items.key(checkpoint)
    assert items.key(sealed(tmp_path, config, GPT2(config.model, seed=5))) != items.key(checkpoint)


def test_halves_are_as_large_as_asked_and_share_no_article(data):
    items = evaluation_set(*data, SETTINGS)
    choose, report = items.half("choose"), items.half("report")
    assert len(choose) == len(report) == 24
    assert not {item.article for item in choose} & {item.article for item in report}
    assert items.items == choose + report


def test_a_row_an_item_says_what_the_network_makes_of_it(data, checkpoint, scores):
    """The network of the checkpoint, seen through the window it was trained with."""
    items = evaluation_set(*data, SETTINGS).items
    model = GPT2(data[0].model.model_copy(update={"context_length": 128}), seed=4).eval()
    model.window = 32
    assert [(row["half"], row["id"]) for row in scores.items] == [(item.half, item.id) for item in items]
    for row, item in list(zip(scores.items, items, strict=True))[::5]:
        expected = {
            "text_bits": ("", item.text),
            "answer_bits": (item.given, item.answer),
            "answer_alone_bits": (item.alone, item.answer),
        }
        for column, pair in expected.items():
            assert row[column] == pytest.approx(continuation_bits(model, [pair], 1)[0], rel=1e-5)
        assert (row["question"], row["gold_answer"]) == (item.question, item.answer)
        assert (row["text_bytes"], row["answer_bytes"]) == (len(item.text.encode()), len(item.answer.encode()))
        gold, *others = (
            continuation_bits(model, [(item.alone, text)], 1)[0] / len(text.encode()) for text in (item.answer, *item.distractors)
        )
        assert row["distractor_rank"] == 1 + sum(other < gold for other in others)


def test_the_summary_is_the_reporting_halfs(scores):
    report, summary = [row for row in scores.items if row["half"] == "report"], scores.summary
    asked = report[:7]
    assert [row["written"] is not None for row in scores.items] == [False] * 24 + [True] * 7 + [False] * 17
    ratio = sum(row["answer_bits"] for row in report) / sum(row["answer_bytes"] for row in report)
    assert summary["answer_bits_per_byte"] == pytest.approx(ratio)
    assert summary["text_bits_per_byte"] == pytest.approx(sum(r["text_bits"] for r in report) / sum(r["text_bytes"] for r in report))
    assert summary["distractor_accuracy"] == sum(row["distractor_rank"] == 1 for row in report) / 24
    assert summary["format_adherence"] == sum(row["well_formed"] for row in asked) / 7
    assert (summary["questions"], summary["checkable"], summary["items"]) == (7, 7, 24)
    assert {f"exact_match.{row['exercise']}" for row in asked} == {key for key in summary if key.startswith("exact_match.")}
    assert all(math.isfinite(value) for value in summary.values())
    articles = [row["article"] for row in report]
    interval = clustered([row["answer_bits"] for row in report], [row["answer_bytes"] for row in report], articles)
    assert scores.intervals["answer_bits_per_byte"] == pytest.approx((interval.low, interval.high))
    for key, (low, high) in scores.intervals.items():
        assert low <= summary[key] <= high
    means = {"text_bits_per_byte", "answer_alone_bits_per_byte", "distractor_accuracy", "distractor_rank", "format_adherence", "token_f1"}
    assert means | {"exact_match"} <= scores.intervals.keys()


def test_prompts_are_answered_in_their_order(scores):
    assert [sample["prompt"] for sample in scores.samples] == ["Q: Copy moon.", "Q: Is 4 2 even or odd?"]
    assert all(sample["text"] for sample in scores.samples)


def test_scores_are_the_same_again_and_whatever_the_batch(data, checkpoint, scores):
    assert score(checkpoint, evaluation_set(*data, SETTINGS), CPU) == scores
    for batch_size in (1, 32):
        other = score(checkpoint, evaluation_set(*data, SETTINGS.model_copy(update={"batch_size": batch_size})), CPU)
        assert other.samples == scores.samples
        assert other.summary == pytest.approx(scores.summary, rel=1e-5)
        for row, known in zip(other.items, scores.items, strict=True):
            assert {key: value for key, value in row.items() if "_bits" not in key} == {k: v for k, v in known.items() if "_bits" not in k}
            assert [row[key] for key in row if "_bits" in key] == pytest.approx([known[key] for key in row if "_bits" in key], rel=1e-5)


def test_a_network_that_writes_the_format_gets_the_points(data, tmp_path):
    """Each position's embedding says what comes next: after a question of one length it writes one answer."""
    config, manifest = data
    everything = evaluation_set(config, manifest, SETTINGS)
    lengths = [1 + len(encode(item.question)) for item in everything.half("report")]
    length = max(set(lengths), key=lengths.count)
    report = [item for item, found in zip(everything.half("report"), lengths, strict=True) if found == length]
    items = EvaluationSet(everything.half("choose") + report, everything.text_template, SETTINGS)
    text = [*encode(f"\n\nReasoning:\n\n\nA: {report[0].answer}"), END_OF_TEXT]
    model = GPT2(config.model, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "c_proj" in name:
                parameter.zero_()
        rows = torch.randn(model.wte.weight.shape, generator=torch.Generator().manual_seed(1))
        model.wte.weight.copy_(torch.nn.functional.normalize(rows - rows.mean(dim=1, keepdim=True)))  # each is most like itself
        model.wpe.weight.zero_()
        model.wpe.weight[length - 1 : length - 1 + len(text)] = 50 * model.wte.weight[text]
    found = score(sealed(tmp_path, config, model), items, CPU)
    right = [row["exact_match"] for row in found.items if row["written"] is not None]
    assert found.summary["format_adherence"] == 1
    articles = {row["article"] for row in found.items if row["written"] is not None}
    assert found.intervals["format_adherence"] == pytest.approx((0.025 ** (1 / len(articles)), 1)), "all right is not certainly right"
    assert right == [item.answer == report[0].answer for item in report[: len(right)]]
    assert found.summary["exact_match"] == sum(right) / len(right) > 0


def test_texts_of_one_column(data, tmp_path):
    """No question, no answer, no delimiter: halves of texts."""
    config, manifest = data
    config = RunConfig.model_validate(merge(config.model_dump(mode="json"), {"data": {"text_template": "{synthetic_reasoning}"}}))
    found = score(sealed(tmp_path, config, GPT2(config.model, seed=4)), evaluation_set(config, manifest, SETTINGS), CPU)
    assert found.summary["text_bits_per_byte"] > 0
    assert all(row["answer_bits"] == row["answer_alone_bits"] > 0 for row in found.items)
    assert found.samples[0]["prompt"] == "Copy moon."
    assert all(math.isfinite(value) for value in found.summary.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_scores(data, checkpoint, scores):
    found = score(checkpoint, evaluation_set(*data, SETTINGS), torch.device("cuda"))
    for key in ("text_bits_per_byte", "answer_bits_per_byte", "answer_alone_bits_per_byte"):
        assert found.summary[key] == pytest.approx(scores.summary[key], rel=1e-4)
    assert found.summary["distractor_rank"] == pytest.approx(scores.summary["distractor_rank"], abs=0.1)
