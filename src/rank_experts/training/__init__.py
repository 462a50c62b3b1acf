"""Training on several tasks: trainer, callbacks, balancing, mixtures and sampling, metrics, heads, new tasks.

The names are imported when they are asked for, because the trainer needs much that the rest of the library does not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .balance import update_router_bias
    from .callbacks import RankExpertCallback, SaveOnInterrupt
    from .conflict import TaskConflict, task_conflict
    from .heads import HeadSpec, MultiTaskClassifier, load_classifier, regression_spec
    from .lifecycle import TaskGuess, add_task, identify_task
    from .mixtures import TaskCollator, TaskMixture, TaskPart, TaskSampler, sampling_weights
    from .trainer import RankExpertTrainer, RankExpertTrainerMixin

_HOMES = {
    "HeadSpec": "heads",
    "MultiTaskClassifier": "heads",
    "RankExpertCallback": "callbacks",
    "RankExpertTrainer": "trainer",
    "RankExpertTrainerMixin": "trainer",
    "SaveOnInterrupt": "callbacks",
    "TaskCollator": "mixtures",
    "TaskConflict": "conflict",
    "TaskGuess": "lifecycle",
    "TaskMixture": "mixtures",
    "TaskPart": "mixtures",
    "TaskSampler": "mixtures",
    "add_task": "lifecycle",
    "identify_task": "lifecycle",
    "load_classifier": "heads",
    "regression_spec": "heads",
    "sampling_weights": "mixtures",
    "task_conflict": "conflict",
    "update_router_bias": "balance",
}

__all__ = [
    "HeadSpec",
    "MultiTaskClassifier",
    "RankExpertCallback",
    "RankExpertTrainer",
    "RankExpertTrainerMixin",
    "SaveOnInterrupt",
    "TaskCollator",
    "TaskConflict",
    "TaskGuess",
    "TaskMixture",
    "TaskPart",
    "TaskSampler",
    "add_task",
    "identify_task",
    "load_classifier",
    "regression_spec",
    "sampling_weights",
    "task_conflict",
    "update_router_bias",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
