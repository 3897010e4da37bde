"""A file laid out in memory is the file that safetensors would write."""

import numpy as np
import pytest
import torch
from safetensors.torch import load, save_file

from model.checkpoint.image import Image

GENERATOR = torch.Generator().manual_seed(1)


def some(*shapes, dtype=torch.float32):
    return {f"tensor.{number}": torch.randn(shape, generator=GENERATOR).to(dtype) for number, shape in enumerate(shapes)}


def filled(tensors, **options):
    image = Image(tensors, pinned=False, **options)
    for name, tensor in tensors.items():
        image.tensors[name].copy_(tensor)
    return image


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
@pytest.mark.parametrize("shapes", [[(3, 5), (), (7,), (2, 3, 4)], [(1,)], [(0, 4), (2,)], [(2,)] * 12])
def test_its_bytes_are_those_of_safetensors(tmp_path, shapes, metadata):
    tensors = some(*shapes)
    save_file(tensors, tmp_path / "file", metadata=metadata)
    assert b"".join(filled(tensors, metadata=metadata)) == (tmp_path / "file").read_bytes()


def test_types_may_be_mixed(tmp_path):
    tensors = {
        **some((3,), (2, 2)),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "byte": torch.ones(3, dtype=torch.uint8),
    }
    found = load(b"".join(filled(tensors)))
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_it_is_filled_again_and_again():
    image = filled(some((4, 4)))
    second = some((4, 4))
    assert image.fits(second)
    assert not image.fits(some((4, 5)))
    assert not image.fits(some((4, 4), (1,)))
    image.tensors["tensor.0"].copy_(second["tensor.0"])
    assert torch.equal(load(b"".join(image))["tensor.0"], second["tensor.0"])


def test_a_large_one_comes_in_pieces():
    tensor = {"large": torch.from_numpy(np.arange(10_000_000, dtype=np.float32))}
    pieces = list(filled(tensor))
    assert len(pieces) > 1
    assert torch.equal(load(b"".join(pieces))["large"], tensor["large"])
