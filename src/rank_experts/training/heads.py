"""Sequence classification with a shared encoder and a head per task.

The encoder holds the adapter. A head is one linear layer on the pooled hidden states: over a task's classes, or a
single output for a task whose labels are numbers. Tasks may share a head where their label sets are the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from ..calls.boundary import routed_forward
from ..calls.tasks import check_task_ids
from ..calls.use_task import routing_scopes
from ..files.heads import HEADS_FILES, POOLINGS, HeadSpec, check_fit, check_heads, head_key, read_heads_and_weights
from ..routing.pooling import pool_examples
from ..storage.pair import is_finite, write_pair


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
        if pooling not in POOLINGS:
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
            {head_key(name): nn.Linear(width, out, device=device, dtype=torch.float32) for name, out in names.items()}
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
        if head_key(name := spec.head or task) not in self.heads:
            old: Any = next(iter(self.heads.values()))
            self.heads[head_key(name)] = nn.Linear(old.in_features, spec.width, device=old.weight.device)

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
            ValueError: Tasks are missing or unknown. On an accelerator, whose ids are not read back, a device's
                assertion fails instead, or what no head claims is NaN.
        """
        if task_ids is None:
            if len(self.specs) > 1:
                raise ValueError(f"task_ids are missing: expected (batch,) ids of {self.tasks}.")
            task_ids = torch.zeros(len(input_ids), dtype=torch.int64, device=input_ids.device)  # type: ignore[arg-type, union-attr]
        check_task_ids(task_ids, len(self.specs), f"the heads of {self.tasks}")
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        # Looking through all modules of a large encoder takes long.
        entry = routed_forward(self.encoder)
        whole = routed_forward(self) if entry is None else entry
        scopes = routing_scopes(self.encoder) if whole is None else [whole.scope]
        if known := [tasks for scope in scopes for tasks in scope.tasks.values()]:
            self._check_order(known)
            # An adapter of the classifier as a whole has been told them.
            if entry is not None:
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

    def _check_order(self, routed: list[tuple[str, ...]]) -> None:
        # One id chooses the adapter's ranks and the head. Adapters that are not active may know other tasks.
        if not any(all(one == other for one, other in zip(self.specs, tasks, strict=False)) for tasks in routed):
            raise ValueError(
                f"The heads are for the tasks {self.tasks}, the encoder's adapter routes {list(routed[0])}: the same "
                "ids would mean different tasks. Give the heads in the adapter's order."
            )

    def _apply_heads(self, pooled: Tensor, task_ids: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        # (B, width) logits and (B,) losses. Every head sees every row and a mask chooses: picking rows by index would
        # make the host wait for the accelerator once a task, and a head is small.
        widest = max(spec.width for spec in self.specs.values())
        # What no head claims is NaN. On an accelerator nobody has looked at the ids: indexing asserts them there.
        nothing = pooled.new_full((len(self.specs),), float("nan"), dtype=torch.float32)
        losses = nothing.index_select(0, task_ids.long())
        logits = losses[:, None].expand(-1, widest)
        for task_id, (task, spec) in enumerate(self.specs.items()):
            own = task_ids == task_id
            with torch.autocast(pooled.device.type, enabled=False):
                out = self.heads[head_key(spec.head or task)](pooled.float())
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

    def description(self) -> dict[str, Any]:
        """Return what `heads.json` holds: the pooling, and each task's head, in the order of the task ids."""
        return {"pooling": self.pooling, "heads": {task: asdict(spec) for task, spec in self.specs.items()}}

    def save_heads(self, path: str | os.PathLike[str]) -> None:
        """Write `heads.json` and `heads.safetensors` into a folder, beside the adapter's files, in one step.

        Raises:
            ValueError: A head has values that are not finite; nothing is written then.
            OSError: The disk is full, or the folder cannot be written; what was there before is unchanged.
        """
        for name, tensor in self.heads.state_dict().items():
            if not is_finite(tensor):
                raise ValueError(f"{name} has values that are not finite: the training diverged. Nothing is written.")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.heads.state_dict().items()}
        write_pair(Path(path), json.dumps(self.description(), indent=2) + "\n", tensors, HEADS_FILES)

    def load_heads(self, path: str | os.PathLike[str]) -> None:
        """Read the heads of a folder back into this model.

        Raises:
            FileNotFoundError: There are none.
            ValueError: The files are damaged, or the tasks, their order, their heads or the pooling differ; nothing
                is loaded then.
        """
        self.heads.load_state_dict(self.check_heads(path))

    def check_heads(self, path: str | os.PathLike[str]) -> dict[str, Tensor]:
        """Return the tensors of a folder's heads, checked against this model; raises as `load_heads`."""
        specs, pooling, tensors = read_heads_and_weights(Path(path))
        if list(specs) != self.tasks:
            raise ValueError(
                f"{path} has heads for the tasks {list(specs)}, the model for {self.tasks}: the order, which is that "
                "of the task ids, counts too. Nothing was loaded."
            )
        if specs != self.specs:
            raise ValueError(f"{path} has the heads {specs}; the model has {self.specs}. Nothing was loaded.")
        if pooling != self.pooling:
            raise ValueError(f"{path} was saved with pooling={pooling!r}; the model has pooling={self.pooling!r}.")
        check_fit(Path(path), tensors, self.config.hidden_size)
        return tensors


def load_classifier(encoder: Any, path: str | os.PathLike[str]) -> MultiTaskClassifier:
    """Build a classifier around an encoder (with its adapter) from the heads of a folder.

    Raises:
        FileNotFoundError: The folder holds no heads.
        ValueError: A file is damaged, or the heads do not fit the encoder's width.

    Example:
        >>> model = load_classifier(load_rank_experts(encoder, path), path)  # doctest: +SKIP
    """
    specs, pooling, tensors = read_heads_and_weights(Path(path))
    check_fit(Path(path), tensors, encoder.config.hidden_size)
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
