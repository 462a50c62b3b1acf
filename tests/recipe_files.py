"""Small files for the command line: models with tokenizers, data, and recipes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from models import VOCAB, bert, llama, t5

WORDS = ["[PAD]", "[UNK]", "[EOS]", *(f"w{i}" for i in range(VOCAB - 5)), "yes", "no"]


def save_model(folder: Path, kind: str) -> Path:
    """Write a tiny model with a word-level tokenizer."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", model_max_length=32
    )
    model = {"classification": lambda: bert().bert, "causal": llama, "seq2seq": t5}[kind]()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(task: str, size: int) -> list[dict]:
    """Sentences of five words, whose first (task "first") or last word decides the label."""
    found = []
    for i in range(size):
        words = [f"w{(7 * i + 3 * j + len(task)) % (VOCAB - 5)}" for j in range(5)]
        place = 0 if task == "first" else -1
        found.append({"sentence": " ".join(words), "other": words[0], "label": int(int(words[place][1:]) > 29)})
    return found


def write_data(folder: Path) -> None:
    """Write task "first" as JSONL in a folder and task "last" as two CSV files."""
    (folder / "first").mkdir()
    for split, size in (("train", 16), ("validation", 8)):
        lines = (json.dumps(row) for row in rows("first", size))
        (folder / "first" / f"{split}.jsonl").write_text("\n".join(lines))
        with (folder / f"last_{split}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["sentence", "other", "label"])
            writer.writeheader()
            writer.writerows(rows("last", size))


CLASSIFICATION = """\
model:
  name: {model}
  max_length: 16
adapter:
  method: {method}
  r: 8
tasks:
  first:
    source: first
    text: "{{sentence}}"
    labels: [no, yes]
  last:
    train: last_train.csv
    validation: last_validation.csv
    columns: [sentence, other]
    metric: [accuracy, f1]
training:
  output_dir: {out}
  per_device_train_batch_size: 4
  max_steps: 4
  learning_rate: 1e-2
  logging_steps: 2
  report_to: none
  use_cpu: true
  disable_tqdm: true
"""

TEXT = """\
model: {{name: {model}, kind: {kind}, max_length: 16}}
adapter: {{method: {method}, r: 8}}
tasks:
  first:
    source: first
    prompt: "{{sentence}}"
    target: "{{label}}"
    labels: [no, yes]
  last:
    train: last_train.csv
    validation: last_validation.csv
    prompt: "{{sentence}} {{other}}"
    target: "{{other}}"
    metric: accuracy
training: {{output_dir: {out}, per_device_train_batch_size: 4, max_steps: 2, report_to: none, use_cpu: true}}
"""


def write_recipe(folder: Path, kind: str = "classification", method: str = "more") -> Path:
    """Write model, data and recipe; return the recipe's path."""
    write_data(folder)
    model = save_model(folder / "model", kind)
    text = CLASSIFICATION if kind == "classification" else TEXT
    file = folder / "recipe.yaml"
    file.write_text(text.format(model=model, kind=kind, method=method, out=folder / "out"))
    return file
