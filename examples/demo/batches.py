"""From examples to batches of token ids: every training batch holds all tasks in equal parts."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from .tasks import TASKS, Example

MAX_TOKENS = 64
WINDOW = 8  # batches whose examples are sorted by length together

Features = dict[str, Any]  # of one example: token ids, label, task_ids (its task's id)


def encode(examples: Mapping[str, list[Example]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Features]]:
    """Tokenise every task's examples, pairs as "[CLS] text [SEP] pair [SEP]", cut to `MAX_TOKENS`."""
    encoded = {}
    for task_id, task in enumerate(TASKS):
        texts = [each.text if each.pair is None else (each.text, each.pair) for each in examples[task]]
        tokens = tokenizer(texts, truncation=True, max_length=MAX_TOKENS)
        encoded[task] = [
            {**{key: tokens[key][row] for key in tokens}, "label": each.label, "task_ids": task_id}
            for row, each in enumerate(examples[task])
        ]
    return encoded


def training_batches(
    encoded: Mapping[str, list[Features]], tokenizer: PreTrainedTokenizerBase, batch_size: int, seed: int
) -> Iterator[Mapping[str, Tensor]]:
    """Yield mixed-task batches without end, every task's examples in a new order each time they are used up.

    Within a window of `WINDOW` batches, each task's examples are sorted by length, so that a batch pads little.

    Args:
        encoded: From `encode`.
        tokenizer: Pads.
        batch_size: A multiple of the number of tasks.
        seed: Of the order.

    Raises:
        ValueError: The batch size is no such multiple.
    """
    share, rest = divmod(batch_size, len(encoded))
    if rest or not share:
        raise ValueError(f"batch_size={batch_size}: expected a multiple of {len(encoded)}, the number of tasks.")
    rng = random.Random(seed)
    collate = DataCollatorWithPadding(tokenizer)
    streams = [_endless(features, rng) for features in encoded.values()]
    while True:
        batches: list[list[Features]] = [[] for _ in range(WINDOW)]
        for stream in streams:
            window = sorted((next(stream) for _ in range(WINDOW * share)), key=_length)
            for place, batch in enumerate(batches):
                batch += window[place * share : (place + 1) * share]
        rng.shuffle(batches)
        yield from map(collate, batches)


def evaluation_batches(
    features: list[Features], tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> Iterator[Mapping[str, Tensor]]:
    """Yield one task's examples in their order."""
    collate = DataCollatorWithPadding(tokenizer)
    for start in range(0, len(features), batch_size):
        yield collate(features[start : start + batch_size])


def _endless(features: list[Features], rng: random.Random) -> Iterator[Features]:
    while True:
        yield from rng.sample(features, len(features))


def _length(features: Features) -> int:
    return len(features["input_ids"])
