"""Whether an adapter on the disk computes what the adapter of a model does, field by field.

Shapes do not say it: tasks in another order, another alpha or another pattern have the same tensors. A field that is
not listed here must be equal, so that a new one is compared until somebody decides otherwise.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from .config import RankExpertConfig
from .reading import DESCRIPTIVE

_TRAINING = {
    "balance_coef",
    "balance_rate",
    "contrastive_coef",
    "dropout",
    "init_weights",
    "load_balance",
}
"""What a training may change when it goes on: the same tensors compute the same."""

_SAID_BY_NAMES = {
    "bias",
    "exclude_modules",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "target_modules",
    "target_parameters",
}
"""What the names of the tensors say, however it was written."""


def check_same(folder: Path, saved: RankExpertConfig, own: RankExpertConfig, adapter_name: str) -> None:
    """Refuse tensors for an adapter whose config makes something else of them.

    Args:
        folder: Where they lie, for messages.
        saved: The config that lies beside them.
        own: The config of the model's adapter.
        adapter_name: The adapter's name, for messages.

    Raises:
        ValueError: A field differs; the order of tasks and of patterns counts.
    """
    for field in fields(RankExpertConfig):
        if field.name in DESCRIPTIVE | _TRAINING | _SAID_BY_NAMES:
            continue
        found, expected = getattr(saved, field.name), getattr(own, field.name)
        # Of two patterns that match a module the first one counts.
        ordered = [list(value.items()) if isinstance(value, dict) else value for value in (found, expected)]
        if ordered[0] != ordered[1]:
            raise ValueError(
                f"{folder} was saved with {field.name}={found!r}; adapter {adapter_name!r} of the model has "
                f"{field.name}={expected!r}, and would make something else of the same tensors. Nothing was loaded. "
                f"Give the model an adapter with {field.name}={found!r}, or load the folder as it is into a fresh "
                "model (load_rank_experts)."
            )
