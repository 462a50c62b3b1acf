"""What stands out in an adapter's routing, in sentences that say what to do.

The limits are rules of thumb, chosen so that a healthy adapter gives no warning; each sentence says the number it saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..config.config import RankExpertConfig
from ..routing.statistics import MOST_COMPARED, LayerStatistics, mean_similarity

_FEW_TOKENS = 10.0
_FEW_DEAD = 0.01
_UNEVEN_CV = 1.0
_SAME_EMBEDDING = 0.95
_MOST_PAIRS = 10  # that are named


class Finding(NamedTuple):
    """One sentence, and whether it is a "warning" or a "note"."""

    level: str
    text: str


def find(layers: Sequence[LayerStatistics], config: RankExpertConfig | None = None) -> list[Finding]:
    """Return what stands out, warnings first.

    Args:
        layers: One adapter's.
        config: The adapter's, where it is known.
    """
    compared = [layer.first_tasks(MOST_COMPARED) for layer in layers]
    found = [
        *_untrained(layers),
        *_dead(layers),
        *_uneven(layers),
        *_unbalanced(layers, config),
        *_collapsed(layers),
        *_alike(compared),
        *_shared(compared),
    ]
    if (tasks := max((len(layer.tasks) for layer in layers), default=0)) > MOST_COMPARED:
        found.append(Finding("note", f"Of {tasks:,} tasks the first {MOST_COMPARED} are compared with each other."))
    return sorted(found, key=lambda finding: finding.level != "warning")


def _untrained(layers: Sequence[LayerStatistics]) -> list[Finding]:
    zero = [layer for layer in layers if not layer.update_norm.any()]
    if not zero:
        return []
    where = "every layer" if len(zero) == len(layers) else f"{len(zero)} of {len(layers)} layers"
    return [Finding("warning", f"B is zero in {where}: the adapter changes nothing there, it has not been trained.")]


def _recorded(layers: Sequence[LayerStatistics]) -> tuple[list[LayerStatistics], bool]:
    # Token-routed layers that saw enough tokens to be judged, else all that saw any; and which of the two.
    recorded = [layer for layer in layers if layer.router == "token" and layer.load is not None]
    enough = [layer for layer in recorded if layer.load is not None and float(layer.load.mean()) >= _FEW_TOKENS]
    return enough or recorded, bool(enough)


def _dead(layers: Sequence[LayerStatistics]) -> list[Finding]:
    recorded, enough = _recorded(layers)
    if not recorded:
        return []
    total = sum(layer.num_experts for layer in recorded)
    dead = sum(len(layer.dead_experts or ()) for layer in recorded)
    if not dead:
        return [Finding("note", f"No dead experts: each of the {total:,} was chosen.")]
    worst = max(recorded, key=lambda layer: len(layer.dead_experts or ()) / layer.num_experts)
    text = (
        f"{dead:,} of {total:,} experts were never chosen; in {worst.path} it is "
        f"{len(worst.dead_experts or ())} of {worst.num_experts}."
    )
    if not enough:
        text += f" An even load would give each fewer than {_FEW_TOKENS:g} tokens: record more data to judge."
        return [Finding("note", text)]
    if dead / total < _FEW_DEAD:
        return [Finding("note", text)]
    return [Finding("warning", f"{text} Raise balance_rate, or see that update_router_bias runs after each step.")]


def _uneven(layers: Sequence[LayerStatistics]) -> list[Finding]:
    recorded, enough = _recorded(layers)
    values = [(layer.load_cv or 0.0, layer) for layer in recorded if enough]
    uneven = [(cv, layer) for cv, layer in values if cv > _UNEVEN_CV]
    if not uneven:
        return []
    cv, worst = max(uneven, key=lambda pair: pair[0])
    text = (
        f"The load is uneven in {len(uneven)} of {len(values)} layers (standard deviation above the mean), most in "
        f"{worst.path} ({cv:.2f} times the mean)."
    )
    return [Finding("warning", text)]


def _unbalanced(layers: Sequence[LayerStatistics], config: RankExpertConfig | None) -> list[Finding]:
    biases = [layer.balance_bias for layer in layers if layer.balance_bias is not None]
    if not biases or config is None or config.load_balance != "bias":
        return []
    if not any(bool(bias.any()) for bias in biases):
        text = "Every balancing bias is zero: update_router_bias was never called, so nothing has balanced the load."
        return [Finding("warning", text)]
    largest = max(float(bias.abs().max()) for bias in biases)
    if config.score_function == "sigmoid" and largest > 1:
        text = (
            f"A balancing bias has grown to {largest:.2f}, beyond what sigmoid scores (0 to 1) can outweigh: the bias "
            "alone decides there. Lower balance_rate."
        )
        return [Finding("warning", text)]
    return [Finding("note", f"The balancing bias reaches {largest:.3f}; scores lie between 0 and 1.")]


def _collapsed(layers: Sequence[LayerStatistics]) -> list[Finding]:
    routed = [layer for layer in layers if layer.chosen_rank is not None and len(layer.tasks) > 1]
    if not routed:
        return []
    found = []
    same = [layer for layer in routed if layer.chosen_rank is not None and len(layer.chosen_rank.unique()) == 1]
    if same:
        level = "warning" if len(same) == len(routed) else "note"
        text = f"All tasks choose the same rank in {len(same)} of {len(routed)} layers."
        found.append(Finding(level, text))
    means = torch.stack([layer.chosen_rank.double() for layer in routed if layer.chosen_rank is not None]).mean(0)
    named = [f"{task} {mean:.1f}" for task, mean in zip(routed[0].tasks, means.tolist())]
    spread = ", ".join(named[:MOST_COMPARED]) + (", …" if len(named) > MOST_COMPARED else "")
    return [*found, Finding("note", f"Mean rank by task: {spread}.")]


def _alike(layers: Sequence[LayerStatistics]) -> list[Finding]:
    mean = mean_similarity(layers)
    if mean is None or len(layers[0].tasks) < 2:
        return []
    tasks = layers[0].tasks
    pairs = [(i, j) for i in range(len(tasks)) for j in range(i) if float(mean[i, j]) > _SAME_EMBEDDING]
    found = [
        Finding("warning", f"{tasks[j]} and {tasks[i]} have nearly the same embeddings (cosine {mean[i, j]:.2f}).")
        for i, j in pairs[:_MOST_PAIRS]
    ]
    more = len(pairs) - _MOST_PAIRS
    return [*found, Finding("warning", f"So have {more:,} more pairs of tasks.")] if more > 0 else found


def _shared(layers: Sequence[LayerStatistics]) -> list[Finding]:
    overlaps = [layer.task_overlap for layer in layers if layer.task_overlap is not None and len(layer.tasks) > 1]
    if not overlaps or len({overlap.shape for overlap in overlaps}) > 1:
        return []
    mean = torch.stack(overlaps).nanmean(0)
    off = mean[~torch.eye(len(mean), dtype=torch.bool)]
    off = off[off.isfinite()]
    if not len(off):
        return []
    return [Finding("note", f"Two tasks have {float(off.mean()):.0%} of their use of the experts in common.")]
