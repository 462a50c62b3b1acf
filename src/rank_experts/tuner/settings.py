"""From a config to what one adapter of one layer is told."""

from __future__ import annotations

from typing import Any

from ..config.config import RankExpertConfig
from ..layers.adapter import AdapterSettings


def adapter_settings(config: RankExpertConfig, r: int, alpha: float) -> AdapterSettings:
    """Unpack a config: its fields of the same names, but for those that its router makes idle.

    Args:
        config: The adapter's.
        r: The layer's ranks, after rank_pattern.
        alpha: Its alpha, after alpha_pattern.

    Example:
        >>> adapter_settings(RankExpertConfig.more(["a", "b"]), r=4, alpha=8).num_tasks
        2
    """
    by_token, by_task = config.router == "token", config.router == "task"
    values: dict[str, Any] = {name: getattr(config, name) for name in AdapterSettings._fields if name != "num_tasks"}
    values |= {"r": r, "alpha": alpha}
    values |= {
        "expert_rank": config.expert_rank if by_token else 1,
        "load_balance": config.load_balance if by_token else "none",
        "num_tasks": len(config.tasks or ()) if by_task else 1,
    }
    return AdapterSettings(**values)
