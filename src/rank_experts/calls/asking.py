"""The first of the two verbs that a layer has for the call around it: ask, before it computes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .call import Call, current_call
from .first_calls import note_use
from .scope import Place
from .tasks import task_ids_of_rows


class Asked(NamedTuple):
    """What a call says to an adapter of a layer.

    Attributes:
        call: The surrounding call; None: there is none.
        task_ids: (G,) int64, for an adapter that routes by task: one for each of G equal parts of the input in turn.
        counts: What the adapter decides counts for training.
        is_watched: Somebody wants to see the whole routing.
    """

    call: Call | None
    task_ids: Tensor | None
    counts: bool
    is_watched: bool


def ask(place: Place, x: Tensor, *, by_task: bool, trains: bool) -> Asked:
    """Ask the call around a layer what holds for its input.

    Nothing counts for training unless the adapter trains and gradients are recorded. Within a forward of the model
    that is decided where the forward begins: reentrant checkpointing turns recording off for a block's first run.

    Args:
        place: The adapter.
        x: (…, d_in) the layer's input.
        by_task: Whether the adapter routes by task.
        trains: Whether the adapter is in training mode and has parameters that are trained.

    Raises:
        ValueError: See `task_ids_of_rows`.
    """
    call = current_call(place.scope)
    if trains:
        trains = torch.is_grad_enabled() if call is None or call.records is None else call.records
        note_use(place)
    return Asked(
        call,
        task_ids_of_rows(call, place, x) if by_task else None,
        trains,
        call is not None and bool(call.observers),
    )
