"""The one operation of the library, base(x) + s · (g ⊙ (x Aᵀ)) Bᵀ, and its implementations."""

from . import node
from .dispatch import Adapted, decode, has_enough_to_share, load_of_output, may_share, rank_experts, share
from .reference import rank_experts_reference
from .shared import Reader, Shared

__all__ = [
    "Adapted",
    "Reader",
    "Shared",
    "decode",
    "has_enough_to_share",
    "load_of_output",
    "may_share",
    "node",
    "rank_experts",
    "rank_experts_reference",
    "share",
]
