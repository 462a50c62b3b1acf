"""What a model's forward returns: where its loss is, and its scores."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor


def add_to_outputs(outputs: Any, auxiliary: Tensor, has_labels: bool) -> Any:
    """Return a forward's outputs, of the type that they have, with the auxiliary loss in their loss.

    Args:
        outputs: transformers' `ModelOutput`, or any object with an attribute `loss`, which also gets the auxiliary loss
            alone as `rank_expert_loss`; a dict, whose "loss" grows, or which gets an entry "rank_expert_loss" where it
            has none; a named tuple, whose field `loss` grows; a tuple whose first entry is the loss, where labels
            were given.
        auxiliary: A scalar.
        has_labels: Whether labels were given.

    Example:
        >>> from torch import tensor
        >>> add_to_outputs({"loss": tensor(1.0)}, tensor(0.5), has_labels=True)
        {'loss': tensor(1.5000)}
    """
    if isinstance(outputs, tuple):
        return _add_to_tuple(outputs, auxiliary, has_labels)
    if isinstance(outputs, dict) and not hasattr(outputs, "__dataclass_fields__"):
        outputs = copy.copy(outputs)
        loss = outputs.get("loss")
        outputs["rank_expert_loss" if loss is None else "loss"] = auxiliary if loss is None else loss + auxiliary
        return outputs
    if getattr(outputs, "loss", None) is not None:
        outputs.loss = outputs.loss + auxiliary
    if hasattr(outputs, "__dict__") and not isinstance(outputs, Tensor):
        # A plain attribute, not a field: whoever computes the loss alone adds it.
        outputs.rank_expert_loss = auxiliary
    return outputs


def _add_to_tuple(outputs: Any, auxiliary: Tensor, has_labels: bool) -> Any:
    if hasattr(outputs, "_fields"):
        loss = getattr(outputs, "loss", None)
        return outputs if loss is None else outputs._replace(loss=loss + auxiliary)
    is_loss = has_labels and bool(outputs) and isinstance(outputs[0], Tensor) and outputs[0].numel() == 1
    return (outputs[0] + auxiliary, *outputs[1:]) if is_loss else outputs


def scores_of_outputs(outputs: Any) -> Tensor | None:
    """Return (B, …, features) of a forward's outputs: logits, or the last hidden state of a model without a head."""
    values = outputs if isinstance(outputs, tuple) else (getattr(outputs, "logits", None), *_values(outputs))
    return next((v for v in values if isinstance(v, Tensor) and v.dim() >= 2 and v.is_floating_point()), None)


def _values(outputs: Any) -> tuple[Any, ...]:
    return tuple(outputs.values()) if isinstance(outputs, dict) else (outputs,)
