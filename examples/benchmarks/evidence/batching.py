"""Batches of texts that are about equally long, so that little is padded."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

POOL = 16
"""Batches whose rows are sorted by length before they are cut."""


def batches(lengths: Tensor, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Yield `steps` batches of rows, every row once an epoch; those of a batch are about equally long.

    Args:
        lengths: (N,) tokens of each row.
        size: Rows a batch.
        steps: Batches.
        seed: Of the order, which is the same for every method.
    """
    generator = torch.Generator().manual_seed(seed)
    given = 0
    while True:
        order = torch.randperm(len(lengths), generator=generator)
        pools = [pool[lengths[pool].argsort(stable=True)] for pool in order.split(size * POOL)]
        cut = [batch for pool in pools for batch in pool.split(size) if len(batch) == size]
        for place in torch.randperm(len(cut), generator=generator).tolist():
            if given == steps:
                return
            given += 1
            yield cut[place]
