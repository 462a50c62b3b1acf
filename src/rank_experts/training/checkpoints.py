"""What a checkpoint holds: the adapter alone, or a whole model and what it says of its adapters and heads.

An adapter's own folder has its config. Where more than an adapter is trained, or FSDP or DeepSpeed write the
checkpoint, there are tensors alone, and tasks in another order or another alpha would fit them as well.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from ..config.config import RankExpertConfig
from ..config.equality import check_same
from ..files.embeddings import peft_tensors
from ..files.saving import config_to_json
from ..layers.linear import adapted_layers
from ..storage.pair import CONFIG_FILE
from .heads import MultiTaskClassifier

CONFIGS_FILE = "rank_experts_configs.json"
"""Beside the tensors: "adapters", name to config, and "heads", as in `heads.json`."""


def write_configs(model: nn.Module, folder: Path) -> None:
    """Write what a model's adapters and heads compute into a checkpoint that does not say it."""
    configs = _configs(model)
    if configs and not (folder / CONFIG_FILE).exists():
        adapters = {name: json.loads(config_to_json(config)) for name, config in configs.items()}
        text = json.dumps({"adapters": adapters, "heads": _heads(model)}, indent=2)
        (folder / CONFIGS_FILE).write_text(text + "\n", encoding="utf-8")


def check_configs(model: nn.Module, folder: Path) -> None:
    """Refuse a checkpoint whose adapters or heads compute something else than the model's; one without configs passes.

    Raises:
        ValueError: An adapter is missing, or something differs that the tensors do not show.
    """
    file = folder / CONFIGS_FILE
    if not file.exists():
        return
    saved, own = json.loads(file.read_text(encoding="utf-8")), _configs(model)
    for name, fields in saved["adapters"].items():
        if name not in own:
            raise ValueError(f"{folder} holds an adapter {name!r}; the model has {sorted(own)}. Nothing was loaded.")
        check_same(folder, RankExpertConfig.from_bytes(file, json.dumps(fields).encode()), own[name], name)
    # As text, because the order of the tasks counts.
    if json.dumps(saved["heads"]) != json.dumps(heads := _heads(model)):
        raise ValueError(
            f"{folder} was saved with the tasks' heads {saved['heads']}; the model has {heads}, and the order counts "
            "too. Nothing was loaded."
        )


def owner_of_all_that_trains(model: nn.Module) -> nn.Module | None:
    """Return the module that owns the adapter, where the adapter (and heads) are all that is trained; else None."""
    if isinstance(model, PeftModel):
        return None  # It saves its adapter itself.
    owner = model.encoder if isinstance(model, MultiTaskClassifier) else model
    if not any(isinstance(config, RankExpertConfig) for config in getattr(owner, "peft_config", {}).values()):
        return None
    saved = list(peft_tensors(owner, active_adapter(owner)).values())
    saved += list(model.heads.parameters()) if isinstance(model, MultiTaskClassifier) else []
    places = {tensor.data_ptr() for tensor in saved}
    return owner if all(p.data_ptr() in places for p in model.parameters() if p.requires_grad) else None


def active_adapter(owner: nn.Module) -> str:
    """Return the name of the one adapter that is active.

    Raises:
        ValueError: Several are: a checkpoint holds one.
    """
    names = {name for _, layer in adapted_layers(owner) for name in layer.active_adapters}
    if len(names) != 1:
        raise ValueError(f"{sorted(names)} are active: a checkpoint holds one adapter. Train one, or wrap a PeftModel.")
    return names.pop()


def _configs(model: nn.Module) -> dict[str, RankExpertConfig]:
    found: dict[str, RankExpertConfig] = {}
    for module in model.modules():
        configs: dict[str, Any] = getattr(module, "peft_config", None) or {}
        found |= {name: config for name, config in configs.items() if isinstance(config, RankExpertConfig)}
    return found


def _heads(model: nn.Module) -> dict[str, Any] | None:
    return model.description() if isinstance(model, MultiTaskClassifier) else None
