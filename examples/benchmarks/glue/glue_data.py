"""GLUE for the benchmark: seven tasks from a folder of parquet files or from the Hub, tokenised once.

The folder holds `<task>/<split>.parquet` (any file whose name starts with the split). Where a training set is not
among the files, a split of what is there takes its place, as `SPLITS` says; such a figure does not compare with the
leaderboard's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rank_experts.training import HeadSpec, regression_spec

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class GlueTask:
    """One task: its columns, its classes (None: numbers) and its metrics, the first of which counts in the mean."""

    columns: tuple[str, ...]
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]


TASKS = {
    "cola": GlueTask(("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
    "mrpc": GlueTask(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    "rte": GlueTask(("sentence1", "sentence2"), ("entailment", "not_entailment"), ("accuracy",)),
    "stsb": GlueTask(("sentence1", "sentence2"), None, ("pearson", "spearman")),
    "mnli": GlueTask(("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ("accuracy",)),
    "qnli": GlueTask(("question", "sentence"), ("entailment", "not_entailment"), ("accuracy",)),
    "sst2": GlueTask(("sentence",), ("negative", "positive"), ("accuracy",)),
}

Part = tuple[str, Callable[[Row], bool]]


def _all(row: Row) -> bool:
    return True


# (split, filter) to train on and to evaluate on, for the small folder.
SPLITS: dict[str, tuple[Part, Part]] = {
    "cola": (("train", _all), ("validation", _all)),
    "mrpc": (("train", _all), ("validation", _all)),
    "rte": (("train", _all), ("validation", _all)),
    "stsb": (("train", _all), ("validation", _all)),
    "mnli": (("validation_mismatched", _all), ("validation_matched", _all)),
    "qnli": (("validation", lambda row: row["idx"] % 5 != 0), ("validation", lambda row: row["idx"] % 5 == 0)),
    "sst2": (("validation", lambda row: row["idx"] % 5 != 0), ("validation", lambda row: row["idx"] % 5 == 0)),
}

HUB_NAME = "nyu-mll/glue"


@dataclasses.dataclass
class Examples:
    """Tokenised examples of one task: token ids, token types and labels."""

    input_ids: list[list[int]]
    types: list[list[int]]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def lengths(self) -> Tensor:
        return torch.tensor([len(row) for row in self.input_ids])

    def take(self, rows: Sequence[int]) -> Examples:
        return Examples([self.input_ids[i] for i in rows], [self.types[i] for i in rows], self.labels[list(rows)])


@dataclasses.dataclass
class TaskData:
    """One task's sets: the learning rate is chosen on `dev`, held out of the training data; `test` is reported."""

    train: Examples
    dev: Examples
    test: Examples


def read_rows(folder: Path | None, task: str, which: int) -> list[Row]:
    """Return a task's rows to train on (which=0) or to evaluate on (which=1), from the folder or from the Hub."""
    if folder is None:
        import datasets

        split = "train" if which == 0 else "validation_matched" if task == "mnli" else "validation"
        return datasets.load_dataset(HUB_NAME, task, split=split).to_list()
    import pyarrow.parquet

    split, keep = SPLITS[task][which]
    # "validation_m…" must not pass for "validation".
    files = [file for file in sorted((folder / task).glob("*.parquet")) if file.stem.split("-")[0] == split]
    if not files:
        raise FileNotFoundError(f"{folder / task} holds no {split}.parquet. Pass the GLUE folder, or --from-hub.")
    rows = [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]
    return [row for row in rows if keep(row)]


def tokenise(rows: list[Row], task: str, tokenizer: Any, max_length: int) -> Examples:
    """Tokenise rows; pairs as pairs, cut to `max_length` tokens."""
    texts = [[str(row[column]) for row in rows] for column in TASKS[task].columns]
    encoded = tokenizer(*texts, truncation=True, max_length=max_length, return_token_type_ids=True)
    labels = torch.tensor([float(row["label"]) for row in rows])
    return Examples(encoded["input_ids"], encoded["token_type_ids"], labels)


def load(
    folder: Path | None,
    tasks: Sequence[str],
    tokenizer: Any,
    max_length: int,
    limit: int | None,
    eval_limit: int | None,
) -> dict[str, TaskData]:
    """Load and tokenise tasks. A tenth of the training data, at most 500 examples, becomes `dev`, by a fixed seed."""
    loaded = {}
    for task in tasks:
        train = tokenise(read_rows(folder, task, 0), task, tokenizer, max_length)
        test = tokenise(read_rows(folder, task, 1), task, tokenizer, max_length)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
        held_out = min(500, len(train) // 10)
        rest = order[held_out:] if limit is None else order[held_out : held_out + limit]
        # Every n-th, so that a limit keeps the labels' shares.
        step = 1 if eval_limit is None else max(1, -(-len(test) // eval_limit))
        loaded[task] = TaskData(train.take(rest), train.take(order[:held_out]), test.take(range(0, len(test), step)))
    return loaded


def heads(data: dict[str, TaskData]) -> dict[str, HeadSpec]:
    """Return the specs of a head per task."""
    return {
        task: regression_spec(own.train.labels.tolist())
        if TASKS[task].labels is None
        else HeadSpec(labels=list(TASKS[task].labels or ()))
        for task, own in data.items()
    }


def collate(examples: Examples, rows: Sequence[int], task_ids: Tensor, device: torch.device) -> dict[str, Tensor]:
    """Pad rows of tokenised examples into a batch on a device."""
    length = max(len(examples.input_ids[i]) for i in rows)
    ids, types, mask = (torch.zeros(len(rows), length, dtype=torch.int64) for _ in range(3))
    for place, i in enumerate(rows):
        size = len(examples.input_ids[i])
        ids[place, :size] = torch.tensor(examples.input_ids[i])
        types[place, :size] = torch.tensor(examples.types[i])
        mask[place, :size] = 1
    batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    batch |= {"labels": examples.labels[list(rows)], "task_ids": task_ids}
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}
