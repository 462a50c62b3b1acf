"""What the dispatcher chose, said once."""

from __future__ import annotations

import functools
import logging

logger = logging.getLogger("rank_experts.ops")


@functools.cache
def announce(choice: str) -> None:
    """Log a choice, the first time that it is made."""
    logger.info("rank_experts computes adapted layers with: %s", choice)
