"""The second verb: tell, after a layer has computed. Here alone it is decided what counts.

Nothing counts unless it was said to on asking (`Asked.counts`); then loads, the balancing loss, and MoRE's contrastive
loss on the pooled inputs. Observers are told either way. What backward recomputes is told to nobody.

Shapes: N tokens, E experts, k of them for each token, B examples, T tasks, e task-embedding width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import load_of_output
from ..routing.choice import Routing
from ..routing.losses import balance_loss, contrastive_loss
from ..routing.pooling import pool_examples, pool_gathered
from .asking import Asked
from .call import Call
from .padding import token_mask
from .rows import Layout, find_layout
from .scope import Place
from .tasks import ids_of_call


class Decision(NamedTuple):
    """What an adapter of a layer has computed.

    Attributes:
        x: (…, d_in) the layer's input.
        y: (…, d_out) its output.
        indices: (N, k) a token gate's choice; None: not known, or no token gate.
        routing: The whole routing, where it was wanted.
    """

    x: Tensor
    y: Tensor
    indices: Tensor | None = None
    routing: Routing | None = None


class Balance(NamedTuple):
    """How a token gate is balanced: "bias", "loss" or "none", the loss's weight, and E."""

    kind: str
    coef: float
    num_experts: int


class Contrast(NamedTuple):
    """MoRE's contrastive loss: its weight, temperature and pooling, and the task gate's tensors for it.

    Attributes:
        task_embedding: (T, e).
        projection: (e, d_in), or None where e = d_in.
    """

    coef: float
    temperature: float
    pooling: str
    task_embedding: Tensor
    projection: Tensor | None


def tell(place: Place, asked: Asked, decision: Decision, loss: Balance | Contrast | None) -> None:
    """Report what an adapter decided: to the observers, and, where it counts, to what trains the gates."""
    call = asked.call
    if decision.routing is not None and asked.is_watched and call is not None and not _is_recomputed():
        for observer in call.observers:
            observer(place.path, place.adapter, decision.x, decision.routing, call)
    if not asked.counts:
        return
    if isinstance(loss, Balance):
        _tell_balance(place, call, decision, loss)
    elif isinstance(loss, Contrast) and _gathers(call) and decision.x.numel():
        assert call is not None
        _add_loss(place, call, loss.coef * _contrast(place, call, decision.x, loss))


def _gathers(call: Call | None) -> bool:
    # Whether a forward of the model is under way, which takes losses and loads along when it ends.
    return call is not None and call.records is not None


def _is_recomputed() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _tell_balance(place: Place, call: Call | None, decision: Decision, balance: Balance) -> None:
    mask = token_mask(call, place.path, decision.x)
    if balance.kind == "bias":
        assert decision.indices is not None
        load = load_of_output(decision.y, decision.indices, balance.num_experts, mask)
        if call is not None and _gathers(call):
            call.loads.append((place.path, place.adapter, load))
        elif not _is_recomputed():
            # Outside of a forward of the model (a block called on its own) it counts at once.
            place.scope.add_load(place.path, place.adapter, load)
    elif balance.kind == "loss" and call is not None and _gathers(call):
        assert decision.routing is not None
        _add_loss(place, call, balance.coef * balance_loss(decision.routing, mask))


def _add_loss(place: Place, call: Call, loss: Tensor) -> None:
    call.losses.append((place.adapter, loss))
    call.is_unrecorded = call.is_unrecorded or not torch.is_grad_enabled()


def _contrast(place: Place, call: Call, x: Tensor, contrast: Contrast) -> Tensor:
    mask = token_mask(call, place.path, x)
    num_named = x.shape[0] if x.dim() > 2 else 1
    # Where nothing ties rows to examples, and one task holds for all, the first dimension counts as the examples.
    layout = find_layout(call, place.path, x, num_named) or Layout(num_named)
    ids = ids_of_call(call, place.adapter, x)
    ids = ids.expand(layout.num_rows) if ids.shape[0] == 1 else ids
    if layout.owner is not None:
        num_tokens = x.numel() // x.shape[-1]
        tokens = torch.arange(num_tokens, device=x.device) if call.gathered is None else call.gathered.tokens
        owners = layout.owners(num_tokens, x.device)
        pooled, present = pool_gathered(
            x.reshape(num_tokens, -1), owners, tokens, layout.num_rows, mask, contrast.pooling
        )
        return _loss(pooled, ids, contrast, present)
    examples = layout.examples(x)
    if mask is not None:
        mask = mask.view(examples.shape[:2]) if layout.is_in_turn else mask.view(x.shape[:2]).T
    pooled = pool_examples(examples, mask, contrast.pooling)
    return _loss(pooled, ids, contrast, None if mask is None else mask.any(1))


def _loss(pooled: Tensor, task_ids: Tensor, contrast: Contrast, present: Tensor | None) -> Tensor:
    # Of pooled inputs (B, d_in) with their tasks (B,), in float32 or better.
    dtype = torch.promote_types(contrast.task_embedding.dtype, torch.float32)
    with torch.autocast(pooled.device.type, enabled=False):
        pooled = pooled.to(dtype)
        if contrast.projection is not None:
            pooled = F.linear(pooled, contrast.projection.to(dtype))
        return contrastive_loss(pooled, contrast.task_embedding.to(dtype), task_ids, contrast.temperature, present)
