"""Which device, and that it multiplies exactly."""

import pytest
import torch

from model.device import pick_device, use_fast_exact_products
from model.errors import UserError


def test_products_of_fp32_matrices_are_fp32():
    pick_device("cpu")
    a = torch.randn(300, 500, generator=torch.Generator().manual_seed(0))
    exact = a.double() @ a.double().T
    assert ((a @ a.T).double() - exact).abs().max() < 1e-3
    assert ((a.bfloat16() @ a.bfloat16().T).double() - exact).abs().max() > 1e-2


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="torch before 2.9")
def test_a_cpu_that_would_round_to_bf16_is_left_alone(monkeypatch):
    """With matrix units (AMX) the setting that is fast here rounds: the products must not be allowed to."""
    products, matmul = torch.backends.mkldnn.matmul, torch.Tensor.__matmul__
    before, products.fp32_precision = products.fp32_precision, "ieee"

    def rounding(a, b):
        if products.fp32_precision == "bf16" and a.dtype == torch.float32:
            a, b = a.bfloat16().float(), b.bfloat16().float()
        return matmul(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    try:
        use_fast_exact_products.__wrapped__()
        assert products.fp32_precision == "ieee"
    finally:
        products.fp32_precision = before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_device_that_is_not_there_is_named():
    assert pick_device("auto").type == "cpu"
    with pytest.raises(UserError, match=r"hardware\.device: cuda is not there"):
        pick_device("cuda")
