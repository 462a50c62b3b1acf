"""vLLM's linear LoRA layers with a gate between their two products. Imports vLLM.

vLLM computes y += B (A x) for rows of several adapters, in two calls of its kernels: shrink and expand. The gate of
each row's own adapter goes in between. All else is vLLM's: which adapter lies in which slot, the kernels, the slicing
for tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from vllm.config.lora import LoRAConfig
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.lora.layers import (
    ColumnParallelLinearWithLoRA,
    MergedColumnParallelLinearVariableSliceWithLoRA,
    MergedColumnParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    QKVParallelLinearWithLoRA,
    ReplicatedLinearWithLoRA,
    RowParallelLinearWithLoRA,
)
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

from ...routing import TokenGate
from .slots import SlotGates


class Gated(BaseLinearLayerWithLoRA):
    """What is added to each of vLLM's classes: the slots' gates, and their use."""

    gates: SlotGates

    def create_lora_weights(self, max_loras: int, lora_config: LoRAConfig, model_config=None) -> None:
        """Make room for the slots' A and B, as vLLM does, and for their gates."""
        super().create_lora_weights(max_loras, lora_config, model_config)
        self.gates = SlotGates(max_loras, self.n_slices, self.input_size, lora_config.max_lora_rank, self.device)

    def set_gates(self, slot: int, gates: Sequence[TokenGate | None]) -> None:
        """Put an adapter's gates into a slot, one a slice; layers that split their input take this process's part."""
        if self.tp_size > 1 and self._splits_input:
            gates = [gate and gate._replace(weight=self.slice_lora_a(gate.weight)) for gate in gates]
        self.gates.set(slot, gates)

    @property
    def _splits_input(self) -> bool:
        return isinstance(self, RowParallelLinearWithLoRA)

    def _apply_lora_to_output(self, x: Tensor, output: Tensor) -> Tensor:
        # vLLM calls this with the base layer's output, in all of a layer's forwards but the dual-stream one.
        rows, out = x.reshape(-1, x.shape[-1]), output.view(-1, output.shape[-1])
        punica = self.punica_wrapper
        slots = punica._token_lora_indices[: rows.shape[0]]
        num_ranks = self.lora_b_stacked[0].shape[-1]
        buffer = torch.zeros(self.n_slices, rows.shape[0], num_ranks, dtype=torch.float32, device=rows.device)
        punica.add_shrink(buffer, rows, self.lora_a_stacked, 1.0)
        reduce = tensor_model_parallel_all_reduce if self.tp_size > 1 and self._splits_input else None
        # Gates of 0 where a row has no adapter: vLLM's operators for CPUs give such a row the last slot's.
        gated = buffer * self.gates(rows, slots, reduce)
        punica.add_expand(out, gated, self.lora_b_stacked, self.output_slices)
        return output


class GatedColumn(Gated, ColumnParallelLinearWithLoRA):
    """A layer that splits its output, for one adapter layer."""


class GatedMergedColumn(Gated, MergedColumnParallelLinearWithLoRA):
    """Two in one, gate and up for instance."""


class GatedSlices(Gated, MergedColumnParallelLinearVariableSliceWithLoRA):
    """Any number in one."""


class GatedQKV(Gated, QKVParallelLinearWithLoRA):
    """q, k and v in one, for one adapter layer."""


class GatedMergedQKV(Gated, MergedQKVParallelLinearWithLoRA):
    """q, k and v in one, each with an adapter layer of its own."""


class GatedRow(Gated, RowParallelLinearWithLoRA):
    """A layer that splits its input."""


class GatedReplicated(Gated, ReplicatedLinearWithLoRA):
    """A layer that every process has as a whole."""


GATED: dict[type, type] = {
    cls.__bases__[1]: cls
    for cls in (
        GatedColumn,
        GatedMergedColumn,
        GatedSlices,
        GatedQKV,
        GatedMergedQKV,
        GatedRow,
        GatedReplicated,
    )
}
"""vLLM's class to ours, which takes its place."""
