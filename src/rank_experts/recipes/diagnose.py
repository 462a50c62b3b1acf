"""Do a recipe's tasks conflict? Its model, heads and targets, and short trainings of LoRA on a part of its data."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from ..layers.linear import adapted_layers
from ..training.conflict import TaskConflict, task_conflict
from ..training.heads import MultiTaskClassifier
from ..tuner.injection import inject_rank_experts
from .assemble import adapter_config, collator, load_base
from .prepare import PreparedTask
from .recipe import Recipe

BATCH_SIZE = 4
LEARNING_RATE = 2e-3
"""Where the recipe names none."""


def diagnose_recipe(
    recipe: Recipe,
    data: dict[str, PreparedTask],
    tokenizer: Any,
    *,
    device: torch.device | None = None,
    examples: int = 400,
    steps: int = 100,
    seeds: int = 3,
    expect: Callable[[float], None] | None = None,
) -> TaskConflict:
    """Compare one LoRA for all tasks of a recipe with one for each, see `task_conflict`.

    The model, the modules to adapt, the heads (which are trained beside the adapters) and the learning rate are the
    recipe's; its adapter's ranks and its other training arguments play no part.

    Args:
        recipe: Checked.
        data: From `prepare`; of the training examples some are used, drawn by a fixed seed.
        tokenizer: The model's.
        device: To compute on; None: where the model is loaded.
        examples: At most so many a task.
        steps: Of each training.
        seeds: How many trainings of each way, 2 to 10.
        expect: Told, after the first steps, about how many seconds everything takes.

    Raises:
        RecipeError: One task alone, a task with too few examples, or no linear layer to adapt.
        ValueError: The seeds are too few or too many.
    """
    if len(recipe.tasks) < 2:
        raise recipe.error(("tasks",), f"holds {list(recipe.tasks)} alone: conflict is between at least two tasks.")
    drawn = {
        name: task.train.shuffle(seed=0).select(range(min(examples, len(task.train)))) for name, task in data.items()
    }
    for name, rows in drawn.items():
        if len(rows) < 3 * BATCH_SIZE:
            text = f"has {len(rows)} training examples: the diagnosis needs {3 * BATCH_SIZE}, and better some hundreds."
            raise recipe.error(("tasks", name), text)
    targets, trained = _targets(recipe), []
    model = load_base(recipe)
    if recipe.model.kind == "classification":
        heads = {name: task.head for name, task in data.items() if task.head is not None}
        model = MultiTaskClassifier(model, heads, pooling=recipe.model.pooling)
        targets, trained = [f"encoder.{path}" for path in targets], ["heads"]
    return task_conflict(
        model if device is None else model.to(device),
        drawn,
        collator(recipe, tokenizer),
        target_modules="|".join(map(re.escape, targets)),
        trained=trained,
        learning_rate=recipe.training.get("learning_rate", LEARNING_RATE),
        steps=steps,
        batch_size=BATCH_SIZE,
        seeds=range(seeds),
        expect=expect,
    )


def _targets(recipe: Recipe) -> list[str]:
    # Whatever the recipe's adapter would be put into, by its path.
    base = load_base(recipe, meta=True)
    inject_rank_experts(base, adapter_config(recipe, base), low_cpu_mem_usage=True, autocast_adapter_dtype=False)
    found = [path for path, _ in adapted_layers(base)]
    if not found:
        raise recipe.error(("adapter",), "adapts no linear layer: the diagnosis needs some among target_modules.")
    return found
