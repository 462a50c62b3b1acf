"""Reading and replacing the weight of a base layer, plain or quantised.

Only merging needs it; forward and backward call the base layer and never look at its weight. bitsandbytes and torchao
are looked for among the modules that are imported already: a model that is quantised with one has imported it.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..messages import warn_once

_PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_READABLE = (None, "bitsandbytes 8-bit", "bitsandbytes 4-bit", "torchao")


def quantisation(layer: Any) -> str | None:
    """Name what a base layer is quantised with.

    Returns:
        None for a layer with a floating-point weight; "bitsandbytes 8-bit", "bitsandbytes 4-bit" or "torchao", which
        can be read and replaced; else the class's name.

    Example:
        >>> quantisation(nn.Linear(2, 2)) is None
        True
    """
    if (bnb := sys.modules.get("bitsandbytes")) is not None:
        if isinstance(layer, bnb.nn.Linear8bitLt):
            return "bitsandbytes 8-bit"
        if isinstance(layer, bnb.nn.Linear4bit):
            return "bitsandbytes 4-bit"
    weight: Any = getattr(layer, "weight", None)
    if type(weight).__module__.startswith("torchao."):
        return "torchao"
    # Else a tensor of another library, eight bits with scales beside them, or a weight under another name.
    plain = type(weight) in (Tensor, nn.Parameter) and weight.dtype in _PLAIN
    return None if plain else type(layer).__name__


def check_readable(layer: Any, path: str) -> None:
    """Check that `read_weight` can read a base layer's weight.

    Raises:
        TypeError: It is quantised in a way that cannot be read back; the message says what to do.
    """
    kind = quantisation(layer)
    if kind in _READABLE and (kind != "torchao" or hasattr(layer.weight, "dequantize")):
        return
    weight: Any = getattr(layer, "weight", None)
    held = f"a weight of {weight.dtype}" if isinstance(weight, Tensor) else "no floating-point weight"
    raise TypeError(
        f"{path} is a {type(layer).__module__}.{type(layer).__name__} with {held}, which rank-experts cannot "
        "dequantise, so nothing can be merged into it. Keep the adapter apart, or load the base model without "
        "quantisation and merge there."
    )


def read_weight(layer: Any, path: str) -> Tensor:
    """Return a base layer's weight, dequantised where it is quantised.

    Args:
        layer: The base layer.
        path: Its place in the model, for messages.

    Raises:
        TypeError: The weight is quantised in a way that cannot be read back.

    Example:
        >>> read_weight(nn.Linear(2, 3), "proj").shape
        torch.Size([3, 2])
    """
    check_readable(layer, path)
    kind = quantisation(layer)
    if kind is None:
        return layer.weight.data
    if kind == "bitsandbytes 8-bit":
        from peft.utils.integrations import dequantize_bnb_weight

        return dequantize_bnb_weight(layer.weight, state=layer.state)
    if kind == "bitsandbytes 4-bit":
        functional = sys.modules["bitsandbytes"].functional
        data, state = layer.weight.data, layer.weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            # A forward on some CPUs reorders the weight and its scales; as they stand, they give nonsense.
            scales = state.absmax
            data, state = functional._convert_weight_packed_for_cpu_inverse(data, copy.deepcopy(state))
            if not state.nested:
                state.absmax = scales.T.reshape(-1).float()  # the inverse leaves these as they are
        return functional.dequantize_4bit(data, state)
    return layer.weight.dequantize()


def write_weight(layer: Any, weight: Tensor) -> None:
    """Replace a base layer's weight by one of the same shape, which `read_weight` can read.

    A plain weight changes in place, so that whatever shares it keeps sharing it. bitsandbytes quantises the new
    weight again, which rounds it. A torchao layer keeps it in floating point.
    """
    kind = quantisation(layer)
    if kind is None:
        layer.weight.data.copy_(weight)
        return
    warn_once(
        f"Merging into weights quantised with {kind}: "
        + (
            "they stay in floating point from now on, which takes more memory."
            if kind == "torchao"
            else "the sum is quantised again, so outputs differ a little from those of the separate adapter."
        )
    )
    if kind == "torchao":
        layer.weight = nn.Parameter(weight, requires_grad=False)
        return
    old = layer.weight
    if kind == "bitsandbytes 8-bit":
        kept = {"has_fp16_weights": old.has_fp16_weights}
        layer.weight = type(old)(weight.cpu(), requires_grad=False, **kept).to(old.device)
        layer.state.reset_grads()
    else:
        names = ("blocksize", "compress_statistics", "quant_type", "quant_storage", "module")
        kept = {name: getattr(old, name) for name in names if hasattr(old, name)}
        layer.weight = type(old)(weight.cpu(), requires_grad=False, **kept).to(old.device)


def keep_weight(layer: Any) -> Any:
    """Return what `restore_weight` needs to put a base layer's weight back, bit by bit."""
    kind = quantisation(layer)
    if kind is None:
        return layer.weight.data.clone()
    # Quantised weights are replaced, never written to.
    return layer.weight, (layer.state.CB, layer.state.SCB) if kind == "bitsandbytes 8-bit" else None


@torch.no_grad()
def restore_weight(layer: Any, kept: Any) -> None:
    """Put back the weight that `keep_weight` kept."""
    if isinstance(kept, Tensor):
        layer.weight.data.copy_(kept)
        return
    layer.weight, state = kept
    if state is not None:
        layer.state.reset_grads()
        layer.state.CB, layer.state.SCB = state
