"""Are tasks in each other's way? One dense adapter for all of them against one for each, trained briefly.

An adapter for each task is in nobody's way. Both ways see the same batches, start from the same weights and have as
many ranks in all, so what an adapter of its own wins (the room) is what tasks cost one another when they share, less
what they give one another: routing, which shares and separates, can win that and more. Where an adapter of its own wins
nothing, tasks help one another at least as much as they are in each other's way, and one LoRA is a good choice.

Gradients of tasks say less than one would hope. In early training their cosines are positive whether tasks conflict or
not, because all tasks learn the same first things; where each has a head of its own, what looks like conflict in the
adapter is taken up by the heads. Their cosines are therefore shown for the end of the shared training, where they tell
which layers pull tasks apart, and decide nothing. Nor does the share of the gradients' energy that tasks have in
common: it says where they meet, not whether they agree there.
"""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..messages import printable
from ..reports.conflict import conflict_page
from ..reports.tables import text_table
from .gradients import common_energy, cosines
from .mixtures import TaskMixture
from .trials import TaskExamples, adapted, as_it_was, visibility

NOTICEABLE = 0.05
"""The share of what training takes off the loss below which room is not worth a router."""
SEEN = 0.9
"""The share of held-out examples whose task the inputs must give away for a token router to see it."""

# Student's t, two-sided 95 %, for 1, 2, … degrees of freedom.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


_SHOWN = 5  # layers in the text
_TIMED = 3  # steps, after a first one that is slower


class LayerConflict(NamedTuple):
    """What the tasks' gradients say of a layer at the end of the shared training.

    Attributes:
        path: Of the layer.
        cosine: Between the gradients of two tasks, the mean over pairs; NaN where all of it is noise.
        common: The share of the tasks' gradient energy in their common subspace, see `gradients.common_energy`.
    """

    path: str
    cosine: float
    common: float


