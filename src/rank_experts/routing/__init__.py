"""The gates, their losses and their statistics: plain functions over an adapter's tensors."""

from .choice import Routing
from .losses import balance_loss, contrastive_loss
from .pooling import pool_examples, pool_gathered
from .task import TaskGate, task_logits, task_routing
from .token import TokenGate, expert_load, select_experts, token_routing

__all__ = [
    "Routing",
    "TaskGate",
    "TokenGate",
    "balance_loss",
    "contrastive_loss",
    "expert_load",
    "pool_examples",
    "pool_gathered",
    "select_experts",
    "task_logits",
    "task_routing",
    "token_routing",
]
