"""What the op is told of a base layer: a function, and how much of it the op may do itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.pytorch_utils import Conv1D

from ..ops import Base
from ..ops.operands import PLAIN


class Features(NamedTuple):
    """What a base layer must take and return: its place in the model, for messages, d_in and d_out."""

    path: str
    d_in: int
    d_out: int


def base_of(
    layer: nn.Module, features: Features, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> Base:
    """Describe a base layer to the op.

    Args:
        layer: The base layer.
        features: What it must take and return.
        args: What it takes beside its input.
        kwargs: Likewise.

    Returns:
        A function of x (…, d_in) alone. Of a plain layer that nobody watches, whose output nobody else can hold on to,
        also the weight, where it is frozen: the op then differentiates through the layer itself. What another layer
        returns is held against its numbers of features, because the op's kernels write as many.

    Example:
        >>> base_of(nn.Linear(4, 2).requires_grad_(False), Features("proj", 4, 2)).weight.shape
        torch.Size([2, 4])
    """
    if args or kwargs or type(layer) not in (nn.Linear, Conv1D) or not _is_unwatched(layer):
        return Base(_checked(layer, features, args, kwargs or {}))
    weight, bias = layer.weight, layer.bias
    transposed = type(layer) is Conv1D
    if weight.requires_grad or type(weight) not in PLAIN:
        return Base(layer.__call__, None, transposed, True)
    if bias is not None and (bias.requires_grad or type(bias) not in PLAIN):
        return Base(layer.__call__, None, transposed, True)
    return Base(layer.__call__, weight, transposed, True, bias)  # type: ignore[arg-type]


def _checked(
    layer: nn.Module, features: Features, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[Tensor], Tensor]:
    # A layer whose output is looked at: a block-diagonal one calls itself a linear layer too, with other features.
    # A function, and no tuple with the layer in it: accelerate's hook moves what it finds in an adapter's arguments.
    path, d_in, d_out = features

    def apply(x: Tensor) -> Tensor:
        y = layer(x, *args, **kwargs)
        if x.shape[-1] != d_in or y.shape[:-1] != x.shape[:-1] or y.shape[-1] != d_out:
            raise ValueError(
                f"{path} ({type(layer).__name__}) returned {tuple(y.shape)} for an input of shape {tuple(x.shape)}: "
                f"expected (…, {d_in}) to (…, {d_out}) of a layer with an adapter. Leave it out (exclude_modules)."
            )
        return y

    return apply


def _is_unwatched(module: nn.Module) -> bool:
    return (
        "forward" not in module.__dict__
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and not torch_module._global_forward_hooks
        and not torch_module._global_forward_pre_hooks
        and not torch_module._global_backward_hooks
        and not torch_module._global_backward_pre_hooks
    )
