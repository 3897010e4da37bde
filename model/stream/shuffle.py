"""The shuffle: seeded permutations that are computed again whenever they are needed, so that nothing of them is ever saved."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_SLICES, _BLOCK = 0, 1


@dataclass(frozen=True)
class Slice:
    """A run of one file's training samples: those numbered `start` to `stop - 1`, counted within the file."""

    file: int
    """Index into the manifest's files."""
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Block:
    """Consecutive samples of a slice that are shuffled among each other, and how."""

    file: int
    start: int
    order: np.ndarray
    """The permutation: the k-th sample to be read is number `start + order[k]` of the file."""


def permutation(length: int, *key: int) -> np.ndarray:
    """A permutation of `range(length)` that `key` decides, int64. Sorts PCG64's raw output, which numpy promises never to change."""
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(length), kind="stable")


def epoch_blocks(slices: list[Slice], block_size: int, seed: int, epoch: int, lane: int, first: int) -> Iterator[tuple[int, Block]]:
    """A lane's epoch from the block that holds its sample number `first` on: slices in a random order, each block by block.

    Yields the number (within the lane's epoch) of each block's first sample, and the block.
    """
    number = 0
    for index in permutation(len(slices), seed, _SLICES, epoch, lane):
        part = slices[index]
        for start in range(part.start, part.stop, block_size):
            length = min(block_size, part.stop - start)
            if number + length > first:
                yield number, Block(part.file, start, permutation(length, seed, _BLOCK, epoch, part.file, start))
            number += length
