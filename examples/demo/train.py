"""Training one adapter and its heads, and what they predict."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, get_linear_schedule_with_warmup

from rank_experts import update_router_bias

from .batches import Features, evaluation_batches, training_batches
from .model import MultiTaskModel

HEAD_LEARNING_RATE = 1e-3
WARMUP = 0.1  # share of the steps
MAX_GRAD_NORM = 1.0
EVALUATION_BATCH = 64


class TrainingSettings(NamedTuple):
    """How to train: the adapter's learning rate, optimiser steps, examples a step, the seed of the batches."""

    learning_rate: float
    steps: int
    batch_size: int
    seed: int


def train(
    model: MultiTaskModel,
    encoded: Mapping[str, list[Features]],
    tokenizer: PreTrainedTokenizerBase,
    settings: TrainingSettings,
    name: str,
) -> float:
    """Train an adapter and the heads with AdamW, a warm-up and a linear decay.

    Args:
        model: With its adapter attached.
        encoded: The training examples by task.
        tokenizer: Pads the batches.
        settings: The same ones give the same batches in the same order.
        name: Shown beside the progress bar.

    Returns:
        Seconds.
    """
    steps = settings.steps
    adapter = [parameter for parameter in model.encoder.parameters() if parameter.requires_grad]
    groups = [
        {"params": adapter, "lr": settings.learning_rate},
        {"params": list(model.heads.parameters()), "lr": HEAD_LEARNING_RATE},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, round(WARMUP * steps), steps)
    batches = training_batches(encoded, tokenizer, settings.batch_size, settings.seed)
    model.train()
    start = time.perf_counter()
    with tqdm(total=steps, desc=name.ljust(6), unit="step") as progress:
        for _ in range(steps):
            loss = model(**next(batches)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(adapter, MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            update_router_bias(model.encoder)
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            progress.update()
    return time.perf_counter() - start


@torch.no_grad()
def predict(
    model: MultiTaskModel, encoded: Mapping[str, list[Features]], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Tensor]:
    """Return every task's logits (N, C), float32, in evaluation mode and the examples' order."""
    model.eval()
    logits = {}
    for task, features in encoded.items():
        batches = evaluation_batches(features, tokenizer, EVALUATION_BATCH)
        logits[task] = torch.cat([model(**{**batch, "labels": None}).logits for batch in batches])
    return logits


def accuracy(logits: Mapping[str, Tensor], encoded: Mapping[str, list[Features]]) -> dict[str, float]:
    """Return the share of right predictions by task."""
    scores = {}
    for task, features in encoded.items():
        labels = torch.tensor([each["label"] for each in features])
        scores[task] = (logits[task].argmax(-1) == labels).float().mean().item()
    return scores
