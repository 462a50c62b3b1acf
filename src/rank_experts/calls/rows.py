"""How the rows of a layer's input lie: which of them belong to which row of the call.

A layer sees an input of some shape; the call says R and L (`batch.py`). What ties the two leaves no room for luck:

    (R, …, d)     a row's tokens side by side
    (R · L, d)    the same, flattened
    (R, d)        one vector a row
    (L, R, d)     the sequence first
    images        as `images.py` has it
    a mixture's   tokens that were gathered from all over the batch, as `Gathered` has it

Everything else belongs to nobody known, and so does (R, R, d) where a layer may put its sequence first.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .call import Call

SEQUENCE_FIRST = frozenset({"xlnet", "fsmt", "longformer", "led", "bridgetower", "mask2former", "oneformer"})
"""transformers' models (`config.model_type`) in which layers see (L, B, d)."""

WINDOWED = frozenset({"swin", "swinv2", "donut-swin", "maskformer-swin", "swin2sr"})
"""transformers' models in which layers see (B · windows, tokens, d), an image's windows side by side."""


class Layout(NamedTuple):
    """How the rows of a layer's input lie.

    Attributes:
        num_rows: R.
        repeats: How often the rows follow each other, L of (L, R, d); None: each row's tokens are side by side.
        owner: (G,) int64, whose each of G equal parts of the input is; None: the rows' in turn.
    """

    num_rows: int
    repeats: int | None = None
    owner: Tensor | None = None

    @property
    def is_in_turn(self) -> bool:
        """Each row's tokens are side by side."""
        return self.repeats is None

    def spread(self, values: Tensor) -> Tensor:
        """Return from (R, …), a value a row, (G, …): one for each of G equal parts of the input in turn."""
        if self.owner is not None:
            return values[self.owner]
        return values if self.repeats is None else values.repeat(self.repeats)

    def owners(self, num_tokens: int, device: torch.device) -> Tensor:
        """Return (N,) int64: the row that each token of the input belongs to."""
        parts = self.spread(torch.arange(self.num_rows, device=device))
        return parts.repeat_interleave(num_tokens // max(parts.shape[0], 1))

    def examples(self, x: Tensor) -> Tensor:
        """Return x as (R, tokens, d), where no owner is needed to tell them apart."""
        return x.reshape(self.num_rows, -1, x.shape[-1]) if self.repeats is None else x.transpose(0, 1)


def find_layout(call: Call, path: str, x: Tensor, num_named: int) -> Layout | None:
    """Return how a layer's rows lie, or None where that is not known.

    Args:
        call: The surrounding one.
        path: The layer's.
        x: (…, d) its input.
        num_named: How many rows there are where the call itself does not say: outside of a forward of the model.
    """
    if call.gathered is not None:
        return Layout(call.gathered.num_examples, owner=call.gathered.examples)
    batch, scope = call.batch, call.scope
    num_rows: Any = num_named if batch is None else batch.num_rows
    lengths: tuple[int, ...] = () if batch is None else batch.lengths
    if batch is not None and batch.images is not None and _is_within(path, scope.towers):
        owner = next((owner for number, owner in batch.images.owners if x.shape[0] == number), None)
        return None if owner is None else Layout(num_rows, owner=owner.to(x.device))
    may_be_first = path in scope.seen_sequence_first or _is_within(path, scope.sequence_first)
    if x.dim() == 2:
        # A list of experts sees tokens from all over the batch, and how many there are is chance.
        is_flat = not may_be_first and any(x.shape[0] == num_rows * length for length in lengths)
        fits = (is_flat or x.shape[0] == num_rows) and not _is_in_list_of_experts(path)
        return Layout(num_rows) if fits else None
    if x.dim() > 2 and x.shape[0] == num_rows:
        return None if may_be_first and x.dim() == 3 and x.shape[1] == num_rows else Layout(num_rows)
    if x.dim() == 3 and x.shape[1] == num_rows and (may_be_first or any(x.shape[0] == each for each in lengths)):
        if not torch.compiler.is_compiling():
            scope.seen_sequence_first.add(path)
        return Layout(num_rows, repeats=x.shape[0])
    if x.dim() == 3 and scope.windowed and _is_within(path, scope.windowed) and x.shape[0] % num_rows == 0:
        return Layout(num_rows)
    return None


def refuse_rows(call: Call, path: str, x: Tensor, what: str) -> ValueError:
    """Return the error for rows that nothing ties to what differs between them: `what`, "tasks" for instance."""
    batch = call.batch
    if batch is None:
        of = f"{what} of several examples outside of a forward of the model, which would say how many rows there are"
    else:
        length = f" of length {' or '.join(map(str, batch.lengths))}" if batch.lengths else ""
        of = f"{what} of {batch.num_rows} rows{length} ({batch.said_by} of shape {tuple(batch.shape)})"
    why = ""
    if batch is not None and batch.images is not None and _is_within(path, call.scope.towers):
        reason = (
            batch.images.why_not or f"expected {' or '.join(str(number) for number, _ in batch.images.owners)} rows"
        )
        why = f" The layer sees images: {reason}."
    elif x.dim() == 3 and x.shape[0] == x.shape[1]:
        why = " The layer may put the sequence first, and the length equals the batch: pad to another length."
    return ValueError(
        f"{path}: an input of shape {tuple(x.shape)} cannot be tied to the {of}.{why} Expected (rows, …, features), "
        "(rows · length, features) or (length, rows, features). Leave the layer out (exclude_modules), or give a batch "
        "one task; packed rows cannot mix tasks."
    )


def find_sequence_first(model: nn.Module) -> tuple[str, ...]:
    """Return the paths of a model's parts whose layers may see (L, R, d).

    Those of transformers' models that are known for it, and what owns an attention of torch's own with
    batch_first=False.
    """
    found = _of_types(model, SEQUENCE_FIRST)
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and not module.batch_first:
            found.append(path.rpartition(".")[0])
    return tuple(dict.fromkeys(found))


def find_windowed(model: nn.Module) -> tuple[str, ...]:
    """Return the paths of a model's parts whose layers see an image's windows side by side."""
    return tuple(_of_types(model, WINDOWED))


def _of_types(model: nn.Module, types: frozenset[str]) -> list[str]:
    return [
        path
        for path, module in model.named_modules()
        if hasattr(module, "input_modalities") and getattr(getattr(module, "config", None), "model_type", "") in types
    ]


def _is_in_list_of_experts(path: str) -> bool:
    # An expert of a list is called by a number, "experts.3" or "experts.expert_3".
    parts = path.split(".")
    return any(part == "experts" and following[-1:].isdigit() for part, following in itertools.pairwise(parts))


def _is_within(path: str, parts: tuple[str, ...]) -> bool:
    return any(not part or path == part or path.startswith(f"{part}.") for part in parts)
