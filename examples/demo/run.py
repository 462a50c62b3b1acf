"""The demo from beginning to end: data, three trainings, the table, a new process, a merge."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rank_experts import merge_rank_experts

from . import adapters
from .batches import Features, encode
from .corpus import mine_docstrings
from .files import LOGITS, RELOADED, load_method, save_method, save_run
from .model import MultiTaskModel, faster_dtype, load_encoder, packaged_model, quieten_transformers
from .tasks import TASKS, Example, make_examples
from .train import TrainingSettings, accuracy, predict, train

TRAIN_SIZE, HELD_OUT_SIZE = 2880, 320  # examples a task
MERGED_TASK = "signature"
STEPS, BATCH_SIZE = 280, 32
TOLERANCE = 1e-4  # of a merged model's logits, in float32
_DESCRIPTION = "Train LoRA, SMoRA and MoRE on four tasks mined from Python's standard library and compare them."


class Row(NamedTuple):
    """One method in the table: held-out accuracy by task, parameters of the adapter, seconds of training."""

    accuracy: dict[str, float]
    trainable: int
    active: int
    seconds: float


class DemoResult(NamedTuple):
    """What a run found.

    Attributes:
        majority: Accuracy by task of always guessing the most frequent class.
        rows: By method.
        changed: By method, how many held-out predictions changed by loading in a new process; 0 is right.
        merge_difference: Largest absolute change of a logit by merging MoRE for one task, in float32.
    """

    majority: dict[str, float]
    rows: dict[str, Row]
    changed: dict[str, int]
    merge_difference: float


def run_demo(
    model: str | None = None,
    output: str | Path = "demo-output",
    *,
    steps: int = STEPS,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    dtype: str = "auto",
    train_size: int = TRAIN_SIZE,
    held_out_size: int = HELD_OUT_SIZE,
) -> DemoResult:
    """Train LoRA, SMoRA and MoRE on the same data, print the table, reload in a new process, merge MoRE for a task.

    Args:
        model: Encoder, a Hub id or a folder; None: all-MiniLM-L6-v2 as its package ships it.
        output: Folder for the adapters, heads, held-out examples and predictions.
        steps: Optimiser steps of each training.
        batch_size: Examples a step, a multiple of the number of tasks.
        seed: Of the data's draw, the initial weights and the order of the batches.
        dtype: "bfloat16", "float32" or "auto": whichever this machine multiplies faster.
        train_size: Examples a task to train on, a multiple of 16.
        held_out_size: Held-out examples a task, a multiple of 16.

    Raises:
        FileNotFoundError: The packaged encoder or the sources of the standard library are missing.
        ValueError: A size is no such multiple.
    """
    model, output = model or packaged_model(), Path(output)
    compute_dtype = faster_dtype() if dtype == "auto" else getattr(torch, dtype)
    docstrings = mine_docstrings()
    to_learn = make_examples([each for each in docstrings if not each.held_out], train_size, seed)
    held_out = make_examples([each for each in docstrings if each.held_out], held_out_size, seed)
    print(f"{len(docstrings)} docstrings of the standard library of Python {sys.version.split()[0]}, for instance:")
    print(_first_examples(held_out))
    print(f"Adapting {model} in {compute_dtype} on {torch.get_num_threads()} threads: {steps} steps of {batch_size}.")

    tokenizer = AutoTokenizer.from_pretrained(model)
    encoded, encoded_held_out = encode(to_learn, tokenizer), encode(held_out, tokenizer)
    save_run(output, model, compute_dtype, held_out)
    rows = {}
    for name, method in adapters.methods().items():
        torch.manual_seed(seed)  # the same heads for every method
        encoder = load_encoder(model)
        adapted = MultiTaskModel(encoder, compute_dtype, method.routed)
        adapted.encoder = adapters.attach(encoder, method)
        settings = TrainingSettings(method.learning_rate, steps, batch_size, seed)
        seconds = train(adapted, encoded, tokenizer, settings, name)
        logits = predict(adapted, encoded_held_out, tokenizer)
        save_method(output / name, adapted, logits)
        rows[name] = Row(
            accuracy=accuracy(logits, encoded_held_out),
            trainable=adapters.trainable_parameters(adapted.encoder),
            active=adapters.active_parameters(adapted.encoder),
            seconds=seconds,
        )
    majority = {task: _majority(to_learn[task], held_out[task]) for task in TASKS}
    print(f"\nAccuracy on modules that were not trained on, {held_out_size} examples a task:\n")
    print(table(majority, rows))

    changed = _reload(output, list(rows))
    merged = load_method(output / "MoRE", adapters.methods()["MoRE"], model, torch.float32)
    difference = _merge(merged, MERGED_TASK, encoded_held_out[MERGED_TASK], tokenizer)
    return DemoResult(majority, rows, changed, difference)


def table(majority: Mapping[str, float], rows: Mapping[str, Row]) -> str:
    """Lay out accuracies and costs, a method a line."""
    header = [*TASKS, "mean", "trainable", "active/token", "seconds"]
    lines = ["  ".join(["method".ljust(14), *header])]
    for name, scores, costs in [
        ("majority class", majority, ("", "", "")),
        *(
            (name, row.accuracy, (f"{row.trainable:,}", f"{row.active:,}", f"{row.seconds:.0f}"))
            for name, row in rows.items()
        ),
    ]:
        values = [f"{score:.3f}" for score in (*scores.values(), sum(scores.values()) / len(scores))]
        cells = [value.rjust(len(title)) for value, title in zip((*values, *costs), header, strict=True)]
        lines.append("  ".join([name.ljust(14), *cells]).rstrip())
    return "\n".join(lines)


def _first_examples(examples: Mapping[str, list[Example]]) -> str:
    lines = []
    for task, (first, *_) in examples.items():
        text = " | ".join(filter(None, (first.text, first.pair)))
        lines.append(f"  {task:14} {text if len(text) < 80 else text[:77] + '...'}  -> {TASKS[task][first.label]}")
    return "\n".join(lines)


def _majority(to_learn: Sequence[Example], held_out: Sequence[Example]) -> float:
    (guess, _), *_ = Counter(each.label for each in to_learn).most_common(1)
    return sum(each.label == guess for each in held_out) / len(held_out)


def _reload(output: Path, names: Sequence[str]) -> dict[str, int]:
    """Predict again in a new process; return how many predictions changed, by method."""
    print(f"\nAdapters and heads are in {output}. A new process loads them and predicts again:")
    places = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    subprocess.run([sys.executable, "-m", "demo.reload", str(output)], check=True, env=environment)
    changed = {}
    for name in names:
        before, after = (load_file(output / name / file) for file in (LOGITS, RELOADED))
        changed[name] = sum(int((before[task].argmax(-1) != after[task].argmax(-1)).sum()) for task in before)
        total = sum(map(len, before.values()))
        identical = all(torch.equal(before[task], after[task]) for task in before)
        exactly = ", logits bit by bit" if identical else ""
        print(f"  {name:6} {total - changed[name]} of {total} predictions are the same{exactly}")
    return changed


def _merge(model: MultiTaskModel, task: str, features: list[Features], tokenizer: PreTrainedTokenizerBase) -> float:
    """Merge a task-routed adapter for one task; return the largest change of a logit."""
    before = predict(model, {task: features}, tokenizer)[task]
    merge_rank_experts(model.encoder, task=task)
    after = predict(model, {task: features}, tokenizer)[task]
    same = int((before.argmax(-1) == after.argmax(-1)).sum())
    difference = (before - after)[:, : len(TASKS[task])].abs().max().item()
    print(
        f"\nMoRE merged into the encoder's weights for {task!r}: {same} of {len(before)} predictions are the same, "
        f"the logits differ by {difference:.1e} at most (float32)."
    )
    return difference


def parser() -> argparse.ArgumentParser:
    """Return the demo's command line."""
    parser = argparse.ArgumentParser(prog="examples/demo", description=_DESCRIPTION)
    parser.add_argument("--model", help="encoder: a Hub id or a folder (default: the packaged all-MiniLM-L6-v2)")
    parser.add_argument("--output", default="demo-output", help="folder for adapters and predictions")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps of each training")
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="examples a step, a multiple of 4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo from the command line; return 0 where reloading and merging changed nothing."""
    options = parser().parse_args(argv)
    quieten_transformers()
    start = time.perf_counter()
    try:
        result = run_demo(**vars(options))
    except (FileNotFoundError, ValueError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    print(f"\n{(time.perf_counter() - start) / 60:.1f} minutes in all.")
    return int(any(result.changed.values()) or result.merge_difference > TOLERANCE)
