"""A run's folder, which one process writes and another reads.

demo.json holds the settings, held_out.json the examples and, a folder for each method, its adapter, heads.safetensors,
logits.safetensors (what the first process predicted) and reloaded.safetensors (what the second did).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from . import adapters
from .batches import encode
from .model import MultiTaskModel, load_encoder
from .tasks import Example
from .train import predict

LOGITS, RELOADED = "logits.safetensors", "reloaded.safetensors"
_SETTINGS, _HELD_OUT, _HEADS = "demo.json", "held_out.json", "heads.safetensors"


def save_run(output: Path, model: str, dtype: torch.dtype, examples: Mapping[str, list[Example]]) -> None:
    """Write what all methods share: the encoder's name, the dtype and the held-out examples."""
    output.mkdir(parents=True, exist_ok=True)
    settings = {"model": model, "dtype": str(dtype).removeprefix("torch.")}
    (output / _SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (output / _HELD_OUT).write_text(json.dumps(dict(examples), indent=1) + "\n", encoding="utf-8")


def save_method(folder: Path, model: MultiTaskModel, logits: dict[str, Tensor]) -> None:
    """Write a method's adapter, heads and predictions."""
    adapters.save(model.encoder, folder)
    save_file(model.heads.state_dict(), folder / _HEADS)
    save_file(logits, folder / LOGITS)


def load_method(folder: Path, method: adapters.Method, encoder: str, dtype: torch.dtype) -> MultiTaskModel:
    """Load a method's adapter and heads into a fresh encoder."""
    model = MultiTaskModel(adapters.load(load_encoder(encoder), folder, method), dtype, method.routed)
    model.heads.load_state_dict(load_file(folder / _HEADS))
    return model


def repeat_predictions(output: Path) -> None:
    """Load every method of a run, predict again, and write that beside the first predictions."""
    settings = json.loads((output / _SETTINGS).read_text(encoding="utf-8"))
    held_out = json.loads((output / _HELD_OUT).read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    encoded = encode({task: [Example(*each) for each in examples] for task, examples in held_out.items()}, tokenizer)
    for name, method in adapters.methods().items():
        model = load_method(output / name, method, settings["model"], getattr(torch, settings["dtype"]))
        save_file(predict(model, encoded, tokenizer), output / name / RELOADED)
