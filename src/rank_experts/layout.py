"""What the tensors of an adapter's file are called and how large they are: the promise of docs/file-format.md."""

from __future__ import annotations

import re

from .config import RankExpertConfig

PREFIX = "base_model.model."
"""PEFT's, before a layer's path."""

TENSOR_NAME = re.compile(re.escape(PREFIX) + r"(?P<path>.+)\.rank_expert_(?P<name>A|B|router\.\w+)")
"""The name of an adapted layer's tensor."""


def tensor_shapes(config: RankExpertConfig, r: int, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
    """Return name, as `TENSOR_NAME` has it, to shape of the tensors of one adapted layer.

    Args:
        config: The adapter's.
        r: The layer's ranks.
        d_in: Its inputs.
        d_out: Its outputs.

    Example:
        >>> tensor_shapes(RankExpertConfig.lora(), r=4, d_in=16, d_out=8)
        {'A': (4, 16), 'B': (8, 4)}
    """
    shapes: dict[str, tuple[int, ...]] = {"A": (r, d_in), "B": (d_out, r)}
    if config.router == "token":
        num_experts = r // config.expert_rank
        shapes |= {"router.weight": (num_experts, d_in), "router.balance_bias": (num_experts,)}
    elif config.router == "task":
        width = config.task_embedding_dim or d_in
        shapes["router.task_embedding"] = (len(config.tasks or ()), width)
        shapes |= {"router.gate_weight": (r, width), "router.gate_bias": (r,)}
        if width != d_in:
            shapes["router.projection"] = (width, d_in)
    return shapes
