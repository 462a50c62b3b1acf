"""The one operation of the library, base(x) + s · (g ⊙ (x Aᵀ)) Bᵀ, and its implementations."""

from .op import Adapted, load_of_output, rank_experts, task_gates
from .operands import Base
from .reference import rank_experts_reference

__all__ = ["Adapted", "Base", "load_of_output", "rank_experts", "rank_experts_reference", "task_gates"]
