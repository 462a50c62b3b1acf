"""The one operation of the library, y + s · (g ⊙ (x Aᵀ)) Bᵀ, and its implementations."""

from .reference import rank_experts_reference

__all__ = ["rank_experts_reference"]
