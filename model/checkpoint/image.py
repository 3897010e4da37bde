"""A safetensors file in memory: laid out once, filled at each checkpoint, written by a thread while training goes on.

Training waits only while tensors are copied into it. Its bytes are those that `safetensors.torch.save_file` writes; they are written here
because they have to be copied once and no more, and hashed on their way to the disk.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

_TYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
}
_PAGE = 4096
_PIECE = 16 << 20
"""Bytes that are hashed and written at once."""


class Image:
    """One file's bytes, with every tensor a view of them.

    Args:
        like: the tensors by name that it will hold; only their shapes and types count.
        pinned: page-locked memory, which a GPU copies to several times faster.
        metadata: text about the file, for its header.
    """

    def __init__(self, like: Mapping[str, Tensor], pinned: bool, metadata: Mapping[str, str] | None = None) -> None:
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        places: dict[str, tuple[int, int]] = {}
        end = 0
        for name in sorted(like, key=lambda name: (-like[name].element_size(), name)):
            begin, end = end, end + like[name].numel() * like[name].element_size()
            places[name] = (begin, end)
            header[name] = {"dtype": _TYPES[like[name].dtype], "shape": list(like[name].shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        self._bytes = torch.empty(start + end, dtype=torch.uint8, pin_memory=pinned)
        if not pinned:
            self._bytes.numpy()[start::_PAGE] = 0  # now, not when training waits for the first copy
        self._bytes[:start] = torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8)
        self.tensors = {
            name: self._bytes[start + begin : start + stop].view(like[name].dtype).view(like[name].shape)
            for name, (begin, stop) in places.items()
        }
        """By name; copy into them to fill the file."""

    def fits(self, like: Mapping[str, Tensor]) -> bool:
        """Whether it was laid out for such tensors."""
        return {name: (t.shape, t.dtype) for name, t in like.items()} == {name: (t.shape, t.dtype) for name, t in self.tensors.items()}

    def __iter__(self) -> Iterator[memoryview]:
        """The file's bytes, piece by piece."""
        view = self._bytes.numpy().data
        return (view[begin : begin + _PIECE] for begin in range(0, len(view), _PIECE))
