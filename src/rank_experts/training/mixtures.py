"""Many tasks in one stream: mixtures of datasets, how often each task is drawn, and batches that say whose they are.

The sampling laws: proportional, uniform and temperature are multi-task learning's usual ones (T5, arXiv 1910.10683,
section 3.5.2); balanced is MoRE's, φ_t ∝ exp(|D_t| / Σ|D|) (arXiv 2505.22694, section 3).

The order of an epoch is a function of the seed, the epoch and the data's sizes, and of nothing else: no state runs
along, so a run resumes in the middle of an epoch by computing the same order and leaving out what it has seen.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..messages import nearest

TASK_COLUMN = "task_ids"
"""The column, and the key of a batch, that holds the task's id."""

LAWS = ("proportional", "uniform", "temperature", "balanced")

_BUCKET = 50
_GOLDEN = (5**0.5 - 1) / 2


class TaskMixture(Dataset):
    """Several named map-style datasets as one, whose examples carry their task's id under "task_ids".

    Args:
        datasets: Task name to a dataset with `len` and `[i]` that gives mappings (`datasets.Dataset`, a list of
            dicts, any map-style `torch.utils.data.Dataset`).
        tasks: Task names in the order of their ids, an adapter's `config.tasks`; None: the order of `datasets`. May
            hold tasks that have no dataset here.

    Attributes:
        tasks: Names in the order of their ids.
        parts: Name to `TaskPart`.
        task_ids: (n,) int64, the task of every example.

    Raises:
        ValueError: No dataset, an empty one, or a name that `tasks` lacks.
        TypeError: A dataset is not map-style.

    Example:
        >>> mixture = TaskMixture({"cola": [{"x": 1}], "rte": [{"x": 2}, {"x": 3}]})
        >>> mixture[2]
        {'x': 3, 'task_ids': 1}
    """

    def __init__(self, datasets: Mapping[str, Any], tasks: Sequence[str] | None = None) -> None:
        if not datasets:
            raise ValueError("TaskMixture needs at least one dataset: {name: dataset, ...}.")
        self.tasks = list(datasets) if tasks is None else list(tasks)
        self.parts: dict[str, TaskPart] = {}
        for name, dataset in datasets.items():
            if name not in self.tasks:
                raise ValueError(f"Task {name!r} is not among {self.tasks}.{nearest(name, self.tasks)}")
            if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
                raise TypeError(
                    f"Task {name!r}: a {type(dataset).__name__} has no length or no [index]. Expected a map-style "
                    "dataset; load a streaming one into memory first."
                )
            if len(dataset) == 0:
                raise ValueError(f"Task {name!r} has no examples. Check its file, its split and its filters.")
            self.parts[name] = TaskPart(dataset, self.tasks.index(name), name)
        self._ends = list(itertools.accumulate(len(part) for part in self.parts.values()))

    @property
    def task_ids(self) -> Tensor:
        """(n,) int64, the task of every example."""
        return torch.cat([torch.full((len(part),), part.task_id) for part in self.parts.values()])

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"Example {index} of {len(self)}.")
        which = bisect.bisect_right(self._ends, index)
        part = list(self.parts.values())[which]
        return part[index - (self._ends[which - 1] if which else 0)]


class TaskPart(Dataset):
    """One task's examples, each with its id under "task_ids"; a `TaskMixture` makes it.

    Args:
        dataset: The task's own.
        task_id: Its id.
        name: For messages.
    """

    def __init__(self, dataset: Any, task_id: int, name: str) -> None:
        self.dataset = dataset
        self.task_id = task_id
        self.name = name

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.dataset[index]
        if not isinstance(example, Mapping):
            raise TypeError(
                f"Task {self.name!r}, example {index} is a {type(example).__name__}: expected a mapping of column to "
                "value, as datasets.Dataset gives it."
            )
        return {**example, TASK_COLUMN: self.task_id}


def sampling_weights(sizes: Sequence[int], law: str = "balanced", temperature: float = 2.0) -> Tensor:
    """Return the share of each task in the stream.

    Args:
        sizes: Examples of each task, |D_t|.
        law: "proportional" |D_t| / Σ|D|, "uniform" 1 / T, "temperature" ∝ |D_t|^(1/temperature), or "balanced"
            ∝ exp(|D_t| / Σ|D|), which is MoRE's and stays within a factor e of uniform.
        temperature: 1 is proportional; the larger, the nearer to uniform.

    Returns:
        (T,) float64, adding up to 1.

    Raises:
        ValueError: An unknown law, a temperature that is not positive, or a task without examples.

    Example:
        >>> sampling_weights([100, 300], "proportional").tolist()
        [0.25, 0.75]
    """
    if law not in LAWS:
        raise ValueError(f"law={law!r}: expected one of {', '.join(map(repr, LAWS))}.{nearest(str(law), LAWS)}")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: expected more than 0; 1 is proportional.")
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes={list(sizes)}: every task needs at least one example.")
    share = torch.tensor(sizes, dtype=torch.float64)
    share = share / share.sum()
    if law == "uniform":
        share = torch.ones_like(share)
    elif law == "temperature":
        share = share ** (1 / temperature)
    elif law == "balanced":
        share = share.exp()
    return share / share.sum()


