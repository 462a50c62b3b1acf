"""An adapter as a model holds it: its config, and its tensors under the names that the file has for them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..config.config import RankExpertConfig
from ..layers.linear import adapted_layers
from ..messages import nearest
from .embeddings import peft_tensors
from .layout import PREFIX


def adapter_config(model: nn.Module, adapter_name: str) -> RankExpertConfig:
    """Return the config of one of a model's rank-expert adapters, or raise a `ValueError` that lists them."""
    configs = getattr(model, "peft_config", None) or {}
    config = configs.get(adapter_name)
    if not isinstance(config, RankExpertConfig):
        known = [name for name, known in configs.items() if isinstance(known, RankExpertConfig)]
        raise ValueError(
            f"{type(model).__name__} has no rank-expert adapter {adapter_name!r}; it has {known}."
            f"{nearest(adapter_name, known)}"
        )
    return config


def adapter_tensors(
    model: nn.Module, adapter_name: str, save_embedding_layers: bool | str = "auto"
) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of all that an adapter's file holds: its own, trained biases, modules_to_save."""
    for key, tensor in peft_tensors(model, adapter_name, save_embedding_layers).items():
        if not without_adapter(key):
            yield key if key.startswith(PREFIX) else PREFIX + key, tensor


def without_adapter(name: str) -> str:
    """Return a tensor's name without the name of the adapter in it, or "" where there is none."""
    # PEFT 0.19 writes the model's other adapters beside the one that is saved, with their names in the tensors' names.
    found = re.fullmatch(r"(.*\.rank_experts\.)[^.]+\.(\w+)", name)
    return "" if found is None else found[1] + found[2]


def saved_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a model that hold what an adapter's file holds: adapted layers and modules_to_save."""
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    return [*(layer for _, layer in adapted_layers(model)), *wrappers]
