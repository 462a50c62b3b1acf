"""What a report holds, before anybody prints it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config.config import RankExpertConfig
from ..routing.statistics import LayerStatistics
from .findings import Finding, find


@dataclass(frozen=True)
class Contents:
    """What is known of an adapter's routing.

    Attributes:
        title: One line.
        facts: Name to value: method, base model, sizes, what was recorded.
        layers: One entry a layer, in the model's order.
        config: The adapter's; None where the model keeps none.
        history: The Trainer's log history, `trainer.state.log_history`.
    """

    title: str
    facts: Mapping[str, str]
    layers: Sequence[LayerStatistics]
    config: RankExpertConfig | None = None
    history: Sequence[Mapping[str, Any]] = field(default_factory=tuple)

    @property
    def findings(self) -> list[Finding]:
        """What stands out, warnings first."""
        return find(self.layers, self.config)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names, in the order of their ids."""
        return max((layer.tasks for layer in self.layers), key=len, default=())
