"""Short trainings of PEFT's LoRA on tasks, one adapter for all or one for each, that leave the model as it was.

What `conflict` compares: how they are trained, what they are worth on held-out examples, which way the tasks' gradients
point, and whether the layers' inputs give the task away.
"""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from .gradients import LayerGradients
from .mixtures import TASK_COLUMN, TaskCollator, TaskMixture


class TaskExamples:
    """Each task's examples, those to train on first, as batches of one task.

    Args:
        model: Tells the device, and whether its forward takes `task_ids`.
        mixture: The examples.
        collator: Makes a batch of a list of examples.
        size: Examples a batch.
        held_out: The share that is held out, a batch at least.
    """

    def __init__(
        self,
        model: nn.Module,
        mixture: TaskMixture,
        collator: Callable[[list[dict[str, Any]]], Any],
        size: int,
        held_out: float,
    ) -> None:
        self.parts = list(mixture.parts.values())
        self.size = size
        self.train_sizes = [len(part) - max(size, round(held_out * len(part))) for part in self.parts]
        self.collate = TaskCollator(collator)
        self.takes_tasks = "task_ids" in inspect.signature(model.forward).parameters
        self.device = next(model.parameters()).device

    def __len__(self) -> int:
        return len(self.parts)

    def batch(self, task: int, rows: Sequence[int]) -> dict[str, Any]:
        """Return some of a task's examples as the model takes them."""
        batch = dict(self.collate([self.parts[task][row] for row in rows]))
        if not self.takes_tasks:
            del batch[TASK_COLUMN]
        return {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in batch.items()}

    def stream(self, task: int, generator: torch.Generator) -> Iterator[dict[str, Any]]:
        """Yield batches to train on without end, every example once an epoch but for a rest."""
        while True:
            for rows in torch.randperm(self.train_sizes[task], generator=generator).split(self.size):
                if len(rows) == self.size:
                    yield self.batch(task, rows.tolist())

    def train_batches(self, task: int) -> Iterator[dict[str, Any]]:
        """Yield what a task trains on, once, in order."""
        yield from self._cut(task, 0, self.train_sizes[task])

    def held_out_batches(self, task: int) -> Iterator[dict[str, Any]]:
        """Yield what a task does not train on."""
        yield from self._cut(task, self.train_sizes[task], len(self.parts[task]))

    def _cut(self, task: int, start: int, end: int) -> Iterator[dict[str, Any]]:
        for first in range(start, end, self.size):
            yield self.batch(task, range(first, min(first + self.size, end)))


