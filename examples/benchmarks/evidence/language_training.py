"""One training of one method on the languages: model, optimiser, a step, and what it gives on held-out texts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

from encoder import TARGETS, Classifier, Encoder, States
from language_data import CLASSES, Data, Examples
from methods import Method
from rank_experts import update_router_bias
from records import Settings

WARM_UP = 0.06


def new_classifier(encoder: Encoder, heads: int, bfloat16: bool) -> Classifier:
    """Return the upper layers with one head or several, to put an adapter into."""
    inner = encoder.classifier(CLASSES, heads)
    if bfloat16:
        # What autocast would round anew in every call. Adapters come afterwards and stay float32.
        for module in inner.encoder.modules():
            if isinstance(module, nn.Linear):
                module.to(torch.bfloat16)
    return inner


def call(
    model: nn.Module,
    method: Method,
    bfloat16: bool,
    examples: Examples,
    states: States,
    rows: Tensor,
    **inputs: Tensor,
) -> Any:
    """Apply an adapted classifier to some of the examples, by their lower layers' states; return its outputs."""
    languages = examples.languages[rows]
    if method.told:
        inputs["task_ids"] = languages
    # Without autocast's cache the frozen weights, which are bfloat16 already, cost nothing.
    with torch.autocast("cpu", torch.bfloat16) if bfloat16 else contextlib.nullcontext():
        return model(**states.batch(rows), head_ids=languages, **inputs)


class Training:
    """Holds what a run trains.

    Args:
        encoder: Gives the upper layers.
        data: The languages and their training texts.
        method: What is put into the upper layers.
        settings: The run's.
    """

    def __init__(self, encoder: Encoder, data: Data, method: Method, settings: Settings) -> None:
        self.method, self.examples, self.tasks = method, data.splits["train"], data.languages
        self.bfloat16 = settings["dtype"] == "bfloat16"
        torch.manual_seed(settings["seed"])
        inner = new_classifier(encoder, len(data.languages) if settings["heads"] == "each" else 1, self.bfloat16)
        self.model = method.attach(inner, TARGETS, settings["alpha"], data.languages)
        adapter = method.groups(inner.encoder, settings["rate"])
        self.trained_parameters = sum(p.numel() for group in adapter for p in group["params"])
        head = list(inner.head.requires_grad_(True).parameters())
        groups = [*adapter, {"params": head, "lr": settings["head_rate"]}]
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        self.schedule = get_linear_schedule_with_warmup(
            self.optimizer, round(WARM_UP * settings["steps"]), settings["steps"]
        )

    def step(self, states: States, rows: Tensor) -> None:
        """Train on some of the training texts, by their lower layers' states."""
        self.model.train()
        for own, share in self._parts(self.examples, rows):
            (self._call(self.examples, states, own, labels=self.examples.labels[own]).loss * share).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        update_router_bias(self.model)
        self.schedule.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def evaluate(self, examples: Examples, states: States, rows: Tensor) -> tuple[float, float, list[float]]:
        """Return the mean negative log-likelihood (nats), the accuracy, and the former for each language."""
        self.model.eval()
        nll, right = torch.zeros(len(examples)), torch.zeros(len(examples))
        for batch in rows[states.lengths[rows].argsort(stable=True)].split(128):
            for own, _ in self._parts(examples, batch):
                logits = self._call(examples, states, own).logits
                nll[own] = F.cross_entropy(logits, examples.labels[own], reduction="none")
                right[own] = (logits.argmax(1) == examples.labels[own]).float()
        by_language = [float(nll[rows[examples.languages[rows] == i]].mean()) for i in range(len(self.tasks))]
        return float(nll[rows].mean()), float(right[rows].mean()), by_language

    def _parts(self, examples: Examples, rows: Tensor) -> Iterator[tuple[Tensor, float]]:
        # (rows, their share of the batch): all at once, or a language at a time, with its adapter switched on.
        if not self.method.per_task:
            yield rows, 1.0
            return
        for number in examples.languages[rows].unique().tolist():
            own = rows[examples.languages[rows] == number]
            self.method.switch(self.model, self.tasks[number])
            yield own, len(own) / len(rows)

    def _call(self, examples: Examples, states: States, rows: Tensor, **inputs: Tensor) -> Any:
        return call(self.model, self.method, self.bfloat16, examples, states, rows, **inputs)
