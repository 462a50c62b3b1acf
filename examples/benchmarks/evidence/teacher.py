"""Tasks whose conflict is known: each is an update of one linear layer, on inputs from the task's own subspace.

Task t has orthonormal input directions Q_t (d × ρ), output directions P_t (d × ρ) and a code c_t that tells it apart:

    x = Q_t z + visible · c_t + noise · n        z, n standard normal
    y = P_t Q_tᵀ x                               the update that an adapter has to learn

"subspaces": round(overlap · ρ) of the ρ directions of Q_t are the same for all tasks, the others are the task's own;
P_t is each task's own. Where directions are common, tasks want different outputs for one input: no single matrix can
give them, and on the common part 1 − 1/T of the error stays, whatever its rank.
"nested": all tasks have all of Q and P in common, and task t uses the first ρ_t of ρ directions, ρ_t from 1 to ρ: they
differ in how much of the same directions they use, which is what nested ranks hold.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

KINDS = ("subspaces", "nested")


class Teacher:
    """A set of tasks.

    Args:
        kind: "subspaces" or "nested".
        tasks: T.
        rank: ρ, of each task's update.
        overlap: The share of a task's input directions that all tasks have in common, 0 to 1.
        visible: The size of a task's code in its inputs; a typical token's own part has size √ρ.
        noise: Of the inputs, in every direction.
        width: d.
        seed: Draws the tasks.

    Raises:
        ValueError: d has too few directions for so many, or the kind is unknown.

    Example:
        >>> teacher = Teacher("nested", tasks=2, rank=1, overlap=1, visible=1, noise=0.1, width=8, seed=0)
        >>> x, y, task_ids = teacher.batch(4, torch.Generator().manual_seed(0))
        >>> x.shape, y.shape, task_ids.tolist()
        (torch.Size([4, 8]), torch.Size([4, 8]), [0, 1, 0, 1])
        >>> abs(round(float(teacher.error_left(teacher.best_matrix())), 6))  # two tasks, one update: nothing
        0.0
    """

    def __init__(
        self, kind: str, tasks: int, rank: int, overlap: float, visible: float, noise: float, width: int, seed: int
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r}: expected one of {', '.join(map(repr, KINDS))}.")
        common = rank if kind == "nested" else round(overlap * rank)
        needed = common + tasks * (rank - common) + tasks
        if needed > width:
            raise ValueError(f"width={width}: {tasks} tasks of rank {rank} need {needed} directions. Widen the layer.")
        self.tasks, self.rank, self.visible, self.noise, self.width = tasks, rank, visible, noise, width
        generator = torch.Generator().manual_seed(seed)
        directions = _orthonormal(width, needed, generator)
        own = directions[:, common : needed - tasks].T.reshape(tasks, rank - common, width)
        shared = directions[:, :common].T.expand(tasks, common, width)
        self.inputs_TRD = torch.cat([shared, own], dim=1)
        self.codes_TD = directions[:, needed - tasks :].T
        if kind == "nested":
            outputs = _orthonormal(width, rank, generator).T.expand(tasks, rank, width)
            used = 1 + torch.arange(tasks) * rank // tasks
            self.outputs_TRD = outputs * (torch.arange(rank) < used[:, None])[:, :, None]
        else:
            self.outputs_TRD = torch.stack([_orthonormal(width, rank, generator).T for _ in range(tasks)])

    def batch(self, size: int, generator: torch.Generator, task: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Draw inputs (size, d), the update's outputs (size, d) and task ids (size,), tasks in turn or one alone."""
        task_ids = torch.arange(size) % self.tasks if task is None else torch.full((size,), task)
        z = torch.randn(size, self.rank, generator=generator)
        x = torch.einsum("nr,nrd->nd", z, self.inputs_TRD[task_ids]) + self.visible * self.codes_TD[task_ids]
        x = x + self.noise * torch.randn(size, self.width, generator=generator)
        inner = torch.einsum("nd,nrd->nr", x, self.inputs_TRD[task_ids])
        return x, torch.einsum("nr,nrd->nd", inner, self.outputs_TRD[task_ids]), task_ids

    def best_matrix(self, rank: int | None = None) -> Tensor:
        """Return the one matrix (d, d) of at most `rank` that is best for all tasks together, in expectation.

        Least squares, and of its outputs the `rank` directions with the most energy (reduced-rank regression,
        Izenman 1975): what a LoRA of that rank can reach at best.
        """
        xx, yx = self._moments
        # Without noise the inputs leave directions out; there the matrix may do anything, so nothing.
        best = torch.linalg.solve(xx, yx.T).T if self.noise else yx @ torch.linalg.pinv(xx, hermitian=True, rtol=1e-6)
        if rank is not None and rank < self.width:
            _, vectors = torch.linalg.eigh(best @ xx @ best.T)
            kept = vectors[:, -rank:]
            best = kept @ kept.T @ best
        return best

    def error_left(self, matrix: Tensor) -> Tensor:
        """Return E|y − M x|² / E|y|² over all tasks, exactly: 1 is what no update at all leaves."""
        xx, yx = self._moments
        # |y|² = |z + noise|² of a task's own directions, as far as it has an output for them.
        energy = (1 + self.noise**2) * self.outputs_TRD.double().square().sum() / self.tasks
        return (energy - 2 * (matrix * yx).sum() + ((matrix @ xx) * matrix).sum()) / energy

    @functools.cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        # (E x xᵀ, E y xᵀ), both (d, d), over all tasks.
        inputs, codes = self.inputs_TRD.double(), self.codes_TD.double()
        noise = self.noise**2
        shared = inputs.flatten(0, 1).T @ inputs.flatten(0, 1) + self.visible**2 * codes.T @ codes
        xx = shared / self.tasks + noise * torch.eye(self.width, dtype=torch.float64)
        yx = (1 + noise) * self.outputs_TRD.double().flatten(0, 1).T @ inputs.flatten(0, 1) / self.tasks
        return xx, yx


def _orthonormal(width: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(width, count, generator=generator))[0]
