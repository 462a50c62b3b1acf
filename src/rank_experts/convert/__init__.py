"""From an adapter to merged weights, plain LoRAs or fewer experts; from others' checkpoints to an adapter."""

from .calibrate import CalibrationReport
from .checkpoints import import_checkpoint
from .export import export_lora, export_loras
from .merge import merge_rank_experts, unmerge_rank_experts
from .prune import PruningReport, prune_rank_experts
from .upcycle import force_expert, inject_lora, inject_loras

__all__ = [
    "CalibrationReport",
    "PruningReport",
    "export_lora",
    "export_loras",
    "force_expert",
    "import_checkpoint",
    "inject_lora",
    "inject_loras",
    "merge_rank_experts",
    "prune_rank_experts",
    "unmerge_rank_experts",
]
