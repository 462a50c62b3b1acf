"""The token gate of rows that belong to different adapters, each in a slot of its own.

A server keeps several adapters at hand, one a slot, and a batch has rows of any of them and rows of none (slot −1). The
router's logits are computed for each row by its own slot's W_g alone, in float32 as in training, and so are its gates,
by `routing.token_routing`.

The two steps are operators, opaque to torch.compile, whose outputs have shapes that depend on the inputs' shapes
alone. On a CPU the rows are grouped by slot; on CUDA Triton kernels skip what is not there (`kernels.py`), so that
a CUDA graph holds one launch each whatever the batch is.

Shapes: N rows, S slots, n slices of a packed layer (q, k and v; gate and up), E most experts, R most ranks, d inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ...routing import TokenGate, token_routing

FIELDS = ("top_k", "expert_rank", "num_experts", "softmax", "biased")
"""What `SlotGates.settings` says of a slot's gate; top_k = 0: there is none, and all ranks count fully."""


class SlotGates(nn.Module):
    """The gates of every slot of one layer, in tensors of a fixed size.

    Args:
        slots: S.
        slices: n.
        d_in: What a row of x has; with tensor parallelism, this process's share.
        max_rank: R, and E as well, since an expert has at least one rank.
        device: Where the layer is.

    Example:
        >>> gates = SlotGates(slots=2, slices=1, d_in=4, max_rank=3)
        >>> gates.set(0, [TokenGate(torch.eye(3, 4), torch.zeros(3), top_k=1)])
        >>> gates(torch.tensor([[0.0, 9.0, 0.0, 0.0]] * 2), torch.tensor([0, -1])).tolist()
        [[[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]]
    """

    weight: Tensor
    bias: Tensor
    settings: Tensor

    def __init__(self, slots: int, slices: int, d_in: int, max_rank: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        weight = torch.zeros(slots, slices, max_rank, d_in, dtype=torch.float32, device=device)
        settings = torch.zeros(slots, slices, len(FIELDS), dtype=torch.int64, device=device)
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", weight.new_zeros(slots, slices, max_rank), persistent=False)
        self.register_buffer("settings", settings, persistent=False)

    def set(self, slot: int, gates: Sequence[TokenGate | None]) -> None:
        """Put an adapter's gates into a slot, one a slice; None where a slice has none."""
        self.settings[slot] = 0
        for i, gate in enumerate(gates):
            if gate is not None:
                self.weight[slot, i, : gate.num_experts] = gate.weight
                self.bias[slot, i, : gate.num_experts] = gate.balance_bias
                softmax = gate.score_function == "softmax"
                fields = (gate.top_k, gate.expert_rank, gate.num_experts, softmax, gate.biased_gates)
                self.settings[slot, i] = torch.tensor(fields, dtype=torch.int64)

    def forward(self, x: Tensor, slots: Tensor, reduce: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Gate every rank of every row.

        Args:
            x: (N, d).
            slots: (N,) int64, a row's slot; −1: it has no adapter, and its gates are 0.
            reduce: Adds up the logits over the processes that hold parts of x, where they do.

        Returns:
            (n, N, R) float32.
        """
        logits = torch.ops.rank_experts_vllm.slot_logits(x, self.weight, self.settings, slots)
        if reduce is not None:
            logits = reduce(logits)
        gates = torch.ops.rank_experts_vllm.slot_gates(logits, self.bias, self.settings, slots)
        return gates.transpose(0, 1)


def slot_logits(x: Tensor, weight: Tensor, settings: Tensor, slots: Tensor) -> Tensor:
    """Compute each row's router logits by its slot's W_g.

    Args:
        x: (N, d).
        weight: (S, n, E, d) float32.
        settings: (S, n, 5), see `FIELDS`.
        slots: (N,).

    Returns:
        (N, n, E) float32; zeros where a row's slot has no gate or no such expert.
    """
    logits = torch.zeros(len(x), *weight.shape[1:3], dtype=torch.float32, device=x.device)
    for slot, rows in _by_slot(slots):
        own = settings[slot].tolist()
        if not any(top_k for top_k, *_ in own):
            continue
        source = (x if rows is None else x[rows]).float()
        for i, (top_k, _, num_experts, *_) in enumerate(own):
            if top_k:
                part = source @ weight[slot, i, :num_experts].t()
                if rows is None:
                    logits[:, i, :num_experts] = part
                else:
                    logits[rows, i, :num_experts] = part
    return logits


def slot_gates(logits: Tensor, bias: Tensor, settings: Tensor, slots: Tensor) -> Tensor:
    """Compute each row's gates by its slot's settings.

    Args:
        logits: (N, n, E) from `slot_logits`.
        bias: (S, n, E) float32.
        settings: (S, n, 5), see `FIELDS`.
        slots: (N,).

    Returns:
        (N, n, R) float32, R = E: ones where a row's slot has no gate, zeros where it has no adapter.
    """
    gates = torch.zeros_like(logits)
    for slot, rows in _by_slot(slots):
        for i, (top_k, expert_rank, num_experts, softmax, biased) in enumerate(settings[slot].tolist()):
            place = (slice(None) if rows is None else rows, i)
            if not top_k:
                gates[place] = 1
                continue
            own = token_routing(
                logits[place][:, :num_experts],
                bias[slot, i, :num_experts],
                top_k=top_k,
                expert_rank=expert_rank,
                score_function="softmax" if softmax else "sigmoid",
                biased_gates=bool(biased),
            ).gates
            gates[(*place, slice(own.shape[1]))] = own
    return gates


def _by_slot(slots: Tensor) -> Iterator[tuple[int, Tensor | None]]:
    # Each slot that occurs, with its rows; None: all of them.
    found = slots.unique().tolist()
    for slot in found:
        if slot >= 0:
            yield slot, None if len(found) == 1 else (slots == slot).nonzero().squeeze(1)


_library = torch.library.Library("rank_experts_vllm", "DEF")
_library.define("slot_logits(Tensor x, Tensor weight, Tensor settings, Tensor slots) -> Tensor")
_library.define("slot_gates(Tensor logits, Tensor bias, Tensor settings, Tensor slots) -> Tensor")
_library.impl("slot_logits", slot_logits, "CPU")
_library.impl("slot_gates", slot_gates, "CPU")


@torch.library.register_fake("rank_experts_vllm::slot_logits", lib=_library)
def _(x: Tensor, weight: Tensor, settings: Tensor, slots: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], *weight.shape[1:3], dtype=torch.float32)


@torch.library.register_fake("rank_experts_vllm::slot_gates", lib=_library)
def _(logits: Tensor, bias: Tensor, settings: Tensor, slots: Tensor) -> Tensor:
    return torch.empty_like(logits)


def _cuda_logits(x: Tensor, weight: Tensor, settings: Tensor, slots: Tensor) -> Tensor:
    from . import kernels  # here, because there may be no Triton where there is no GPU

    return kernels.slot_logits(x, weight, settings, slots)


def _cuda_gates(logits: Tensor, bias: Tensor, settings: Tensor, slots: Tensor) -> Tensor:
    from . import kernels

    return kernels.slot_gates(logits, bias, settings, slots)


_library.impl("slot_logits", _cuda_logits, "CUDA")
_library.impl("slot_gates", _cuda_gates, "CUDA")
