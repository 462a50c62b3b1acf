"""Every rank of a LoRA is an expert: token-routed (SMoRA) and task-routed (MoRE) adapters for Hugging Face models."""

from ._version import __version__
from .config.config import RankExpertConfig
from .convert.checkpoints import import_checkpoint
from .convert.export import export_lora, export_loras
from .convert.merge import merge_rank_experts, unmerge_rank_experts
from .convert.prune import prune_rank_experts
from .convert.upcycle import inject_lora, inject_loras
from .files.loading import load_rank_experts
from .files.saving import save_rank_experts
from .registration import register
from .training.balance import update_router_bias
from .tuner.injection import inject_rank_experts
from .tuner.tuner import RankExpertModel, use_task

register()

__all__ = [
    "RankExpertConfig",
    "RankExpertModel",
    "__version__",
    "export_lora",
    "export_loras",
    "import_checkpoint",
    "inject_lora",
    "inject_loras",
    "inject_rank_experts",
    "load_rank_experts",
    "merge_rank_experts",
    "prune_rank_experts",
    "save_rank_experts",
    "unmerge_rank_experts",
    "update_router_bias",
    "use_task",
]
