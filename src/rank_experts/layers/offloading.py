"""Where tensors lie that accelerate has offloaded, and how to look at them outside of a forward.

accelerate's hook (`cpu_offload`, `disk_offload`, `dispatch_model`, a `device_map` with too little memory) leaves a
module's tensors on the meta device and brings them when the module is called. Whoever reads or writes them otherwise
does it within `onloaded`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from accelerate.hooks import AlignDevicesHook
from torch import Tensor, nn


@contextmanager
def onloaded(*modules: nn.Module, keep: bool = False) -> Iterator[None]:
    """Bring the offloaded tensors of modules, and of what is in them, for a block.

    Args:
        modules: Of any kind; those that are not offloaded stay as they are.
        keep: The block changes tensors: what it leaves is brought from then on. Without it, changes are lost.

    Example:
        >>> with onloaded(nn.Linear(2, 2)):
        ...     pass
    """
    loaded: list[tuple[nn.Module, AlignDevicesHook]] = []
    try:
        for module in (inner for outer in modules for inner in outer.modules()):
            hook = _hook(module)
            if hook is not None and any(tensor.is_meta for _, tensor in _own_tensors(module)):
                hook.pre_forward(module)
                loaded.append((module, hook))
        yield
    finally:
        for module, hook in loaded:
            if keep:
                # In memory, wherever it came from: what lies on the disk may be the base model's own file.
                hook.weights_map = {name: tensor.detach().to("cpu") for name, tensor in _own_tensors(module)}
            hook.post_forward(module, torch.tensor([]))


def holder(layer: nn.Module) -> nn.Module:
    """Return the module that owns a base layer's weight: the layer, or the experts of which it is a slice.

    Example:
        >>> holder(nn.Linear(2, 2))
        Linear(in_features=2, out_features=2, bias=True)
    """
    return getattr(layer, "experts", layer)


def is_offloaded(module: nn.Module) -> bool:
    """Say whether any tensor of a module, or of what is in it, is brought only when it is called.

    Example:
        >>> is_offloaded(nn.Linear(2, 2))
        False
    """
    return any(_hook(inner) is not None for inner in module.modules())


def device_of(module: nn.Module) -> torch.device:
    """Return where a module computes: its first parameter's device or, where that is offloaded, the hook's.

    Example:
        >>> device_of(nn.Linear(2, 2))
        device(type='cpu')
    """
    for inner in module.modules():
        for parameter in inner.parameters(recurse=False):
            if not parameter.is_meta:
                return parameter.device
            if (hook := _hook(inner)) is not None:
                return torch.empty(0, device=hook.execution_device).device
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def check_in_place(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Refuse to change the tensors of offloaded modules, given with their paths, with a `ValueError`."""
    for path, module in modules:
        if is_offloaded(module):
            raise ValueError(
                f"{path}: accelerate has offloaded the adapter's tensors, which can be read and not be replaced there. "
                'Load the model without offloading (no device_map with "cpu" or "disk", no cpu_offload) for this.'
            )


def _hook(module: nn.Module) -> AlignDevicesHook | None:
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):  # accelerate's SequentialHook has several
        if isinstance(one, AlignDevicesHook) and one.offload:
            return one
    return None


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)
