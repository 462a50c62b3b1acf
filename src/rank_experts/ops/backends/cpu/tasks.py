"""MoRE's task gate by the native kernel: one call each way, where PyTorch has some sixty launches.

On its own the gate is a few dozen numbers a layer, whose launches cost more than the update of a few hundred tokens.

Shapes: T tasks, e numbers in a task's embedding, r ranks, of which q are used, G task ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ....routing.task import TaskGate
from ...operands import PLAIN
from .build import library
from .given import FEW_RANKS
from .token import DTYPES, NARROW, pointer

_SCALINGS = {"none": 0, "linear": 1, "quadratic": 2}


def serves_task_gate(gate: TaskGate) -> bool:
    """Say whether the kernel is there and takes this gate."""
    dtype = gate.weight.dtype
    if dtype not in DTYPES or gate.weight.shape[0] > FEW_RANKS:
        return False
    for tensor in gate[:3]:
        if type(tensor) not in PLAIN or tensor.dtype is not dtype or not tensor.is_cpu:
            return False
    return library() is not None


def task_gates(gate: TaskGate, task_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Choose as `TaskGate.route`, up to the rounding of another sum.

    Args:
        gate: Embedding (T, e), weight (r, e) and bias (r), of one dtype.
        task_ids: (G,) int64.

    Returns:
        Gates (G, q) of the ranks that are used, probabilities (G, r), and the chosen ranks less one (G,) int64.

    Raises:
        IndexError: A task does not exist.
    """
    embedding, weight, bias = (each.contiguous() for each in gate[:3])
    task_ids, (num_tasks, dim), num_ranks = task_ids.contiguous(), embedding.shape, weight.shape[0]
    gates, probabilities = torch.empty(2, len(task_ids), num_ranks).unbind()
    best = torch.empty(len(task_ids), dtype=torch.int64)
    used = library().rank_experts_task_gates(  # type: ignore[union-attr]
        len(task_ids), num_ranks, num_tasks, _SCALINGS[gate.rank_scaling], dim, embedding.dtype is NARROW,
        task_ids.data_ptr(), embedding.data_ptr(), weight.data_ptr(), bias.data_ptr(), probabilities.data_ptr(),
        best.data_ptr(), gates.data_ptr(),
    )  # fmt: skip
    if used < 0:
        raise IndexError(f"task_ids contain {task_ids.tolist()}: expected 0…{num_tasks - 1}.")
    used = used or num_ranks  # None is known to be used where no task is asked for.
    return gates.as_strided((len(task_ids), used), (used, 1)), probabilities, best


def task_gates_backward(
    gate: TaskGate, task_ids: Tensor, choice: tuple[Tensor, Tensor], dgates: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of embedding (T, e), weight (r, e) and bias (r); `needed` says which.

    Args:
        gate: What `task_gates` had.
        task_ids: (G,) int64.
        choice: Its probabilities (G, r) and best ranks (G,).
        dgates: (G, q).
        needed: Of embedding, weight and bias.
    """
    embedding, weight, bias = (each.contiguous() for each in gate[:3])
    task_ids, dgates, (probabilities, best) = task_ids.contiguous(), dgates.contiguous(), choice
    num_tasks, dim = embedding.shape
    made = [torch.empty(each.shape, dtype=each.dtype) if wanted else None for each, wanted in zip(gate[:3], needed)]
    library().rank_experts_task_gates_backward(  # type: ignore[union-attr]
        len(best), len(bias), num_tasks, _SCALINGS[gate.rank_scaling], dim, embedding.dtype is NARROW, dgates.shape[1],
        task_ids.data_ptr(), embedding.data_ptr(), weight.data_ptr(), dgates.data_ptr(), probabilities.data_ptr(),
        best.data_ptr(), *(pointer(each) for each in made),
    )  # fmt: skip
    return made
