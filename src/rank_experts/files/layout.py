"""What the tensors of an adapter's file are called and how large they are: the promise of docs/file-format.md."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from ..config.config import RankExpertConfig
from ..layers.adapter import adapter_shapes
from ..routing.statistics import LayerStatistics, layer_statistics
from ..tuner.settings import adapter_settings

PREFIX = "base_model.model."
"""PEFT's, before a layer's path."""

TENSOR_NAME = re.compile(re.escape(PREFIX) + r"(?P<path>.+)\.rank_experts\.(?P<name>\w+)")
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
    return adapter_shapes(adapter_settings(config, r, config.alpha), d_in, d_out)


def layers_of_tensors(
    tensors: Mapping[str, Tensor], config: RankExpertConfig, most_tasks: int | None = None
) -> list[LayerStatistics]:
    """Group an adapter's tensors by layer and read each layer's statistics off them.

    Args:
        tensors: By the file's names.
        config: The adapter's.
        most_tasks: Look at so many tasks, the first; None: at all.

    Raises:
        ValueError: A layer lacks a tensor, or its shapes do not fit together.
    """
    by_layer: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := TENSOR_NAME.fullmatch(name):
            by_layer.setdefault(match["path"], {})[match["name"]] = tensor
    for path, found in by_layer.items():
        _check_layer(path, {name: tuple(tensor.shape) for name, tensor in found.items()}, config)
    tasks = tuple(config.tasks or ())[:most_tasks]
    for found in by_layer.values():
        if "task_embedding" in found:
            found["task_embedding"] = found["task_embedding"][:most_tasks]
    ordered = sorted(by_layer, key=_natural)
    return [layer_statistics(path, by_layer[path], tasks=tasks) for path in ordered]


def _check_layer(path: str, shapes: dict[str, tuple[int, ...]], config: RankExpertConfig) -> None:
    r, d_in = shapes.get("A", (0, 0)) if len(shapes.get("A", ())) == 2 else (0, 0)
    d_out = shapes.get("B", (0,))[0] if shapes.get("B") else 0
    expected = tensor_shapes(config, r, d_in, d_out)
    if shapes != expected or not r:
        raise ValueError(
            f"The tensors of {path} do not fit together, or not the config: found {shapes}, expected {expected}."
        )


def _natural(path: str) -> list[tuple[int, int, str]]:
    numbers = [part.isascii() and part.isdigit() and len(part) < 20 for part in path.split(".")]
    return [(0, int(part), "") if number else (1, 0, part) for part, number in zip(path.split("."), numbers)]