class Adapters:
    """LoRA adapters in a model: one, or one for each task.

    Args:
        model: PEFT's, with the adapters in it.
        count: 1, or the number of tasks.
    """

    def __init__(self, model: PeftModel, count: int) -> None:
        self.model, self.count = model, count
        self.layers = {
            path.removeprefix("base_model.model."): module
            for path, module in model.named_modules()
            if isinstance(module, LoraLayer)
        }

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (layer's path, parameter) of every adapter."""
        for path, layer in self.layers.items():
            for name in layer.adapter_layer_names:
                for parameter in getattr(layer, name).parameters():
                    yield path, parameter

    def switch(self, task: int) -> None:
        """Let a task's adapter compute; all of them go on training."""
        if self.count > 1:
            self.model.set_adapter(_name(task))
        for _, parameter in self.parameters():
            parameter.requires_grad_(True)

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Return the model's loss.

        Raises:
            ValueError: It gives none.
        """
        loss = getattr(self.model(**batch), "loss", None)
        if loss is None:
            raise ValueError("The model's output has no loss: does the collator give what it needs, labels above all?")
        return loss

    def train(
        self, examples: TaskExamples, rate: float, steps: int, seed: int, stepped: Callable[[int], None] | None = None
    ) -> None:
        """Train by AdamW, a batch of each task in a step, the rate falling linearly to nothing.

        Args:
            examples: The tasks'.
            rate: The first learning rate.
            steps: How many.
            seed: Of the examples' order.
            stepped: Told the step's number after each, from 1.
        """
        own = [parameter for _, parameter in self.parameters()]
        adapters = {id(parameter) for parameter in own}
        trained = own + [p for p in self.model.parameters() if p.requires_grad and id(p) not in adapters]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        generator = torch.Generator().manual_seed(seed)
        streams = [examples.stream(task, generator) for task in range(len(examples))]
        self.model.train()
        for step in range(1, steps + 1):
            for task, stream in enumerate(streams):
                self.switch(task)
                (self.loss(next(stream)) / len(streams)).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if stepped is not None:
                stepped(step)

    @torch.no_grad()
    def evaluate(self, examples: TaskExamples) -> Tensor:
        """Return the held-out loss of each task, (T,)."""
        self.model.eval()
        found = []
        for task in range(len(examples)):
            self.switch(task)
            found.append(statistics.fmean(float(self.loss(batch)) for batch in examples.held_out_batches(task)))
        return torch.tensor(found)

    def gradients(self, examples: TaskExamples) -> dict[str, LayerGradients]:
        """Return layer's path to the gradients of the tasks' losses by a shared adapter."""
        self.model.train()
        halves: dict[str, list[list[Tensor]]] = {path: [[], []] for path in self.layers}
        for task in range(len(examples)):
            batches = list(examples.train_batches(task))
            for half, own in enumerate((batches[::2], batches[1::2])):
                self.model.zero_grad()
                for batch in own:
                    self.loss(batch).backward()
                gradients: dict[str, list[Tensor]] = {}
                for path, parameter in self.parameters():
                    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    gradients.setdefault(path, []).append(gradient.flatten().float().cpu())
                for path, parts in gradients.items():
                    halves[path][half].append(torch.cat(parts))
        first: dict[str, nn.Parameter] = {}  # A comes before B.
        for path, parameter in self.parameters():
            first.setdefault(path, parameter)
        return {
            path: LayerGradients(
                torch.stack([torch.stack(own) for own in found]), (len(first[path]), first[path][0].numel())
            )
            for path, found in halves.items()
        }


@contextmanager
def adapted(model: nn.Module, config: LoraConfig, count: int, trained: Sequence[str], seed: int) -> Iterator[Adapters]:
    """Put `count` adapters into a model and take them out again; modules that train in full get their weights back."""
    kept = {name: {k: v.clone() for k, v in model.get_submodule(name).state_dict().items()} for name in trained}
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, config, adapter_name=_name(0))
    try:
        for task in range(1, count):
            wrapped.add_adapter(_name(task), config)
        for name in trained:
            model.get_submodule(name).requires_grad_(True)
        yield Adapters(wrapped, count)
    finally:
        wrapped.unload()
        if hasattr(model, "peft_config"):
            del model.peft_config
        for name, values in kept.items():
            model.get_submodule(name).load_state_dict(values)


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Give back, afterwards, what trains, what is in training mode, and the random numbers' state; drop gradients."""
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    state, on_gpus = torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
            parameter.grad = None
        for name, module in model.named_modules():
            module.training = modes[name]
        torch.set_rng_state(state)
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)


@torch.no_grad()
def visibility(model: nn.Module, examples: TaskExamples, config: LoraConfig) -> float:
    """Return the share of held-out examples whose task an adapted layer's input gives away, of the layer with most.

    An example is the mean of the layer's input over its tokens; the nearest of the tasks' means names its task.
    """
    with adapted(model, config, 1, (), 0) as adapters:
        adapters.model.eval()
        known = _pooled(adapters, examples, TaskExamples.train_batches)
        new = _pooled(adapters, examples, TaskExamples.held_out_batches)
    shares = []
    for path, own in known.items():
        means = torch.stack([rows.mean(0) for rows in own])
        right = [torch.cdist(rows, means).argmin(1) == task for task, rows in enumerate(new[path])]
        shares.append(statistics.fmean(float(each.float().mean()) for each in right))
    return max(shares)


def _pooled(adapters: Adapters, examples: TaskExamples, batches: Callable[..., Any]) -> dict[str, list[Tensor]]:
    # Layer's path to each task's (examples, d).
    seen: dict[str, Tensor] = {}
    pooled: dict[str, list[list[Tensor]]] = {path: [[] for _ in range(len(examples))] for path in adapters.layers}
    layers: dict[str, Any] = adapters.layers
    hooks = [layer.register_forward_pre_hook(partial(_note, seen, path)) for path, layer in layers.items()]
    try:
        for task in range(len(examples)):
            for batch in batches(examples, task):
                adapters.model(**batch)
                for path, x in seen.items():
                    pooled[path][task].append(_mean(x, batch.get("attention_mask")).cpu())
                seen.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return {path: [torch.cat(rows) for rows in tasks] for path, tasks in pooled.items() if all(tasks)}


def _note(seen: dict[str, Tensor], path: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
    seen[path] = args[0]


def _mean(x: Tensor, mask: Any) -> Tensor:
    # (B, …, d) → (B, d), over what is not padding.
    x = x.float()
    if x.dim() == 3 and isinstance(mask, Tensor) and mask.shape == x.shape[:2]:
        return (x * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
    return x if x.dim() == 2 else x.flatten(1, -2).mean(1)


def _name(task: int) -> str:
    # A task may be called anything, an adapter may not.
    return f"task{task}"
