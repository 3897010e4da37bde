"""What an experiment is made of: the fields of `params.yaml`, what each means, and its bounds.

`params.yaml` holds `defaults` and one entry per experiment; model/params.py reads it into an `Experiment`, and `build-config` resolves that
into a `RunConfig` (model/run_config.py).
"""

from __future__ import annotations

import os
import re
import string
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from model.secrets import refuse_credentials

SYNTH_TEMPLATE = "Q: {query}\n\nReasoning:\n{synthetic_reasoning}\n\nA: {synthetic_answer}"


def _number(value: Any) -> Any:
    """YAML 1.1 reads `3e-4` as a string; a person means the number. A bool is never one."""
    if isinstance(value, bool):
        raise ValueError("should be a number, not true or false")
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"should be a number, not {value!r}") from None
    return value


Float = Annotated[float, BeforeValidator(_number)]
PositiveInt = Annotated[int, Field(ge=1)]
Place = Annotated[str, Field(min_length=1), AfterValidator(refuse_credentials)]
"""A path or URL without a password in it: configs are versioned and pushed."""
NonNegativeFloat = Annotated[Float, Field(ge=0)]


class Section(BaseModel):
    """A group of fields. Unknown keys and wrong types are refused; nothing is changed after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, protected_namespaces=())


PRESETS: dict[str, dict[str, int]] = {
    "nano": {"n_layer": 2, "n_head": 2, "n_embd": 32, "context_length": 128},
    "tiny": {"n_layer": 4, "n_head": 4, "n_embd": 128, "context_length": 256},
    "mini": {"n_layer": 6, "n_head": 6, "n_embd": 384, "context_length": 256},
    "small": {"n_layer": 12, "n_head": 12, "n_embd": 768, "context_length": 1024},
    "medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024, "context_length": 1024},
    "large": {"n_layer": 36, "n_head": 20, "n_embd": 1280, "context_length": 1024},
    "xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600, "context_length": 1024},
}
"""small (124M), medium (355M), large (774M) and xl (1.56B) are GPT-2's four published sizes; the smaller ones are for tests and laptops."""


class ModelConfig(Section):
    """The network's shape (Radford et al. 2019, table 2)."""

    preset: Literal["nano", "tiny", "mini", "small", "medium", "large", "xl"] = "small"
    """Starting values for the shape; a field given beside it wins."""
    vocab_size: Annotated[int, Field(ge=2)] = 50_257
    """Entries of the vocabulary. GPT-2's tokenizer has 50,257."""
    context_length: PositiveInt = 1024
    """Positions the network can look back on; `data.max_length` may not be larger."""
    n_embd: PositiveInt = 768
    """Width of the residual stream; a multiple of `n_head`."""
    n_layer: PositiveInt = 12
    """Transformer blocks."""
    n_head: PositiveInt = 12
    """Attention heads a block."""
    dropout: Annotated[Float, Field(ge=0, lt=1)] = 0.1
    """Probability of dropping an embedding, an attention weight or a residual branch while training."""

    initializer_range: Annotated[Float, Field(gt=0)] = 0.02
    """Standard deviation of the initial weights. GPT-2's is 0.02; narrow networks learn sooner with about 1/sqrt(n_embd)."""

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("preset", "small"), str):
            values = {**PRESETS.get(values.get("preset", "small"), {}), **values}
        return values

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ModelConfig:
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        return self


