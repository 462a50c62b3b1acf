"""From routed to static: merging an adapter into the base weights, and back."""

from __future__ import annotations

from peft import PeftModel
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..calls.boundary import uninstall
from ..layers.experts import ExpertProjection, RankExpertExperts
from ..layers.linear import RankExpertLinear, adapted_layers
from ..tuner.tuner import merging


def merge_rank_experts(
    model: nn.Module,
    task: str | None = None,
    *,
    adapter_names: list[str] | None = None,
    safe_merge: bool = False,
    unload: bool = False,
) -> nn.Module:
    """Add the adapters' updates to the base weights, in place: W = W0 + s · B diag(g) A.

    A dense adapter merges exactly, a task-routed one exactly for one task. The layers keep their adapters and a copy
    of the base weights (as much memory as those take), from which `unmerge_rank_experts` restores every bit.

    Args:
        model: With adapters.
        task: The task to merge for; may be left out where an adapter knows exactly one, or has no task router.
        adapter_names: Which adapters; None: the active ones.
        safe_merge: Refuse where a merged weight would not be finite.
        unload: Remove the adapters afterwards: what is left is the base model with other weights, trained
            modules_to_save among them, and nothing of this library. For a `PeftModel`, its `merge_and_unload`.

    Returns:
        The same model.

    Raises:
        ValueError: A token router is among them, the task is missing, unknown or not the one that is merged already,
            a weight is shared with another module, or the model has no adapters; no weight changes then.
        TypeError: `unload` with a `PeftModel`.

    Example:
        >>> merge_rank_experts(model, task="rte")  # doctest: +SKIP
    """
    layers = list(adapted_layers(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no rank-expert adapters to merge.")
    if unload and isinstance(model, PeftModel):
        raise TypeError("model is a PeftModel: call model.merge_and_unload(task=...), which returns the base model.")
    with merging(model, adapter_names, safe_merge, task):
        for _, layer in layers:
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
    if unload:
        _unload(model, adapter_names)
    return model


def _unload(model: nn.Module, adapter_names: list[str] | None) -> None:
    for path, module in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if isinstance(module, RankExpertExperts) or (
            isinstance(module, RankExpertLinear) and not isinstance(module.base_layer, ExpertProjection)
        ):
            setattr(model.get_submodule(parent), name, module.get_base_layer())
        elif isinstance(module, AuxiliaryTrainingWrapper):
            kept = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=adapter_names)
            setattr(model.get_submodule(parent), name, kept)
    uninstall(model)
    del model.peft_config


def unmerge_rank_experts(model: nn.Module) -> nn.Module:
    """Restore the base weights that `merge_rank_experts` changed, bit by bit, and route again.

    Example:
        >>> unmerge_rank_experts(model)  # doctest: +SKIP
    """
    for _, layer in adapted_layers(model):
        layer.unmerge()
    return model
