"""Which adapters take part in a model's first training calls.

An adapter of a layer that nobody calls learns nothing, and no error says so: its layer's weight is read by a fused
kernel, or its part of the model stands idle. It is looked for once; afterwards a call costs nothing more.
"""

from __future__ import annotations

import torch
from torch import nn

from ..messages import warn_once
from .scope import Place, RoutingScope

CALLS = 8
"""How many training calls are looked at: a part that only some batches need should have had its turn."""


class FirstCalls:
    """What is known of the first training calls; a scope has it until they are over.

    Attributes:
        used: (layer's path, adapter) of what took part so far.
        count: Calls so far.
    """

    def __init__(self) -> None:
        self.used: set[tuple[str, str]] = set()
        self.count = 0


def note_use(place: Place) -> None:
    """Note that an adapter takes part in a training call."""
    # A compiled forward leaves no notes, and `end_call` judges no model that has one.
    if not torch.compiler.is_compiling() and (first := place.scope.first_calls) is not None:
        first.used.add((place.path, place.adapter))


def end_call(model: nn.Module, scope: RoutingScope) -> None:
    """Count a training call of a model and, after the last that is looked at, name the adapters that took no part."""
    if torch.compiler.is_compiling() or (first := scope.first_calls) is None:
        return
    first.count += 1
    if first.count < CALLS:
        return
    scope.first_calls = None
    if any(_is_compiled(module) for module in model.modules()):
        return
    unused = [
        place.path
        for module in model.modules()
        if isinstance(place := getattr(module, "place", None), Place)
        and (place.path, place.adapter) not in first.used
        and module.training
        and any(parameter.requires_grad for parameter in module.parameters(recurse=False))
    ]
    if unused:
        few = ", ".join(unused[:5]) + (f" and {len(unused) - 5} more" if len(unused) > 5 else "")
        warn_once(
            f"Adapters that took no part in the first {CALLS} training calls of {type(model).__name__}: {few}. Nothing "
            "calls their layers, or not in these batches: where a layer's weight is only read, its adapter learns "
            "nothing; leave it out with exclude_modules."
        )


def _is_compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None or "_orig_mod" in module._modules
