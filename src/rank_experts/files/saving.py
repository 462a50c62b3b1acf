"""Saving an adapter: PEFT's adapter_config.json, one safetensors file, and a model card.

How the bytes come onto the disk in one step is in `storage/pair.py`.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch.distributed as dist
from peft import PeftConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..config.config import RankExpertConfig
from ..layers.linear import adapted_layers
from ..layers.offloading import onloaded
from ..storage.pair import is_finite, write_pair
from .card import write_card
from .state import adapter_config, adapter_tensors, saved_modules


def save_rank_experts(
    model: nn.Module,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    save_embedding_layers: bool | str = "auto",
) -> None:
    """Save an adapter: `adapter_config.json` and `adapter_model.safetensors`, which PEFT reads too.

    The two files change in one step: a process that is killed, or a disk that is full, leaves the old adapter or the
    new one, never a mixture. Processes that save to one folder wait for each other. A model card, README.md, comes
    with them, unless the folder has one that we did not write or that was edited.

    In a distributed run the first process writes, and nobody waits: the first may be the only one that calls. Under
    FSDP2 and DeepSpeed's ZeRO-3 all processes must call, because each holds a part. Before another process reads the
    folder, wait (`torch.distributed.barrier()`, accelerate's `wait_for_everyone()`), as `Trainer` does by itself.

    Args:
        model: With the adapter, wrapped in a `PeftModel` or not.
        path: A folder, made where it is missing; files of an earlier save are replaced.
        adapter_name: Which adapter.
        save_embedding_layers: Write the model's whole embeddings too, trained or not; "auto": only where the
            vocabulary was resized. PEFT's argument of the same name, whose "auto" also counts an adapted `lm_head`.

    Raises:
        ValueError: The model has no such adapter, or the adapter has values that are not finite.
        OSError: The disk is full, or the folder cannot be written; what was there before is unchanged.

    Example:
        >>> save_rank_experts(model, "my-adapter")  # doctest: +SKIP
    """
    config, tensors = gather_adapter(model, path, adapter_name, save_embedding_layers)
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        return
    write_adapter(Path(path), config, tensors)


def gather_adapter(
    model: nn.Module, path: str | os.PathLike[str], adapter_name: str, save_embedding_layers: bool | str = "auto"
) -> tuple[RankExpertConfig, dict[str, Tensor]]:
    """Return what `save_rank_experts` writes, on every process: for `write_adapter`; `path` is for messages."""
    config = adapter_config(model, adapter_name)
    with _gathered(model), onloaded(*saved_modules(model)):
        tensors = {
            key: _whole(tensor.detach()).to("cpu").contiguous().clone()
            for key, tensor in adapter_tensors(model, adapter_name, save_embedding_layers)
        }
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise ValueError(
                f"{name} of adapter {adapter_name!r} has values that are not finite: the training diverged. Nothing is "
                f"written to {path}; go back to an earlier checkpoint."
            )
    return config, tensors


def write_adapter(folder: Path, config: RankExpertConfig, tensors: dict[str, Tensor]) -> None:
    """Write an adapter's two files in one step, and its model card.

    Args:
        folder: Made where it is missing.
        config: The adapter's.
        tensors: By the file's names, contiguous and on the CPU.

    Raises:
        OSError: The disk is full, or the folder cannot be written; what was there before is unchanged.
    """
    write_pair(folder, config_to_json(config), tensors)
    write_card(folder, config, tensors)


def _whole(tensor: Tensor) -> Tensor:
    # FSDP2 keeps a shard on each rank.
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _gathered(model: nn.Module) -> AbstractContextManager[None]:
    # DeepSpeed's ZeRO-3 leaves parameters empty between forwards.
    own = {id(p) for _, layer in adapted_layers(model) for p in layer.parameters()}
    parted = [p for p in model.parameters() if hasattr(p, "ds_id") and (p.requires_grad or id(p) in own)]
    return sys.modules["deepspeed"].zero.GatheredParameters(parted) if parted else nullcontext()


def config_to_json(config: PeftConfig) -> str:
    """Return what `adapter_config.json` holds: the fields, sorted, sets as sorted lists, inference_mode on.

    Patterns keep their order, which says which of two that match a module counts.
    """
    values = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    values["inference_mode"] = True
    return json.dumps(dict(sorted(values.items())), indent=2, default=str) + "\n"