class DataConfig(Section):
    """Which samples are trained on, and how they become windows of tokens."""

    path: Place
    """A dataset on the Hub (`PleIAs/SYNTH`), a folder or glob of parquet files, an fsspec URL,
    or `quickstart`: the corpus this project generates."""
    revision: str | None = None
    """Commit, tag or branch on the Hub. build-config pins whatever it finds to a commit."""
    filter: str | None = "language == 'en'"
    """Which rows are samples: comparisons of a column with a value, joined with and/or/not. null: every row."""
    text_template: str = SYNTH_TEMPLATE
    """A sample's text; `{column}` stands for the row's value."""
    id_column: str = "synth_id"
    """The column that names a row."""
    article_column: str | None = "query_seed_url"
    """The column that names the article a row was made from; rows without one count as their own article."""
    num_samples: PositiveInt | None = None
    """How many samples there are in an epoch, train and validation together; null: all."""
    split_by: Literal["article", "sample"] = "article"
    """Train and validation share no article (or only no sample: rows of one article leak)."""
    train_ratio: Annotated[Float, Field(gt=0, lt=1)] = 0.9
    """Share of the articles that is trained on."""
    max_length: Annotated[int, Field(ge=2)] = 512
    """Tokens the network predicts in one window; a window holds `max_length + 1`."""
    buffer_size: PositiveInt = 10_000
    """Samples held for shuffling, shared among the lanes."""
    lanes: Annotated[int, Field(ge=1, le=256)] = 8
    """Independent sub-streams, each with its own samples, shuffle and packer; the number of ranks must divide it. Part of the order of
    the data."""
    quarantine: bool = False
    """Go on without files that cannot be decoded or lack a column, saying so and counting what is lost; false: such a file is an error."""
    cache: bool = False
    """Keep the tokens of the first epoch on the disk (2 bytes each, in runs/.tokens) for the next ones and for other experiments on the
    same samples. Changes no result."""

    @model_validator(mode="after")
    def _template_has_columns(self) -> DataConfig:
        try:
            columns = self.text_columns
        except ValueError as error:
            raise ValueError(f"text_template: {error}") from None
        if not columns:
            raise ValueError("text_template names no column: write {column} where a value belongs")
        return self

    @property
    def text_columns(self) -> list[str]:
        """The columns that `text_template` names, in their order, each once."""
        return list(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(self.text_template) if name))

    @property
    def prompt_template(self) -> str:
        """What comes before the second column: `Q: {query}\\n\\nReasoning:\\n`. A text of one column is its own prompt."""
        parts = [(literal, name) for literal, name, _, _ in string.Formatter().parse(self.text_template)]
        first, second = parts[0], parts[1] if len(parts) > 1 else ("", None)
        return f"{first[0]}{{{first[1]}}}{second[0]}"


class SpikeConfig(Section):
    """Steps whose gradient norm is far above those before. (One that is not finite never reaches the weights, whatever is set here.)"""

    action: Literal["none", "skip", "rollback"] = "none"
    """skip: leave the weights as they are and go on; rollback: go back to the last regular checkpoint's weights and on with the batches
    after the spike; none: only the clipping of `gradient_clip`."""
    threshold: Annotated[Float, Field(gt=1)] = 10.0
    """A spike's gradient norm is more than so many times the median."""
    history: Annotated[int, Field(ge=8, le=4096)] = 128
    """Steps that the median is of; with fewer steps behind it no step is a spike."""


