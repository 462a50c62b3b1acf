"""Running a model over a set of batches without training it: for calibration, pruning and their losses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..layers.offloading import device_of

Batches = Iterable[Mapping[str, Any]]
"""A `DataLoader` or a list: gives batches (argument name to tensor) each time that it is iterated over."""


def check_batches(batches: Any, name: str) -> None:
    """Check that a set of batches can be read as often as needed.

    Args:
        batches: What a caller passed.
        name: The argument's name, for the message.

    Raises:
        TypeError: Not iterable, or an iterator, which can be read only once.
    """
    if not isinstance(batches, Iterable) or isinstance(batches, Mapping):
        raise TypeError(f"{name} is a {type(batches).__name__}: expected a DataLoader or a list of batches.")
    if isinstance(batches, Iterator):
        raise TypeError(
            f"{name} is a {type(batches).__name__}, which can be read only once: expected a DataLoader or a list of "
            "batches, which are read again to measure the loss afterwards."
        )


@torch.no_grad()
def run_batches(model: nn.Module, batches: Batches, description: str, progress: bool = True) -> float | None:
    """Call the model on every batch, in evaluation mode, and return the mean loss.

    Args:
        model: Gets each batch as keyword arguments, on its own device.
        batches: See `Batches`.
        description: Names the pass on the progress bar.
        progress: Show the bar.

    Returns:
        The mean of `outputs.loss` over labels (-100 left out), or None where a batch has no labels or no loss.

    Raises:
        ValueError: There is no batch.
        TypeError: A batch is not a mapping.
    """
    device = device_of(model)
    total, weight, num_batches = 0.0, 0, 0
    has_loss = True
    with evaluation(model):
        for batch in tqdm(batches, desc=description, unit="batch", disable=not progress):
            if not isinstance(batch, Mapping):
                raise TypeError(
                    f"Batch {num_batches} is a {type(batch).__name__}: expected a mapping from the model's argument "
                    "names to tensors, as tokenizers and data collators make it."
                )
            outputs = model(**{name: _move(value, device) for name, value in batch.items()})
            num_batches += 1
            loss = getattr(outputs, "loss", None)
            if loss is None:
                has_loss = False
            elif has_loss:
                labels = batch.get("labels")
                count = int((labels != -100).sum()) if isinstance(labels, Tensor) else 1
                total, weight = total + float(loss) * count, weight + count
    if num_batches == 0:
        raise ValueError(f"{description}: there is no batch. Give a DataLoader or a list with at least one.")
    return total / weight if has_loss and weight else None


def _move(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode for a block, and each back into its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