class TaskSampler(Sampler[int]):
    """Draws examples task by task in the shares of a sampling law, in an order that fits batches of a fixed size.

    Each task's count in an epoch is its share, rounded up or down so that the counts add up, and over the epochs that
    its mean is the share: a task too small for one epoch is drawn in another. Each task walks through a fresh
    permutation of its examples and goes on, in the next epoch, where it stopped. Nothing is repeated before the task
    has been through all of its examples; with law="proportional" that is an epoch.

    **How long an epoch is** is said here and nowhere else: `batches_per_epoch` batches on every rank, the largest
    number with `batches_per_epoch · batch_size · num_replicas ≤ epoch_size`, at least one.

    **Ranks.** Under accelerate, and so under `Trainer`, leave `rank` at None: the sampler gives the whole stream and
    accelerate deals its batches out in turn. In a loop of one's own give each process its `rank`; it gets the very
    same batches.

    **Resuming.** `Trainer` does it by itself. In a loop of one's own: `set_epoch(epoch, first_batch=batches_seen)`.

    Args:
        task_ids: (n,) the task of every example, `TaskMixture.task_ids` or a dataset's column.
        batch_size: Examples a batch and process.
        law: See `sampling_weights`.
        temperature: See `sampling_weights`.
        mixed: False: all examples of a batch are of one task.
        seed: Of every permutation.
        epoch_size: Examples an epoch, over all processes; None: as many as there are.
        lengths: (n,) tokens of every example: batches are made of examples of similar length, which saves padding.
        num_replicas: Data-parallel processes.
        rank: This process, or None for the whole stream.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> sampler = TaskSampler([0, 0, 0, 1, 1, 1], batch_size=2, law="uniform", mixed=False)
        >>> [i // 3 for i in sampler] in ([0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0])
        True
    """

    def __init__(
        self,
        task_ids: Sequence[int] | Tensor,
        batch_size: int,
        law: str = "balanced",
        temperature: float = 2.0,
        *,
        mixed: bool = True,
        seed: int = 0,
        epoch_size: int | None = None,
        lengths: Sequence[int] | Tensor | None = None,
        num_replicas: int = 1,
        rank: int | None = None,
    ) -> None:
        ids = torch.as_tensor(task_ids, dtype=torch.int64)
        if ids.dim() != 1 or len(ids) == 0:
            raise ValueError(f"task_ids have shape {tuple(ids.shape)}: expected (examples,), at least one.")
        if batch_size < 1 or num_replicas < 1 or (epoch_size is not None and epoch_size < 1):
            raise ValueError(
                f"batch_size={batch_size}, num_replicas={num_replicas}, epoch_size={epoch_size}: expected at least 1."
            )
        if rank is not None and not 0 <= rank < num_replicas:
            raise ValueError(f"rank={rank}: expected 0…{num_replicas - 1}.")
        self.lengths = None if lengths is None else torch.as_tensor(lengths)
        if self.lengths is not None and self.lengths.shape != ids.shape:
            raise ValueError(f"{len(self.lengths)} lengths for {len(ids)} examples.")
        self.batch_size = batch_size
        self.mixed = mixed
        self.seed = seed
        self.num_replicas = num_replicas
        self.rank = rank
        self.members = {int(task): (ids == task).nonzero().flatten() for task in ids.unique()}
        self.weights = sampling_weights([len(own) for own in self.members.values()], law, temperature)
        self.batches_per_epoch = max(1, (epoch_size or len(ids)) // (batch_size * num_replicas))
        self.epoch = 0
        self.first_batch = 0

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose the epoch of the next iteration, and how many of this process's batches it leaves out.

        Raises:
            ValueError: The epoch has no such batch.
        """
        if not 0 <= first_batch <= self.batches_per_epoch:
            raise ValueError(f"first_batch={first_batch}: an epoch has {self.batches_per_epoch} batches.")
        self.epoch = epoch
        self.first_batch = first_batch

    def __len__(self) -> int:
        """Examples of an epoch: of this rank, or of all where `rank` is None."""
        return self.batches_per_epoch * self.batch_size * (self.num_replicas if self.rank is None else 1)

    def __iter__(self) -> Iterator[int]:
        batches = self.order(self.epoch).view(self.batches_per_epoch, self.num_replicas, self.batch_size)
        batches = batches if self.rank is None else batches[:, self.rank]
        yield from batches[self.first_batch :].flatten().tolist()

    def counts(self, epoch: int = 0) -> dict[int, int]:
        """Return how many examples of each task id an epoch has, over all processes."""
        return dict(zip(self.members, self._counts(torch.tensor([epoch]))[0].tolist(), strict=True))

    def _counts(self, epochs: Tensor) -> Tensor:
        # (epochs, tasks). What rounding down leaves over goes round: an epoch's offset u lies somewhere in 0 … 1, and
        # a task gets one more where its stretch of the summed remainders holds an n + u. Golden steps of u spread
        # evenly, so that a task whose share is 0.01 of an example is drawn in one epoch of a hundred.
        unit = 1 if self.mixed else self.batch_size
        total = self.batches_per_epoch * self.num_replicas * (self.batch_size // unit)
        exact = (self.weights * total).round(decimals=9)
        ends = (exact - exact.floor()).cumsum(0)
        ends[-1] = total - exact.floor().sum()
        offsets = (0.5 + epochs.double() * _GOLDEN).remainder(1)[:, None]
        below = (ends - offsets).floor()
        more = below.diff(dim=1, prepend=(-offsets).floor())
        return ((exact.floor() + more) * unit).long()

    def order(self, epoch: int) -> Tensor:
        """Return the whole stream of an epoch: (batches · replicas · batch_size,) indices of examples."""
        random = self._generator(0, epoch)
        starts = self._counts(torch.arange(epoch)).sum(0)
        drawn = [
            self._draw(task, int(start), count)
            for (task, count), start in zip(self.counts(epoch).items(), starts, strict=True)
        ]
        if self.mixed:
            stream = torch.cat(drawn)
            stream = self._bucketed(stream[torch.randperm(len(stream), generator=random)])
        else:
            stream = torch.cat([self._bucketed(own) for own in drawn])
        if self.mixed and self.lengths is None:
            return stream
        batches = stream.view(-1, self.batch_size)
        return batches[torch.randperm(len(batches), generator=random)].flatten()

    def _draw(self, task: int, start: int, count: int) -> Tensor:
        # Positions start … start + count − 1 of the task's endless walk, one permutation after the other.
        members = self.members[task]
        first, last = start // len(members), (start + max(count, 1) - 1) // len(members)
        walk = [torch.randperm(len(members), generator=self._generator(1, task, c)) for c in range(first, last + 1)]
        offset = start - first * len(members)
        return members[torch.cat(walk)[offset : offset + count]]

    def _bucketed(self, stream: Tensor) -> Tensor:
        if self.lengths is None:
            return stream
        chunks = stream.split(_BUCKET * self.batch_size)
        return torch.cat([chunk[self.lengths[chunk].argsort(stable=True)] for chunk in chunks])

    def _generator(self, *keys: int) -> torch.Generator:
        state = np.random.SeedSequence([self.seed, *keys]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(state) >> 1)


class TaskCollator:
    """Wraps a collator so that the batch carries `task_ids` (batch,).

    Args:
        collator: Any that takes a list of features: `DataCollatorWithPadding`, `DataCollatorForSeq2Seq`, TRL's, …
            It does not see the task ids.

    Raises:
        ValueError: An example without a task id; a batch whose tokens are all padding or whose labels are all
            ignored, from which nothing can be learnt and whose loss would be 0 / 0.

    Example:
        >>> from transformers import default_data_collator
        >>> TaskCollator(default_data_collator)([{"x": 1, "task_ids": 0}, {"x": 2, "task_ids": 1}])["task_ids"]
        tensor([0, 1])
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], Any]) -> None:
        self.collator = collator

    @property
    def tokenizer(self) -> Any:
        """The wrapped collator's, which `Trainer` saves with a checkpoint."""
        return getattr(self.collator, "tokenizer", None)

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        """Collate a list of examples into a batch."""
        try:
            ids = torch.tensor([int(feature[TASK_COLUMN]) for feature in features])
        except KeyError:
            known = sorted({name for feature in features for name in feature})
            raise ValueError(
                f"An example has no {TASK_COLUMN!r}; it has {known}. Build the dataset with TaskMixture, or give it "
                "a column of that name."
            ) from None
        batch = self.collator([{k: v for k, v in feature.items() if k != TASK_COLUMN} for feature in features])
        mask, labels = batch.get("attention_mask"), batch.get("labels")
        if isinstance(mask, Tensor) and not mask.any():
            raise ValueError(f"A batch of {len(ids)} examples of tasks {sorted(set(ids.tolist()))} is all padding.")
        if isinstance(labels, Tensor) and labels.dim() > 1 and bool((labels == -100).all()):
            raise ValueError(
                f"A batch of {len(ids)} examples of tasks {sorted(set(ids.tolist()))} has no label that counts: are "
                "the targets cut off by the maximum length?"
            )
        batch[TASK_COLUMN] = ids
        return batch
