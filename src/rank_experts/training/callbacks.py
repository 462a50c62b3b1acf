"""Callbacks for `transformers.Trainer`: the balancing bias, what goes wrong in silence, and Ctrl-C.

They fit any trainer; `RankExpertTrainer` brings `RankExpertCallback` along.
"""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .balance import count_idle, dead_experts, take_nan_examples, update_router_bias

logger = logging.getLogger(__name__)


class RankExpertCallback(TrainerCallback):
    """Moves the balancing bias once per optimiser step (`update_router_bias`) and keeps the loads that it saw.

    Logs a warning for examples whose outputs are NaN, with their task, and for experts that no token chooses any more.

    Args:
        dead_after: Updates in a row without load after which an expert counts as dead.

    Example:
        >>> trainer = Trainer(model, args, callbacks=[RankExpertCallback()], ...)  # doctest: +SKIP
    """

    def __init__(self, dead_after: int = 100) -> None:
        self.dead_after = dead_after
        self._loads: dict[tuple[str, str], Tensor] = {}
        self._idle: dict[tuple[str, str], Tensor] = {}
        self._updates = 0
        self._saw_nan = False

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
            loads = update_router_bias(model)
            for key, load in loads.items():
                self._loads[key] = self._loads[key] + load if key in self._loads else load
            self._warn(model, loads, state.global_step + 1)

    def _warn(self, model: nn.Module, loads: dict[tuple[str, str], Tensor], step: int) -> None:
        found = take_nan_examples(model, wait=False)
        if not self._saw_nan:  # Weights that became NaN would repeat it at every step.
            for task, count in found.items():
                logger.warning("step %d: the outputs of %d example(s) of %s are NaN", step, count, task)
        self._saw_nan = bool(found)
        self._idle = count_idle(self._idle, loads)
        self._updates += 1
        if self._updates % self.dead_after == 0:
            for (path, adapter), experts in dead_experts(self._idle, self.dead_after).items():
                logger.warning(
                    "step %d: no token chose experts %s of %s (adapter %r) in %d updates; see load_balance and "
                    "balance_rate",
                    *(step, experts, path, adapter, self.dead_after),
                )

    def take_statistics(self) -> dict[str, float]:
        """Return how even the load was since the last call, averaged over layers; empty where none was counted.

        load_cv is the standard deviation over experts divided by the mean, load_max the largest expert's load
        divided by the mean, load_idle the share of experts that no token chose.
        """
        loads = [load for load in self._loads.values() if load.sum() > 0]
        self._loads = {}
        if not loads:
            return {}
        shares = [load / load.mean() for load in loads]
        values = {
            "load_cv": [share.std(correction=0) for share in shares],
            "load_max": [share.max() for share in shares],
            "load_idle": [(share == 0).float().mean() for share in shares],
        }
        return {name: round(float(torch.stack(value).mean()), 4) for name, value in values.items()}


class SaveOnInterrupt(TrainerCallback):
    """Turns the first Ctrl-C into a checkpoint after the current step and an orderly end; the second ends at once.

    Attributes:
        interrupted: Whether it happened.

    Example:
        >>> with SaveOnInterrupt() as interrupt:  # doctest: +SKIP
        ...     trainer.add_callback(interrupt)
        ...     trainer.train()
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._previous: Any = None

    def __enter__(self) -> SaveOnInterrupt:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Ask for a checkpoint and for the end."""
        if self.interrupted:
            control.should_save = True
            control.should_evaluate = False
            control.should_training_stop = True
