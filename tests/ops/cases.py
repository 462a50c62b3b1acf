"""What the op's tests share: gates, base layers as a layer describes them, and the reference."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rank_experts.ops import Adapted, Base
from rank_experts.ops.operands import Operands
from rank_experts.ops.reference import reference
from rank_experts.routing import TaskGate, TokenGate


def base_of(layer: nn.Module) -> Base:
    """A plain linear layer that nobody watches; its weight where nothing of it trains."""
    transposed = isinstance(layer, Conv1D)
    if any(parameter.requires_grad for parameter in layer.parameters()):
        return Base(layer.forward, None, transposed, True)
    return Base(layer.forward, layer.weight, transposed, True, layer.bias)


class Watched:
    """A base layer whose output somebody keeps, so that it must not be overwritten."""

    def __init__(self, layer: nn.Module):
        self.layer, self.seen = layer, []

    def __call__(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        self.seen.append((y, y.detach().clone()))
        return y

    def assert_unchanged(self) -> None:
        assert self.seen
        for output, copy in self.seen:
            assert torch.equal(output, copy)


def token_gate(d_in: int, num_experts: int, top_k: int, dtype=torch.float32, **constants) -> TokenGate:
    """A token gate whose weight trains."""
    weight = torch.randn(num_experts, d_in).to(dtype).requires_grad_()
    return TokenGate(weight, torch.zeros(num_experts), top_k, **constants)


def task_gate(e: int, r: int, ranks: list[int], dtype=torch.float32, rank_scaling: str = "linear") -> TaskGate:
    """A task gate whose tasks choose these ranks, unsurely."""
    embedding, weight, bias = torch.randn(len(ranks), e) * 0.1, torch.randn(r, e) * 0.1, torch.randn(r) * 0.1
    embedding[:, : len(ranks)] = torch.eye(len(ranks))
    for task, rank in enumerate(ranks):
        weight[rank - 1, task] += 3
    return TaskGate(*(each.to(dtype).requires_grad_() for each in (embedding, weight, bias)), rank_scaling)


def by_reference(base: Base, x: Tensor, A: Tensor, B: Tensor, gate=None, *, scale=1.0, dropped=None) -> Adapted:
    """What `rank_experts` returns, by the plain formula and autograd."""
    y, routing = reference(base.apply(x), Operands(x, dropped, A, B, gate, scale, A.dtype))
    return Adapted(y, None if routing is None else routing.indices, routing)


def trained(*tensors) -> list[Tensor]:
    """Those of some tensors and gates that get a gradient."""
    found: list[Tensor] = []
    for each in tensors:
        parts = each if isinstance(each, tuple) else (each,)
        found += [part for part in parts if isinstance(part, Tensor) and part.requires_grad]
    return found


def assert_close(ours, theirs, tolerance: float, smallest: float = 0.05) -> None:
    """Compare sequences of tensors by the size of each; whole numbers exactly."""
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == their.dtype
        assert our.shape == their.shape
        if not our.is_floating_point():
            assert torch.equal(our, their)
            continue
        size = max(their.abs().max().item(), smallest) if their.numel() else 1.0
        torch.testing.assert_close(our, their, rtol=tolerance, atol=tolerance * size)
