"""What one process of the demo writes and another reads: the test texts, and each method's adapter, head and logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from encoder import Classifier, Encoder, States
from language_data import Examples
from language_training import call, new_classifier
from methods import METHODS, Method
from rank_experts import load_rank_experts, save_rank_experts

LOGITS, RELOADED = "logits.safetensors", "reloaded.safetensors"
_TEST, _STATES, _HEAD = "test.json", "test-states.pt", "head.safetensors"


class Test(NamedTuple):
    """The test texts, what the encoder's lower half says of them, and the languages' names."""

    examples: Examples
    states: States
    languages: list[str]

    def save(self, output: Path) -> None:
        """Write them for the process to come."""
        texts, languages, labels = self.examples.texts, self.examples.languages, self.examples.labels
        held = [texts, languages.tolist(), labels.tolist(), self.languages]
        (output / _TEST).write_text(json.dumps(held) + "\n", encoding="utf-8")
        self.states.save(output / _STATES)

    @classmethod
    def load(cls, output: Path) -> Test:
        """Read them."""
        texts, numbers, labels, languages = json.loads((output / _TEST).read_text(encoding="utf-8"))
        examples = Examples(texts, torch.tensor(numbers), torch.tensor(labels))
        return cls(examples, States.load(output / _STATES), languages)


def save_method(folder: Path, model: nn.Module, logits: Tensor) -> None:
    """Write an adapter and its head, trained behind one head, and what they predict."""
    if isinstance(model, PeftModel):  # LoRA is PEFT's own.
        model.save_pretrained(folder)
    else:
        save_rank_experts(model, folder)
    head = next(module.head for module in model.modules() if isinstance(module, Classifier))
    save_file(head.state_dict(), folder / _HEAD)
    save_file({"logits": logits}, folder / LOGITS)


def load_method(folder: Path, encoder: Encoder, method: Method, bfloat16: bool) -> nn.Module:
    """Load them into fresh upper layers."""
    inner = new_classifier(encoder, 1, bfloat16)
    inner.head.load_state_dict(load_file(folder / _HEAD))
    return (PeftModel.from_pretrained if method.kind == "lora" else load_rank_experts)(inner, folder)


@torch.no_grad()
def predict(model: nn.Module, method: Method, bfloat16: bool, test: Test, language: str | None = None) -> Tensor:
    """Return the logits (N, 32) of the test texts, or of one language's, in their order."""
    rows = torch.arange(len(test.examples))
    if language is not None:
        rows = rows[test.examples.languages == test.languages.index(language)]
    model.eval()
    batches = [call(model, method, bfloat16, test.examples, test.states, own) for own in rows.split(128)]
    return torch.cat([outputs.logits for outputs in batches])


def repeat_predictions(output: Path, bfloat16: bool) -> None:
    """Load every method of a run, predict again, and write that beside the first predictions."""
    encoder, test = Encoder(), Test.load(output)
    for folder in sorted(file.parent for file in output.glob(f"*/{LOGITS}")):
        method = METHODS[folder.name]
        model = load_method(folder, encoder, method, bfloat16)
        save_file({"logits": predict(model, method, bfloat16, test)}, folder / RELOADED)
