"""The demo from beginning to end: eight trainings with their curves, the table, a new process, a merge."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.benchmark import Timer
from transformers.utils import logging

from encoder import Encoder
from language_data import Data
from languages import Experiment
from languages_plan import EACH, SHORT, Search, settings_of
from methods import METHODS
from rank_experts import merge_rank_experts
from records import Records, Settings

from .files import LOGITS, RELOADED, Test, load_method, predict, save_method

NAMES = ("lora_8", "lora_64", "smora_64_8", "more_8")
CASES = {"one": "one head for all languages: they conflict", "each": "a head for each language: they do not"}
MERGED_TASK = "German"
TOLERANCE = 1e-4  # of a merged model's logits, in float32
SPARSE = 8  # A curve's points read every eighth of the test texts.
LEAD = 0.03  # of accuracy, below which one seed says nothing
RECORDS = Path(__file__).parents[2] / "docs" / "results" / "languages.jsonl"
_DESCRIPTION = "Train LoRA, SMoRA and MoRE on eight languages, behind one head and with a head each, and compare them."


class Row(NamedTuple):
    """One method in the table: trained parameters without the head, accuracy by case, seconds of both trainings."""

    trained: int
    accuracy: dict[str, float]
    seconds: float


class DemoResult(NamedTuple):
    """What a run found.

    Attributes:
        rows: By method.
        changed: By method, how many predictions changed by loading in a new process; 0 is right.
        merge_difference: Largest absolute change of a logit by merging MoRE for one language, in float32.
    """

    rows: dict[str, Row]
    changed: dict[str, int]
    merge_difference: float


def run_demo(
    output: str | Path = "demo-output",
    *,
    steps: int = 250,
    seed: int = 0,
    dtype: str = "auto",
    experiment: Experiment | None = None,
) -> DemoResult:
    """Train every method in both cases, print the table, reload in a new process, merge MoRE for a language.

    Args:
        output: Folder for the languages' packages, the adapters and their predictions.
        steps: Optimiser steps of each training.
        seed: Of the head's first weights and the order of the batches.
        dtype: "bfloat16", "float32" or "auto": whichever this machine multiplies faster.
        experiment: Other data, for tests.

    Raises:
        FileNotFoundError: The packaged encoder is missing.
        RuntimeError: pip could not download the languages' packages.
    """
    output = Path(output)
    experiment = experiment or Experiment(output / "data")
    dtype = faster_dtype() if dtype == "auto" else dtype
    data = experiment.data
    print(
        f"{len(data.splits['train']):,} messages to learn from, {len(data.splits['test']):,} to test on, for instance:"
        f"\n{_first_examples(data)}\nThe frozen lower half of the encoder reads them all once …",
        flush=True,
    )
    experiment.states("train", True)
    test = Test(data.splits["test"], experiment.states("test", True), data.languages)
    test.save(output)
    search = Search(Records(RECORDS).read())
    rows = {name: Row(0, {}, 0.0) for name in NAMES}
    for case, said in CASES.items():
        print(f"\n{said}\nLoss on unseen messages over the training's {steps} steps, in {dtype}; chance is 3.47:")
        for name in NAMES:
            where = SHORT if case == "one" else EACH
            settings = settings_of(where, name, *search.best(where, name), seed) | {"steps": steps, "dtype": dtype}
            start = time.perf_counter()
            model, trained = _train(experiment, settings, test)
            logits = predict(model, METHODS[name], dtype == "bfloat16", test)
            accuracy = (logits.argmax(-1) == test.examples.labels).float().mean().item()
            seconds = time.perf_counter() - start
            print(f"   right: {accuracy:.1%}   {seconds:.0f} s", flush=True)
            rows[name] = Row(trained, rows[name].accuracy | {case: accuracy}, rows[name].seconds + seconds)
            if case == "one":
                save_method(output / name, model, logits)
    print(f"\n{table(rows)}\n\n{conclusion(rows)}")
    return DemoResult(rows, _reload(output, dtype), _merge(output, experiment.encoder, test))


def _train(experiment: Experiment, settings: Settings, test: Test) -> tuple[nn.Module, int]:
    """Train once and show the learning curve; return the model and how many parameters were trained, heads aside."""
    print(f"  {METHODS[settings['method']].label:10}", end="", flush=True)
    some = torch.arange(0, len(test.examples), SPARSE)
    for _, training in experiment.train(settings):
        print(f" {training.evaluate(test.examples, test.states, some)[0]:5.2f}", end="", flush=True)
    return training.model, training.trained_parameters


def table(rows: dict[str, Row]) -> str:
    """Lay out accuracies and costs, a method a line."""
    lines = ["method      trained parameters   one head   a head each   seconds"]
    for name, row in rows.items():
        right = [f"{row.accuracy[case]:.1%}" for case in CASES]
        lines.append(
            f"{METHODS[name].label:10} {row.trained:19,} {right[0]:>10} {right[1]:>13} {row.seconds:9.0f}".rstrip()
        )
    return "\n".join(lines)


def conclusion(rows: dict[str, Row]) -> str:
    """Say in a sentence or two what the table shows, and for whom."""
    leads, said = {}, {}
    for case in CASES:
        scores = {METHODS[name].label: row.accuracy[case] for name, row in rows.items()}
        loras = [METHODS[name].label for name in rows if METHODS[name].kind == "lora"]
        lora, routed = (max(labels, key=lambda label: scores[label]) for labels in (loras, set(scores) - set(loras)))
        leads[case] = scores[routed] - scores[lora]
        said[case] = f"{routed} {scores[routed]:.0%}, {lora} {scores[lora]:.0%}"
    if leads["one"] > LEAD > leads["each"]:
        text = (
            f"Where the languages conflict, behind one head, routing learns faster ({said['one']}); with a head each "
            f"there is nothing to gain ({said['each']}). It is for you if tasks share an output and the training is "
            "short; else take LoRA."
        )
    elif leads["one"] > LEAD:
        text = f"Routing learns faster, behind one head ({said['one']}) and with a head each ({said['each']})."
    else:
        text = f"In this run routing did not pay: one head {said['one']}; a head each {said['each']}."
    return textwrap.fill(text, 110)


def _first_examples(data: Data) -> str:
    lines, test = [], data.splits["test"]
    for number, language in enumerate(data.languages[:3]):
        row = int((test.languages == number).nonzero()[0])
        label = int(test.labels[row])
        lines.append(f'  "{language}: {test.texts[row]}"  ->  {data.words[language][label]} (answer {label} of 32)')
    return "\n".join(lines)


def _reload(output: Path, dtype: str) -> dict[str, int]:
    """Predict again in a new process; return how many predictions changed, by method."""
    print(f"\nAdapters and heads are in {output}. A new process loads them and predicts again:")
    places = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    command = [sys.executable, "-W", "ignore", "-m", "demo.reload", str(output), dtype]
    subprocess.run(command, check=True, env=environment)
    changed = {}
    for name in NAMES:
        before, after = (load_file(output / name / file)["logits"] for file in (LOGITS, RELOADED))
        changed[name] = int((before.argmax(-1) != after.argmax(-1)).sum())
        same, exactly = len(before) - changed[name], ", logits bit by bit" if torch.equal(before, after) else ""
        print(f"  {METHODS[name].label:10} {same} of {len(before)} predictions are the same{exactly}")
    return changed


def _merge(output: Path, encoder: Encoder, test: Test) -> float:
    """Merge MoRE for one language; return the largest change of a logit."""
    method = METHODS["more_8"]
    model = load_method(output / "more_8", encoder, method, bfloat16=False)
    before = predict(model, method, False, test, MERGED_TASK)
    merge_rank_experts(model, task=MERGED_TASK)
    after = predict(model, method, False, test, MERGED_TASK)
    same, difference = int((before.argmax(-1) == after.argmax(-1)).sum()), (before - after).abs().max().item()
    print(
        f"\nMoRE merged into the encoder's weights for {MERGED_TASK}: {same} of {len(before)} predictions the same, "
        f"logits\ndiffer by {difference:.1e} at most (float32)."
    )
    return difference


def faster_dtype() -> str:
    """Return bfloat16 where this CPU multiplies it faster than float32; many can only emulate it, and slowly."""
    seconds = {}
    for dtype in ("float32", "bfloat16"):
        tensors = {"x": torch.ones(512, 384), "weight": torch.ones(1536, 384)}
        tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors.items()}
        timer = Timer("x @ weight.T", globals=tensors, num_threads=1)
        seconds[dtype] = timer.blocked_autorange(min_run_time=0.1).median
    return "bfloat16" if 1.5 * seconds["bfloat16"] < seconds["float32"] else "float32"


def parser() -> argparse.ArgumentParser:
    """Return the demo's command line."""
    parser = argparse.ArgumentParser(prog="examples/demo", description=_DESCRIPTION)
    parser.add_argument("--output", default="demo-output", help="folder for data, adapters and predictions")
    parser.add_argument("--steps", type=int, default=250, help="optimiser steps of each training; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo from the command line; return 0 where reloading and merging changed nothing."""
    options = parser().parse_args(argv)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    # Two threads that wait for each other on a busy machine can be twenty times slower than one, and win little here.
    torch.set_num_threads(1)
    start = time.perf_counter()
    print(
        f"Eight languages, one small pretrained encoder (all-MiniLM-L6-v2), {len(NAMES)} adapters, each trained twice: "
        f"about five\nminutes on one free core; this machine's load is {os.getloadavg()[0]:.1f} on {os.cpu_count()} "
        f"cores. Data (some 40 MB from the package index) and\nadapters go to {options.output}.\n",
        flush=True,
    )
    try:
        result = run_demo(**vars(options))
    except (FileNotFoundError, RuntimeError, ValueError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    print(f"\n{(time.perf_counter() - start) / 60:.1f} minutes in all.")
    return int(any(result.changed.values()) or result.merge_difference > TOLERANCE)
