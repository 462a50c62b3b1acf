"""What `transformers.Trainer` needs to train rank experts."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .balance import update_router_bias


class RankExpertCallback(TrainerCallback):
    """Moves the balancing bias once per optimiser step (`update_router_bias`).

    Example:
        >>> trainer = Trainer(model, args, callbacks=[RankExpertCallback()], ...)  # doctest: +SKIP
    """

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Update after the optimiser's step, before gradients are cleared."""
        if model is not None:
            update_router_bias(model)
