"""Sequence classification with a shared encoder and a head per task.

The encoder holds the adapter. A head is one linear layer on the pooled hidden states: over a task's classes, or a
single output for a task whose labels are numbers. Tasks may share a head where their label sets are the same.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from .context import check_task_ids
from .model import routing_scopes
from .routing import pool_examples
from .storage import PairNames, check_tensor, is_finite, parse_weights, read_pair, read_weights, write_pair

HEADS_CONFIG = "heads.json"
HEADS_FILES = PairNames(HEADS_CONFIG, "heads.safetensors")
_POOLINGS = ("mean", "first", "last")


@dataclass
class HeadSpec:
    """What a task's head predicts.

    Args:
        labels: Names of the classes in the order of their numbers; None: the labels are numbers (regression).
        head: Name of the head, for tasks that share one; None: the task's own.
        offset: Regression: subtracted from labels, and `scale` divides them, before the squared error; predictions
            are in the labels' own units.
        scale: Regression, see `offset`.

    Example:
        >>> HeadSpec(labels=["no", "yes"]).width
        2
    """

    labels: list[str] | None = None
    head: str | None = None
    offset: float = 0.0
    scale: float = 1.0

    @property
    def width(self) -> int:
        """Outputs of the head."""
        return 1 if self.labels is None else len(self.labels)


def check_heads(heads: Mapping[str, HeadSpec]) -> None:
    """Check that heads have labels and that tasks which share a head agree on them.

    Raises:
        ValueError: No head, fewer than two classes, a class named twice, or label sets that clash in one head.
    """
    if not heads:
        raise ValueError("heads is empty: expected {task: HeadSpec(...)}.")
    first: dict[str, str] = {}
    for task, spec in heads.items():
        if spec.labels is not None and (len(spec.labels) < 2 or len(set(spec.labels)) < len(spec.labels)):
            raise ValueError(f"Task {task!r}: labels {spec.labels}: expected at least two, each once.")
        if not spec.scale > 0:
            raise ValueError(f"Task {task!r}: scale={spec.scale}: expected more than 0.")
        owner = first.setdefault(spec.head or task, task)
        if asdict(heads[owner]) | {"head": None} != asdict(spec) | {"head": None}:
            raise ValueError(
                f"Tasks {owner!r} and {task!r} share the head {spec.head or task!r} and their labels clash: "
                f"{_described(heads[owner])} and {_described(spec)}. Give each a head of its own, or the same labels."
            )


def _described(spec: HeadSpec) -> str:
    numbers = f"numbers (offset {spec.offset:g}, scale {spec.scale:g})"
    return numbers if spec.labels is None else str(spec.labels)


class MultiTaskClassifier(nn.Module):
    """A shared encoder with a head per task.

    Args:
        encoder: A transformers encoder that returns `last_hidden_state`, with or without an adapter.
        heads: Task name to `HeadSpec`, in the order of the task ids.
        pooling: "mean" over the non-padding tokens, the "first" or the "last" of them.
        dropout: On the pooled vector.

    Raises:
        ValueError: Heads clash (see `check_heads`), or the pooling is unknown.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> encoder = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
        >>> model = MultiTaskClassifier(encoder, {"cola": HeadSpec(labels=["no", "yes"]), "stsb": HeadSpec()})
        >>> ids = torch.tensor([[5, 6], [7, 8]])
        >>> model(input_ids=ids, task_ids=torch.tensor([0, 1])).logits.shape
        torch.Size([2, 2])
    """

    def __init__(
        self, encoder: Any, heads: Mapping[str, HeadSpec], pooling: str = "mean", dropout: float = 0.0
    ) -> None:
        super().__init__()
        check_heads(heads)
        if pooling not in _POOLINGS:
            raise ValueError(f"pooling={pooling!r}: expected 'mean', 'first' or 'last'.")
        self.encoder = encoder
        self.config: Any = encoder.config  # `Trainer` looks at it
        self.specs = dict(heads)
        self.pooling = pooling
        self.dropout = nn.Dropout(dropout)
        width = encoder.config.hidden_size
        device = next(encoder.parameters()).device
        # In float32 whatever the encoder's dtype: a head is small, and it is trained from scratch.
        names = {spec.head or task: spec.width for task, spec in heads.items()}
        self.heads = nn.ModuleDict(
            {_key(name): nn.Linear(width, out, device=device, dtype=torch.float32) for name, out in names.items()}
        )

    @property
    def tasks(self) -> list[str]:
        """Task names in the order of their ids."""
        return list(self.specs)

    def add_head(self, task: str, spec: HeadSpec) -> None:
        """Give a new task, whose id is the next, a head. See `add_task` for the adapter's side.

        Raises:
            ValueError: The task has a head, or its labels clash with those of the head that it shares.
        """
        if task in self.specs:
            raise ValueError(f"Task {task!r} has a head already; the tasks are {self.tasks}.")
        check_heads({**self.specs, task: spec})
        self.specs[task] = spec
        if _key(name := spec.head or task) not in self.heads:
            old: Any = next(iter(self.heads.values()))
            self.heads[_key(name)] = nn.Linear(old.in_features, spec.width, device=old.weight.device)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        task_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Classify a batch whose examples may be of different tasks.

        Args:
            input_ids: (B, L).
            attention_mask: (B, L) true where a token is not padding.
            token_type_ids: (B, L), for encoders that take them.
            task_ids: (B,) int64; may be left out where there is one task.
            labels: (B,) class numbers, or numbers for regression tasks.

        Returns:
            loss: mean over the examples plus the adapter's auxiliary loss; logits: (B, widest head) float32, filled
            up with −inf; a regression task's prediction is in column 0.

        Raises:
            ValueError: Tasks are missing or unknown.
        """
        if task_ids is None:
            if len(self.specs) > 1:
                raise ValueError(f"task_ids are missing: expected (batch,) ids of {self.tasks}.")
            task_ids = torch.zeros(len(input_ids), dtype=torch.int64, device=input_ids.device)  # type: ignore[arg-type, union-attr]
        check_task_ids(task_ids, len(self.specs), f"the heads of {self.tasks}")
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        if any(scope.tasks for scope in routing_scopes(self.encoder)):
            inputs["task_ids"] = task_ids
        outputs = self.encoder(**inputs)
        pooled = pool_examples(outputs.last_hidden_state, attention_mask, self.pooling)
        logits, losses = self._apply_heads(self.dropout(pooled), task_ids, labels)
        auxiliary = getattr(outputs, "rank_expert_loss", None)
        loss = None
        if labels is not None:
            loss = losses.mean() if auxiliary is None else losses.mean() + auxiliary
        result = SequenceClassifierOutput(loss=loss, logits=logits)
        if auxiliary is not None:
            result.rank_expert_loss = auxiliary
        return result

    def _apply_heads(self, pooled: Tensor, task_ids: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        # (B, width) logits and (B,) losses. Every head sees every row and a mask chooses: picking rows by index would
        # make the host wait for the accelerator once a task, and a head is small.
        widest = max(spec.width for spec in self.specs.values())
        logits = pooled.new_full((len(pooled), widest), float("-inf"), dtype=torch.float32)
        losses = pooled.new_zeros(len(pooled), dtype=torch.float32)
        for task_id, (task, spec) in enumerate(self.specs.items()):
            own = task_ids == task_id
            with torch.autocast(pooled.device.type, enabled=False):
                out = self.heads[_key(spec.head or task)](pooled.float())
                if labels is not None:
                    losses = torch.where(own, self._losses(out, labels.masked_fill(~own, 0), spec), losses)
            if spec.labels is None:
                out = out * spec.scale + spec.offset
            out = F.pad(out, (0, widest - spec.width), value=float("-inf"))
            logits = torch.where(own[:, None], out, logits)
        return logits, losses

    @staticmethod
    def _losses(out: Tensor, labels: Tensor, spec: HeadSpec) -> Tensor:
        if spec.labels is None:
            return F.mse_loss(out[:, 0], (labels.float() - spec.offset) / spec.scale, reduction="none")
        return F.cross_entropy(out, labels.long(), reduction="none")

    def predictions(self, logits: Any, task: str) -> Any:
        """Return class numbers, or numbers for a regression task, of one task's logits (N, W) or an array of them."""
        spec = self.specs[task]
        return logits[:, 0] if spec.labels is None else logits[:, : spec.width].argmax(-1)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Enable it in the encoder."""
        self.encoder.gradient_checkpointing_enable(**kwargs)

    def save_heads(self, path: str | os.PathLike[str]) -> None:
        """Write `heads.json` and `heads.safetensors` into a folder, beside the adapter's files, in one step.

        Raises:
            ValueError: A head has values that are not finite; nothing is written then.
            OSError: The disk is full, or the folder cannot be written; what was there before is unchanged.
        """
        for name, tensor in self.heads.state_dict().items():
            if not is_finite(tensor):
                raise ValueError(f"{name} has values that are not finite: the training diverged. Nothing is written.")
        description = {"pooling": self.pooling, "heads": {task: asdict(spec) for task, spec in self.specs.items()}}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.heads.state_dict().items()}
        write_pair(Path(path), json.dumps(description, indent=2) + "\n", tensors, HEADS_FILES)

    def load_heads(self, path: str | os.PathLike[str]) -> None:
        """Read the heads of a folder back into this model.

        Raises:
            FileNotFoundError: There are none.
            ValueError: The files are damaged, or the tasks or the shapes of their heads differ; nothing is loaded then.
        """
        specs, _, tensors = _read(Path(path))
        if specs != self.specs:
            raise ValueError(f"{path} has the heads {specs}; the model has {self.specs}.")
        _check_fit(Path(path), tensors, self.config.hidden_size)
        self.heads.load_state_dict(tensors)


def read_heads(path: str | os.PathLike[str]) -> tuple[dict[str, HeadSpec], str]:
    """Return the heads' specs and the pooling that `save_heads` wrote.

    Raises:
        FileNotFoundError: The folder holds no heads.
        ValueError: A file is damaged, or lies outside of the folder.
    """
    return _read(Path(path))[:2]


def _read(folder: Path) -> tuple[dict[str, HeadSpec], str, dict[str, Tensor]]:
    # Checked against each other, so that what is allocated for them is no more than what the files hold.
    pair = read_pair(folder, names=HEADS_FILES)
    file = folder / HEADS_CONFIG
    try:
        description = json.loads(pair.config)
        specs = {task: HeadSpec(**spec) for task, spec in description["heads"].items()}
        for task, spec in specs.items():
            _check_spec(task, spec)
        check_heads(specs)
        if (pooling := description["pooling"]) not in _POOLINGS:
            raise ValueError(f"pooling={pooling!r}: expected 'mean', 'first' or 'last'")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {error!r}.") from None
    weights = read_weights(folder, name=HEADS_FILES.weights) if pair.weights is None else pair.weights
    tensors = parse_weights(folder / HEADS_FILES.weights, weights)
    widths = {_key(spec.head or task): spec.width for task, spec in specs.items()}
    expected = {f"{key}.{leaf}" for key in widths for leaf in ("weight", "bias")}
    if differing := sorted(expected ^ tensors.keys()):
        raise ValueError(f"{folder / HEADS_FILES.weights} does not fit {file}: {differing[0]} is in one of them alone.")
    for name, tensor in tensors.items():
        key, _, leaf = name.rpartition(".")
        inputs = tuple(tensor.shape[1:]) if leaf == "weight" and tensor.dim() == 2 else (0,)
        shape = (widths[key], *inputs) if leaf == "weight" else (widths[key],)
        check_tensor(f"{folder / HEADS_FILES.weights}: {name}", tensor, shape)
    return specs, pooling, tensors


def _check_spec(task: str, spec: HeadSpec) -> None:
    labels = spec.labels
    if labels is not None and not (isinstance(labels, list) and all(isinstance(label, str) for label in labels)):
        raise TypeError(f"task {task!r}: labels={labels!r}: expected a list of names, or null")
    if spec.head is not None and not isinstance(spec.head, str):
        raise TypeError(f"task {task!r}: head={spec.head!r}: expected a name, or null")
    for name in ("offset", "scale"):
        value = getattr(spec, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise TypeError(f"task {task!r}: {name}={value!r}: expected a number")


def _check_fit(folder: Path, tensors: dict[str, Tensor], width: int) -> None:
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and tensor.shape[1] != width:
            raise ValueError(
                f"{folder / HEADS_FILES.weights} does not fit the encoder: {name} takes {tensor.shape[1]} inputs, the "
                f"encoder gives {width}. Is this the model that the heads were trained on?"
            )


def load_classifier(encoder: Any, path: str | os.PathLike[str]) -> MultiTaskClassifier:
    """Build a classifier around an encoder (with its adapter) from the heads of a folder.

    Raises:
        FileNotFoundError: The folder holds no heads.
        ValueError: A file is damaged, or the heads do not fit the encoder's width.

    Example:
        >>> model = load_classifier(load_rank_experts(encoder, path), path)  # doctest: +SKIP
    """
    specs, pooling, tensors = _read(Path(path))
    _check_fit(Path(path), tensors, encoder.config.hidden_size)
    model = MultiTaskClassifier(encoder, specs, pooling)
    model.heads.load_state_dict(tensors)
    return model


def regression_spec(labels: Sequence[float], head: str | None = None) -> HeadSpec:
    """Return a regression head whose offset and scale are the training labels' mean and standard deviation.

    Example:
        >>> regression_spec([0.0, 2.0]).offset
        1.0
    """
    values = torch.tensor([float(value) for value in labels], dtype=torch.float64)
    scale = float(values.std(correction=0)) if len(values) > 1 else 1.0
    return HeadSpec(head=head, offset=round(float(values.mean()), 6), scale=round(scale, 6) or 1.0)


def _key(name: str) -> str:
    # ModuleDict's keys may hold no dot and may not be named as one of its methods.
    return "head_" + name.replace(".", "_dot_")