class TrainingConfig(Section):
    """One optimizer step after the other."""

    batch_size: PositiveInt = 8
    """Windows a micro-batch."""
    gradient_accumulation: PositiveInt = 1
    """Micro-batches a step; the global batch is `batch_size * gradient_accumulation` windows."""
    num_epochs: PositiveInt = 1
    """Passes over the training samples."""
    max_steps: PositiveInt | None = None
    """Stop after so many steps even if epochs are left; null: train all epochs."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw: AdamW (Loshchilov & Hutter 2019), fused. muon: Muon (Jordan et al. 2024) for the blocks' matrices, AdamW for the rest;
    slow on CPUs without bf16 instructions."""
    learning_rate: Annotated[Float, Field(gt=0)] = 3e-4
    """Peak rate, reached after the warm-up."""
    embedding_learning_rate: Annotated[Float, Field(gt=0)] | None = None
    """Peak rate of the embeddings alone; null: `learning_rate`."""
    matrix_learning_rate: Annotated[Float, Field(gt=0)] | None = None
    """Peak rate of the blocks' matrices alone; null: `learning_rate`. Muon's updates are as large as AdamW's at the same rate."""
    min_learning_rate_ratio: Annotated[Float, Field(ge=0, le=1)] = 0.1
    """Where the schedule ends, as a share of the peak."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay."""
    decay_share: Annotated[Float, Field(gt=0, le=1)] = 1.0
    """The share of the steps after the warm-up, at the end, in which the rate falls; it stays at its peak before. 1: all of them;
    0.2 with `linear`: warm-up, stable, decay (Hu et al. 2024)."""
    warmup_steps: Annotated[int, Field(ge=0)] = 500
    """Steps over which the rate rises linearly from 0."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled decay of the matrices; biases and LayerNorms have none."""
    beta1: Annotated[Float, Field(ge=0, lt=1)] = 0.9
    """AdamW's decay of the first moment."""
    beta2: Annotated[Float, Field(ge=0, lt=1)] = 0.95
    """AdamW's decay of the second moment."""
    epsilon: Annotated[Float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    gradient_clip: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0: none."""
    spike: SpikeConfig = SpikeConfig()
    """What happens to steps whose gradient norm is far above those before."""
    max_bad_steps: PositiveInt = 10
    """So many skipped steps in a row (gradients that are not finite, or spikes), or rollbacks to one checkpoint, end the run."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the forward and backward pass; auto: bf16 on CUDA, fp32 elsewhere. Weights are always fp32."""
    eval_freq: PositiveInt = 500
    """Steps between validations."""
    eval_iters: PositiveInt = 20
    """Micro-batches of validation windows (always the same ones)."""

    @model_validator(mode="after")
    def _decay_of_something(self) -> TrainingConfig:
        if self.schedule == "constant" and self.decay_share != 1.0:
            raise ValueError("decay_share: a constant schedule has no decay; choose linear or cosine, or leave decay_share out")
        return self


class ForkOf(Section):
    """The checkpoint of another experiment that this one begins with. Written by `gpt2 train NAME --fork NEW`."""

    experiment: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")]
    """Whose it is."""
    checkpoint: Annotated[str, Field(pattern=r"^step_\d{8}$")]
    """Its name; the step that the fork goes on from."""
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Its digest."""


class CheckpointConfig(Section):
    """When to save, what to keep, where to go on."""

    save_every_n_iterations: PositiveInt = 1000
    """Steps between checkpoints. One is also written at the end, and when training is stopped."""
    keep_last: PositiveInt | None = 3
    """How many regular checkpoints stay, beside the best by validation loss and what the registry names; null: all."""
    checkpoint_to_resume: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    """Go on from this one, setting later ones aside: a name (`step_00001000`), a checkpoint's folder anywhere, or a registered version
    (`models:/quickstart@champion`, `models:/quickstart/3`). It must be of the same configuration. null: from the newest whole one."""
    fork_of: ForkOf | None = None
    """Begin with this checkpoint of another experiment: its weights, its optimizer's state if the optimizer is the same, its place in the
    data if the data are the same."""


GENERAL_PROMPTS = [
    "What causes the tides?",
    "Who wrote Romeo and Juliet?",
    "What is 12 + 30?",
    "Why is the sky blue?",
    "What is the capital of Japan?",
    "How do vaccines work?",
    "Name three uses of copper.",
    "What was the Silk Road?",
    "If all cats sleep and Tom is a cat, does Tom sleep?",
    "Explain photosynthesis in one sentence.",
]


class EvaluationConfig(Section):
    """How each checkpoint is scored; the same held-out items for all."""

    items: Annotated[int, Field(ge=2, le=100_000)] = 256
    """Held-out samples of each half, for choosing the champion and for reporting, whose bits are counted."""
    questions: Annotated[int, Field(ge=1, le=100_000)] = 256
    """How many of the reporting half's items are also answered greedily; at most `items`."""
    max_new_tokens: PositiveInt = 256
    """Tokens an answer may take, reasoning included; an answer also ends where `data.max_length` does."""
    batch_size: PositiveInt = 16
    """Texts scored at once; changes no score beyond rounding."""
    kind_column: str | None = "exercise"
    """The column that names a sample's kind: each kind has its share of the items, and scores of its own. null: none."""
    prompts: Annotated[list[Annotated[str, Field(min_length=1, max_length=2000)]], Field(max_length=100)] = GENERAL_PROMPTS
    """Values of the template's first column, after which each checkpoint writes a text for people to read."""
    benchmarks: list[Annotated[str, Field(min_length=1, max_length=200)]] = []
    """Tasks of lm-evaluation-harness, by its names (`hellaswag`), for the champion and the `milestones`."""
    milestones: list[PositiveInt] = []
    """Steps whose checkpoints the benchmarks run on, beside the champion; `checkpoint.keep_last` has to leave them there."""

    @model_validator(mode="after")
    def _questions_are_items(self) -> EvaluationConfig:
        if self.questions > self.items:
            raise ValueError(f"questions ({self.questions}) are asked of items ({self.items}); raise items too, or ask fewer")
        return self


class StorageConfig(Section):
    """Where things go that must outlast this machine."""

    base_folder: Place = "storage"
    """The external storage: a folder (relative to the project, or absolute), a mount, or an fsspec URL such as `s3://bucket/path`.
    Holds the DVC remote, the generated corpus, copies of checkpoints in the making and, where it is a folder, MLflow's SQLite."""

    @model_validator(mode="after")
    def _path_of_this_system(self) -> StorageConfig:
        if os.name != "nt" and re.match(r"^[A-Za-z]:[\\/]", self.base_folder):
            raise ValueError(
                f"base_folder: {self.base_folder} is a Windows path; on this system give a folder such as /mnt/storage, or a URL"
            )
        return self


class HardwareConfig(Section):
    """The machine; nothing here is part of a run's identity."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: CUDA where there is one, else the CPU."""
    devices: PositiveInt | Literal["auto"] = 1
    """Ranks that train together, one a GPU (or a CPU process); auto: all GPUs of this machine. The global batch stays what it is."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """How several ranks share the work. ddp: each holds the whole network; fsdp: each holds a part of it and of the optimizer's state,
    for networks that do not fit one GPU."""
    micro_batch: PositiveInt | Literal["auto"] | None = None
    """Windows a rank runs at once, to fill its memory; the global batch stays what it is. auto: as many as fit a GPU's memory, tried out
    at the start; null: `training.batch_size`."""
    compile: bool = False
    """torch.compile the network: a minute of start-up, then faster steps."""
    evaluation_device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where checkpoints are scored. auto: on `device`, unless this machine lacks it or a training holds one of its GPUs; else the CPU."""
    deterministic: bool = False
    """Only deterministic kernels on CUDA: a rerun gives bit-equal weights, some per cent slower. CPU runs always do."""


class JournalConfig(Section):
    """What the journal records beside each step; changes no result."""

    norms_every: PositiveInt | None = 100
    """Steps between records of the norms of the parameters and of their updates; null: none."""
    per_layer: bool = False
    """Those norms, and the gradient's, for every parameter."""


class PostTrainingConfig(Section):
    """Supervised fine-tuning: a trained network learns to answer. Each row of the data stands alone, and only what follows its question
    is learned: the loss is that of the template's columns after the first, and of what stands before and between them."""

    base: Place
    """The network that it begins with: a registered version (`models:/quickstart@champion`, `models:/quickstart/3`), or the folder of a
    checkpoint or of an export in Hugging Face's format. build-config pins it by its digest."""
    packing: bool = True
    """As many whole rows a window as fit, none of which sees another; false: one row a window."""


class OrchestrationConfig(Section):
    """What flows do of their own accord; nothing here is part of a run's identity."""

    auto_resume: Annotated[int, Field(ge=0, le=100)] = 3
    """How often a training that crashed, or lost its worker or its machine, is begun again from its last checkpoint, on any worker; so
    often also the flow that waits for it. 0: never."""


class Experiment(Section):
    """One entry of `params.yaml`, defaults filled in."""

    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42
    """Decides the split, the order of the data, the initial weights and the dropout."""
    model: ModelConfig = ModelConfig()
    data: DataConfig
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    storage: StorageConfig = StorageConfig()
    hardware: HardwareConfig = HardwareConfig()
    journal: JournalConfig = JournalConfig()
    orchestration: OrchestrationConfig = OrchestrationConfig()
    post_training: PostTrainingConfig | None = None
    """Begin with a trained network and teach it to answer; null: pre-train one from random weights."""

    @model_validator(mode="after")
    def _post_training_has_answers(self) -> Experiment:
        if self.post_training is None:
            return self
        if len(self.data.text_columns) < 2:
            raise ValueError("data.text_template: post-training needs a question and an answer: two columns or more")
        if self.data.cache:
            raise ValueError("data.cache: post-training keeps no cache of tokens; set it to false")
        if self.checkpoint.fork_of is not None:
            raise ValueError("checkpoint.fork_of: post-training begins with post_training.base; leave one of them out")
        return self

    @model_validator(mode="after")
    def _window_fits_context(self) -> Experiment:
        if self.data.max_length > self.model.context_length:
            raise ValueError(f"data.max_length ({self.data.max_length}) is longer than model.context_length ({self.model.context_length})")
        return self