@dataclasses.dataclass(frozen=True)
class TaskConflict:
    """What was found; `print` it for a table, `save` it as a page.

    Attributes:
        tasks: Names, in the order of everything else.
        start: (T,) held-out loss of each task before any training.
        shared: (T,) the same with one adapter for all, the mean over seeds.
        alone: (T,) the same with an adapter for each.
        room: The mean over tasks of shared − alone.
        half: Half of its 95 % interval over seeds.
        visible: The share of held-out examples whose task the inputs of an adapted layer give away, by the nearest of
            the tasks' means; of the layer where that is most.
        cosines: Layer's path to (T, T), the cosines between the tasks' gradients at the end of the shared training,
            freed of the noise within a task; NaN where a task's gradient is nothing but noise.
        common: Layer's path to the share of the tasks' gradient energy in their common subspace, at that time.
    """

    tasks: list[str]
    start: Tensor
    shared: Tensor
    alone: Tensor
    room: float
    half: float
    visible: float
    cosines: dict[str, Tensor]
    common: dict[str, float]

    @property
    def learnt(self) -> float:
        """What training takes off the loss, the better way of the two; the mean over tasks."""
        return float(self.start.mean() - torch.minimum(self.shared.mean(), self.alone.mean()))

    @property
    def verdict(self) -> str:
        """Say "conflict", "none" or "unclear": the room's interval is above, below or across 5 % of what is learnt."""
        bound = NOTICEABLE * self.learnt
        if bound <= 0:
            return "unclear"
        if self.room - self.half > bound:
            return "conflict"
        return "none" if self.room + self.half < bound else "unclear"

    @property
    def advice(self) -> str:
        """What follows from it."""
        if self.verdict == "none":
            return "One LoRA is enough: an adapter for each task wins nothing, so tasks are not in each other's way."
        if self.learnt <= 0:
            return "It cannot be told: nothing was learnt. Give more steps, or another learning rate."
        if self.verdict == "unclear":
            return "It cannot be told: the interval is too wide. Give more seeds, examples or steps."
        if self.visible >= SEEN:
            return (
                "Route: a token router (SMoRA, blocks of ranks) can see the task in its inputs, and need not be told."
            )
        return "Route by task (MoRE), or keep an adapter for each: the inputs do not give the task away."

    @property
    def layers(self) -> list[LayerConflict]:
        """Every adapted layer, those first where the tasks' gradients point apart most."""
        apart = ~torch.eye(len(self.tasks), dtype=torch.bool)
        found = [
            LayerConflict(path, float(own[apart].nanmean()), self.common[path]) for path, own in self.cosines.items()
        ]
        return sorted(found, key=lambda layer: math.inf if math.isnan(layer.cosine) else layer.cosine)

    @property
    def mean_cosines(self) -> Tensor:
        """(T, T), the cosines in the mean over layers."""
        return torch.stack(list(self.cosines.values())).nanmean(0)

    def task_rows(self) -> list[list[str]]:
        """Return the table of tasks as text: the column names, then a row a task."""
        rows = [["task", "untrained", "one for all", "one each", "room"]]
        for name, start, shared, alone in zip(self.tasks, *(x.tolist() for x in (self.start, self.shared, self.alone))):
            rows.append([printable(name), *(f"{x:.4f}" for x in (start, shared, alone)), f"{shared - alone:+.4f}"])
        return rows

    def layer_rows(self) -> list[list[str]]:
        """Return the table of layers as text: the column names, then a row a layer, in the order of `layers`."""
        rows = [
            [printable(path), "" if math.isnan(cosine) else f"{cosine:+.2f}", "" if math.isnan(own) else f"{own:.0%}"]
            for path, cosine, own in self.layers
        ]
        return [["layer", "cosine", "in common"], *rows]

    def facts(self) -> dict[str, str]:
        """Return what the verdict rests on, a name and a sentence each."""
        return {
            "room": f"{self.room:+.4f} ± {self.half:.4f}, of {self.learnt:.4f} that training takes off the loss",
            "task visible in the inputs": f"{self.visible:.0%}",
        }

    def __str__(self) -> str:
        layers = self.layer_rows()
        lines = [*text_table(self.task_rows()), *(f"{name}: {value}" for name, value in self.facts().items()), ""]
        if len(layers) > 1:
            lines += ["layers that pull tasks apart most:", *text_table(layers[: 1 + _SHOWN]), ""]
        return "\n".join([*lines, f"{self.verdict}: {self.advice}"])

    def to_html(self) -> str:
        """Return the page: the tables, the tasks' cosines as a heatmap, the verdict; see `reports.conflict`."""
        return conflict_page(
            self.verdict,
            self.advice,
            self.facts(),
            self.task_rows(),
            self.tasks,
            self.mean_cosines.tolist(),
            self.layer_rows(),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the page."""
        Path(path).write_text(self.to_html(), encoding="utf-8")


def task_conflict(
    model: nn.Module,
    mixture: TaskMixture | Mapping[str, Any],
    collator: Callable[[list[dict[str, Any]]], Any],
    *,
    target_modules: str | Sequence[str] = "all-linear",
    trained: Sequence[str] = (),
    r: int = 8,
    alpha: float = 16,
    learning_rate: float = 2e-3,
    steps: int = 100,
    batch_size: int = 4,
    held_out: float = 0.25,
    seeds: Sequence[int] = (0, 1, 2),
    expect: Callable[[float], None] | None = None,
) -> TaskConflict:
    """Train one adapter for all tasks and one for each, and compare them on held-out examples.

    The adapters are PEFT's LoRA, of r ranks for each task and of r · T for all. Its scale is that of an adapter of
    r ranks over √T: at the same scale a wide adapter's update grows with its ranks, and at the rate that suits a narrow
    one it may diverge (Kalajdzievski, arXiv 2312.03732), which looked like conflict. They are taken out
    again: the model is afterwards what it was. The cost is that of 2 · seeds · steps steps of T · batch_size examples.

    Args:
        model: A model without adapters whose output has a `loss`.
        mixture: The tasks' examples, a few hundred each: a `TaskMixture`, or task name to dataset.
        collator: Makes a batch of a list of examples, their task ids left out. Where the model's forward takes
            `task_ids`, the batch gets them.
        target_modules: What to adapt, as in `LoraConfig`.
        trained: Names of modules that are trained in full beside the adapters, a classifier's head for instance; all
            tasks share them in both ways.
        r: Ranks a task.
        alpha: The scale of an adapter of r ranks is alpha / r.
        learning_rate: AdamW's; it falls linearly to nothing.
        steps: Steps of each training.
        batch_size: Examples of each task in a step.
        held_out: The share of each task's examples that is held out.
        seeds: Of the trainings; the interval is over them. 2 to 10.
        expect: Told, after the first steps, about how many seconds everything takes from there.

    Raises:
        ValueError: One task alone, too few examples, steps or seeds, an adapted model, or an output without a loss.

    Example:
        >>> found = task_conflict(model, {"cola": cola, "rte": rte}, collator, trained=["score"])  # doctest: +SKIP
        >>> found.verdict  # doctest: +SKIP
        'none'
    """
    mixture = mixture if isinstance(mixture, TaskMixture) else TaskMixture(mixture)
    tasks = list(mixture.parts)
    if steps < 1:
        raise ValueError(f"steps={steps}: expected at least 1.")
    _check(model, mixture, seeds, batch_size, held_out)
    examples = TaskExamples(model, mixture, collator, batch_size, held_out)
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    losses: dict[int, list[Tensor]] = {1: [], len(tasks): []}
    found_cosines: dict[str, list[Tensor]] = {}
    found_common: dict[str, list[float]] = {}
    watch = _Watch(expect, _steps(examples, steps, len(seeds)))
    with as_it_was(model):
        visible = visibility(model, examples, LoraConfig(r=1, target_modules=targets))
        with adapted(model, LoraConfig(r=1, target_modules=targets), 1, trained, seeds[0]) as adapters:
            start = adapters.evaluate(examples)  # A new adapter changes nothing.
        for seed in seeds:
            for count, found in losses.items():
                # As many ranks in all; with alpha as their root a wide adapter learns as steadily as a narrow one.
                more = len(tasks) // count
                config = LoraConfig(r=r * more, lora_alpha=alpha * more**0.5, target_modules=targets)
                with adapted(model, config, count, trained, seed) as adapters:
                    adapters.train(examples, learning_rate, steps, seed, watch.stepped)
                    found.append(adapters.evaluate(examples))
                    if count == 1:
                        for path, gradients in adapters.gradients(examples).items():
                            found_cosines.setdefault(path, []).append(cosines(gradients))
                            found_common.setdefault(path, []).append(common_energy(gradients, r))
    rooms = [float((shared - alone).mean()) for shared, alone in zip(*losses.values())]
    half = _T95[len(rooms) - 2] * statistics.stdev(rooms) / math.sqrt(len(rooms))
    shared, alone = (torch.stack(found).mean(0) for found in losses.values())
    mean = {path: torch.stack(each).nanmean(0) for path, each in found_cosines.items()}
    common = {path: float(torch.tensor(each).nanmean()) for path, each in found_common.items()}
    return TaskConflict(tasks, start, shared, alone, statistics.fmean(rooms), half, visible, mean, common)


class _Watch:
    """Times the first steps and tells how long all of it takes.

    Args:
        expect: Told the seconds, once; None: nobody.
        steps: What is to be done, counted in steps.
    """

    def __init__(self, expect: Callable[[float], None] | None, steps: float) -> None:
        self.expect, self.steps, self.start = expect, steps, 0.0

    def stepped(self, step: int) -> None:
        if step == 1:
            self.start = time.perf_counter()
        if step == 1 + _TIMED and self.expect is not None:
            self.expect((time.perf_counter() - self.start) / _TIMED * self.steps)
            self.expect = None


def _steps(examples: TaskExamples, steps: int, seeds: int) -> float:
    # A forward pass is about a third of a step.
    held_out = sum(len(part) for part in examples.parts) - sum(examples.train_sizes)
    step = examples.size * len(examples)
    return seeds * (2 * steps + sum(examples.train_sizes) / step + 2 * held_out / step / 3)


def _check(model: nn.Module, mixture: TaskMixture, seeds: Sequence[int], size: int, held_out: float) -> None:
    if len(mixture.parts) < 2:
        raise ValueError(f"The mixture holds {list(mixture.parts)} alone: conflict is between at least two tasks.")
    if not 2 <= len(seeds) <= len(_T95) + 1:
        raise ValueError(f"seeds={list(seeds)}: expected 2 to {len(_T95) + 1}, an interval is over them.")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out}: expected a share between 0 and 1.")
    for name, part in mixture.parts.items():
        if len(part) - max(size, round(held_out * len(part))) < 2 * size:
            raise ValueError(
                f"Task {name!r} has {len(part)} examples: too few for batches of {size} and what is held out."
            )
    for path, module in model.named_modules():
        if isinstance(module, (PeftModel, BaseTunerLayer)):
            raise ValueError(f"{path or 'model'} has an adapter already: pass the model without one.")
