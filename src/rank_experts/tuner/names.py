"""What an adapter may be called, and what a model's modules may not be called.

An adapter's name becomes a part of its tensors' names, `<layer>.rank_experts.<adapter>.A`. PEFT, TRL and torch find
adapters by such names again: a name that also means something else makes them take one tensor for another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

PREFIX = "rank_experts"
TENSORS = (
    "A",
    "B",
    "router_weight",
    "balance_bias",
    "task_embedding",
    "gate_weight",
    "gate_bias",
    "projection",
)
"""What `RankExpertAdapter` calls its tensors."""

_PEFT_MODEL = ("base_model", "model")
_WRAPPERS = (PREFIX, "base_layer", "original_module", "modules_to_save", "__base__")


def check_adapter_name(model: nn.Module, adapter_name: str) -> None:
    """Refuse a name that would make an adapter's tensors ambiguous. Changes nothing.

    Args:
        model: What the adapter is for, with or without adapters.
        adapter_name: The new adapter's name.

    Raises:
        ValueError: The name is empty, has a dot, is an attribute of torch's `nn.ModuleDict` or the name of a tensor of
            an adapter; or a module of the model is called as the method is.

    Example:
        >>> check_adapter_name(nn.Linear(2, 2), "v1.0")
        Traceback (most recent call last):
        ...
        ValueError: An adapter cannot be called 'v1.0': torch allows no dot in a module's name. Choose another name.
    """
    if reason := _never(adapter_name):
        raise ValueError(f"An adapter cannot be called {adapter_name!r}: {reason}. Choose another name.")
    for name in _own_names(model):
        if PREFIX in name:
            raise ValueError(
                f"{name} of {type(model).__name__} has {PREFIX!r} in its name, by which PEFT finds the adapters' "
                "tensors. Rename that module before adapting the model."
            )


def check_apart(paths: Mapping[str, Iterable[str]]) -> None:
    """Refuse adapters of which one is called as a part of another's modules' paths.

    PEFT saves an adapter by leaving out every tensor that has another adapter's name among the parts of its own.

    Args:
        paths: Adapter name to the places in the model of what the adapter adapts or trains.

    Raises:
        ValueError: A name and a path meet.

    Example:
        >>> check_apart({"first": ["layers.0.mlp"], "second": ["layers.0.mlp"]})
    """
    for adapter, own in paths.items():
        for path in own:
            for name in {*_PEFT_MODEL, *path.split(".")} & paths.keys() - {adapter}:
                where = ".".join((*_PEFT_MODEL, path))
                raise ValueError(
                    f"Beside adapter {adapter!r} none can be called {name!r}, a part of {where}: "
                    "PEFT would leave that module out of the other's file. Choose another adapter_name."
                )


def _never(name: str) -> str:
    if not isinstance(name, str) or not name:
        return "expected a string that is not empty"
    if "." in name:
        return "torch allows no dot in a module's name"
    if name in TENSORS:
        return "a tensor of each adapter is called so"
    if name in _WRAPPERS:
        return "PEFT or this library uses the name for something else"
    if hasattr(nn.ModuleDict(), name):
        return f"nn.ModuleDict has an attribute {name}"
    return ""


def _own_names(model: nn.Module) -> Iterator[str]:
    # The names of the model's own modules and tensors, without what adapters have put between.
    adapted = [path + "." for path, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for path, module in model.named_modules():
        if not any(path.startswith(prefix) for prefix in adapted):
            yield from (f"{path}.{name}" if path else name for name in (*module._parameters, *module._buffers))
            yield path
