"""Gradient checkpointing: a call goes along into a checkpointed block, and its auxiliary losses come out of it.

Checkpointing runs a block again during the backward pass, when the call is gone and, on a GPU, in another thread.
`CheckpointInCall` takes the call along into the block and returns the block's auxiliary losses as outputs of it, so
that their gradients are exact in both of torch's modes; what the second run reports is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .call import Call, current_call
from .scope import RoutingScope


class CheckpointInCall:
    """A checkpoint function that takes the current call along into the block and into its recomputation.

    Args:
        checkpoint: torch's, with its options bound, as transformers keeps it in `_gradient_checkpointing_func`.
        scope: Whose calls to take along.
    """

    def __init__(self, checkpoint: Callable[..., Any], scope: RoutingScope) -> None:
        self.checkpoint = checkpoint
        self.scope = scope

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint `function(*args)` and return what it returns."""
        call = current_call(self.scope)
        if call is None:
            return self.checkpoint(function, *args, **kwargs)
        runs: list[tuple[Call, bool]] = []

        def run(*inner_args: Any, **inner_kwargs: Any) -> tuple[Any, ...]:
            # The observers come along into the recomputation, which must save what the first run saved: a layer that
            # is watched computes more. What it reports then, `telling.tell` drops.
            with call.fork() as own:
                outputs = function(*inner_args, **inner_kwargs)
            is_tuple = isinstance(outputs, tuple)
            runs.append((own, is_tuple))
            losses = tuple(loss for _, loss in own.losses)
            # Flat, because reentrant checkpointing follows gradients only through a flat tuple.
            return (*outputs, *losses) if is_tuple else (outputs, *losses)

        returned = self.checkpoint(run, *args, **kwargs)
        first, is_tuple = runs[0]
        num_outputs = len(returned) - len(first.losses)
        call.loads.extend(first.loads)
        call.losses.extend((adapter, loss) for (adapter, _), loss in zip(first.losses, returned[num_outputs:]))
        return returned[:num_outputs] if is_tuple else returned[0]


def bind_checkpointing(module: torch.nn.Module, scope: RoutingScope) -> None:
    """Make every checkpointed block of a model take the scope's calls along; harmless where done already.

    Knows the two places where a checkpoint function is kept: transformers' `_gradient_checkpointing_func` and the
    `checkpoint_fn` of torch's CheckpointWrapper, which accelerate uses for FSDP.

    Looks at every forward, because checkpointing may be turned on at any time, and not below adapted layers, where
    nothing is checkpointed that would need a call, and most of a mixture's modules are.
    """
    for block in _blocks(module):
        for name in ("_gradient_checkpointing_func", "checkpoint_fn"):
            checkpoint = block.__dict__.get(name)
            if checkpoint is not None and not isinstance(checkpoint, CheckpointInCall):
                setattr(block, name, CheckpointInCall(checkpoint, scope))


def _blocks(module: torch.nn.Module) -> list[torch.nn.Module]:
    # All modules but those below adapted layers, which hold their scope.
    blocks = [module]
    for block in blocks:
        if not isinstance(block.__dict__.get("scope"), RoutingScope):
            blocks += [child for child in block._modules.values() if child is not None]
    return blocks


def unbind_checkpointing(module: torch.nn.Module) -> None:
    """Put the original checkpoint functions back."""
    for block in module.modules():
        for name in ("_gradient_checkpointing_func", "checkpoint_fn"):
            if isinstance(checkpoint := block.__dict__.get(name), CheckpointInCall):
                setattr(block, name, checkpoint.checkpoint)
