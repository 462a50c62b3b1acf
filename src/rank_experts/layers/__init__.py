"""The adapted layer, the adapted experts of a mixture, and the update as a matrix."""

from .adapter import AdapterSettings, RankExpertAdapter
from .experts import RankExpertExperts
from .linear import RankExpertLinear, adapted_layers

__all__ = ["AdapterSettings", "RankExpertAdapter", "RankExpertExperts", "RankExpertLinear", "adapted_layers"]
