"""What is compared: frozen linear layers with this library's adapters, with PEFT's, and with the published code's way.

Every adapter has random B, so that its update counts, and computes in the base layer's dtype unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from rank_experts import RankExpertConfig, inject_rank_experts
from rank_experts.calls import Call
from rank_experts.layers import RankExpertAdapter, RankExpertLinear
from rank_experts.ops.backends import cpu

TASKS = ["short", "middle", "long"]


class PublishedSMoRA(nn.Module):
    """SMoRA as its authors' code computes it: each token gathers its own rows of A and columns of B.

    Takes over the parameters of one of our layers, so that both must give the same output.
    """

    def __init__(self, ours: RankExpertLinear) -> None:
        super().__init__()
        self.base_layer = ours.base_layer
        self.A, self.B = ours.rank_experts["default"].A, ours.rank_experts["default"].B
        self.adapter, self.scale = ours.rank_experts["default"], ours.rank_experts["default"].scale

    @property
    def weight(self) -> torch.Tensor:
        """T5 asks for its dtype."""
        return self.base_layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, d_in) to (…, d_out)."""
        k, shape = self.adapter.settings.top_k, x.shape[:-1]
        x = x.reshape(-1, x.shape[-1])
        scores = F.linear(x.float(), self.adapter.router_weight.float()).sigmoid()
        indices = (scores + self.adapter.balance_bias).topk(k, dim=-1).indices
        weights = scores.gather(-1, indices)
        gates = (k * weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        u = torch.einsum("nd,nkd->nk", x, self.A[indices]) * gates
        y = self.base_layer(x) + torch.einsum("nk,nkd->nd", u, self.B.T[indices]) * self.scale
        return y.view(*shape, -1)


def layer(kind: str, d: int, dtype: torch.dtype, d_out: int | None = None) -> nn.Module:
    """Build a layer of a kind: "base", "lora8", "lora64", "smora", "published", "dense64", "more8"."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(d, d_out or d, bias=False)).to(dtype).requires_grad_(False)
    if kind == "base":
        return model[0]
    if kind.startswith("lora"):
        r = int(kind.removeprefix("lora"))
        config = LoraConfig(r=r, lora_alpha=16, target_modules=["0"], init_lora_weights=False)
        return get_peft_model(model, config, autocast_adapter_dtype=False).base_model.model[0]
    common = dict(target_modules=["0"], init_weights=False)
    config = {
        "smora": lambda: RankExpertConfig.smora(alpha=4, **common),
        "published": lambda: RankExpertConfig.smora(alpha=4, **common),
        "dense64": lambda: RankExpertConfig.lora(r=64, **common),
        "more8": lambda: RankExpertConfig.more(
            tasks=TASKS, alpha=16, rank_scaling="none", contrastive_coef=0.0, **common
        ),
    }[kind]()
    inject_rank_experts(model, config, autocast_adapter_dtype=False)
    if kind == "more8":
        choose_ranks(model[0].rank_experts["default"], [2, 5, 8])
    return PublishedSMoRA(model[0]) if kind == "published" else model[0]


def choose_ranks(adapter: RankExpertAdapter, ranks: list[int]) -> None:
    """Make a task gate choose these ranks, task by task."""
    with torch.no_grad():
        adapter.task_embedding.zero_()
        adapter.gate_weight.zero_()
        adapter.gate_bias.zero_()
        for task, rank in enumerate(ranks):
            adapter.task_embedding[task, task] = 1
            adapter.gate_weight[rank - 1, task] = 4


def step(
    module: nn.Module, x: torch.Tensor, dy: torch.Tensor, tasks: str | torch.Tensor | None = None
) -> Callable[[], None]:
    """Return one forward and backward of a layer, gradients to None before."""
    trained = [p for p in module.parameters() if p.requires_grad]

    def run() -> None:
        x.grad = None
        for parameter in trained:
            parameter.grad = None
        if tasks is None:
            module(x).backward(dy)
        else:
            # What a model enters once for all of its layers; use_task would search this one for layers.
            with Call(module.scope, tasks=tasks, records=True):
                module(x).backward(dy)

    return run


def in_pytorch(run: Callable[[], None]) -> Callable[[], None]:
    """Run with the native kernels out of the way."""

    def run_so() -> None:
        # Not by unittest.mock, which takes longer than a small layer.
        kept = cpu.serves, cpu.serves_task_gate, cpu.count
        cpu.serves = cpu.serves_task_gate = lambda *args: False
        cpu.count = lambda *args: None
        try:
            run()
        finally:
            cpu.serves, cpu.serves_task_gate, cpu.count = kept

    return run_so


def pytorch_or_native(kind: str, run: Callable[[], None]) -> Callable[[], None]:
    """Run as the kind's name says: the native kernel is used by kinds that end in "native" alone."""
    return run if kind.endswith("native") else in_pytorch(run)
