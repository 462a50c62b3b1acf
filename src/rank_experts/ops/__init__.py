"""The one operation of the library, base(x) + s · (g ⊙ (x Aᵀ)) Bᵀ, and its implementations."""

from . import node
from .dispatch import Adapted, rank_experts
from .reference import rank_experts_reference

__all__ = ["Adapted", "node", "rank_experts", "rank_experts_reference"]
