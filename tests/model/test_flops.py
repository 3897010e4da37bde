"""The operations and peaks that MFU is made of: counted, published, and refused where nothing is known."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.config import ModelConfig
from model.flops import flops_per_token, mfu, parameters_by_kind, peak_flops
from model.gpt2 import GPT2


def test_the_parameters_of_gpt2_small_by_kind() -> None:
    found = parameters_by_kind(ModelConfig(preset="small"))
    assert (found.total, found.tokens, found.positions) == (124_439_808, 50_257 * 768, 1024 * 768)


@pytest.mark.parametrize(("preset", "millions"), [("small", 124), ("medium", 355), ("large", 774), ("xl", 1558)])
def test_published_sizes(preset: str, millions: int) -> None:
    assert parameters_by_kind(ModelConfig.model_validate({"preset": preset})).total / 1e6 == pytest.approx(millions, abs=0.5)


def test_the_kinds_are_those_that_the_network_has() -> None:
    config = ModelConfig(preset="nano", n_layer=3, vocab_size=500)
    named = dict(GPT2(config).named_parameters())
    blocks = [parameter for name, parameter in named.items() if name.startswith("h.") and parameter.dim() == 2]
    found = parameters_by_kind(config)
    assert found.tokens == named["wte.weight"].numel()
    assert found.positions == named["wpe.weight"].numel()
    assert found.matrices == sum(parameter.numel() for parameter in blocks)
    assert found.vectors == sum(parameter.numel() for parameter in named.values() if parameter.dim() == 1)


@pytest.mark.parametrize(("window", "mflop"), [(1024, 855.2), (512, 798.5)])
def test_gpt2_small_takes_what_its_peers_count(window: int, mflop: float) -> None:
    assert flops_per_token(ModelConfig(preset="small"), window) / 1e6 == pytest.approx(mflop, abs=0.05)


def test_the_formula_is_what_torch_counts() -> None:
    """6·N counts a multiplication and an addition for each weight, once forward and twice backward; torch counts the matrices alone, so
    biases and LayerNorms (vectors) are the formula's only surplus. Attention is counted by torch as if it were not causal, too."""
    config, windows, window = ModelConfig(preset="nano", n_layer=3, n_embd=48, n_head=4, vocab_size=700, dropout=0.0), 2, 64
    network = GPT2(config).train()
    tokens_BT = torch.randint(0, config.vocab_size, (windows, window), generator=torch.Generator().manual_seed(0))
    # SDPA's math kernel is matrix products that the counter knows; a plain head, because torch's fused one hides its products from it
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network.logits(network.hidden(tokens_BT)).sum().backward()
    surplus = 6 * parameters_by_kind(config).vectors
    assert counter.get_total_flops() / (windows * window) == flops_per_token(config, window) - surplus


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362.05e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("NVIDIA GeForce RTX 3090 Ti", 80e12),
        ("NVIDIA RTX 6000 Ada Generation", 364.2e12),
        ("h100", 989.4e12),
    ],
)
def test_the_dense_peak_of_a_gpu_by_the_name_its_driver_gives(name: str, bf16: float) -> None:
    assert peak_flops(name, "bf16") == bf16


def test_tf32_and_fp32_are_slower() -> None:
    assert (peak_flops("NVIDIA A100-SXM4-40GB", "tf32"), peak_flops("NVIDIA A100-SXM4-40GB", "fp32")) == (156e12, 19.5e12)


@pytest.mark.parametrize("name", ["Tesla T4", "Tesla V100-SXM2-16GB"])
def test_a_gpu_without_bf16_units_has_no_bf16_peak(name: str) -> None:
    assert peak_flops(name, "bf16") is None
    assert peak_flops(name, "tf32") is None
    assert peak_flops(name, "fp32") is not None


@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "AMD EPYC 7B13",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4080 SUPER",
        "NVIDIA H20",
        "NVIDIA A10G",
        "",
    ],
)
def test_no_peak_is_better_than_that_of_another_gpu(name: str) -> None:
    assert peak_flops(name, "bf16") is None


def test_mfu() -> None:
    peak, each = 989.4e12, flops_per_token(ModelConfig(preset="small"), 1024)
    assert mfu(1_157_000, each, peak) == pytest.approx(1.0, abs=0.001)
    assert mfu(1_157_000, each, peak, ranks=8) == pytest.approx(1 / 8, abs=0.001)
    assert mfu(1_157_000, each, None) is None


def test_sizes_are_known_without_torch() -> None:
    program = "import sys, model.flops, model.memory, tasks.plan; print(sorted({'torch', 'pyarrow', 'mlflow', 'dvc'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
