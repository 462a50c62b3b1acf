"""Every rank of a LoRA is an expert: token-routed (SMoRA) and task-routed (MoRE) adapters for Hugging Face models."""

from ._version import __version__
from .balance import update_router_bias
from .config import RankExpertConfig
from .export import export_lora
from .files import load_rank_experts, save_rank_experts
from .importing import import_checkpoint
from .inject import inject_rank_experts
from .merge import merge_rank_experts, unmerge_rank_experts
from .model import RankExpertModel, use_task
from .prune import prune_rank_experts
from .registration import register
from .upcycle import from_lora, from_loras

register()

__all__ = [
    "RankExpertConfig",
    "RankExpertModel",
    "__version__",
    "export_lora",
    "from_lora",
    "from_loras",
    "import_checkpoint",
    "inject_rank_experts",
    "load_rank_experts",
    "merge_rank_experts",
    "prune_rank_experts",
    "save_rank_experts",
    "unmerge_rank_experts",
    "update_router_bias",
    "use_task",
]
