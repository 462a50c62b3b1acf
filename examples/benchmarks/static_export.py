"""How much of a token-routed adapter a static LoRA keeps: the calibrated export against naive merging, on the demo.

    rank-experts demo --output demo-output
    python examples/benchmarks/static_export.py demo-output

Loads the demo's SMoRA adapter, makes it static in several ways on the demo's training examples, and prints for each
the share of the adapter's output energy that it explains there, the loss there, and the held-out accuracy.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoTokenizer

from rank_experts.calibrate import METHODS, calibrate, static_adapter
from rank_experts.demo import adapters
from rank_experts.demo.batches import encode, evaluation_batches
from rank_experts.demo.corpus import mine_docstrings
from rank_experts.demo.files import load_method
from rank_experts.demo.tasks import Example, make_examples
from rank_experts.demo.train import accuracy, predict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the demo's output folder")
    parser.add_argument("--examples", type=int, default=128, help="calibration examples a task, a multiple of 16")
    parser.add_argument("--ranks", type=int, nargs="*", default=[32, 16, 8], help="lower ranks to try")
    options = parser.parse_args()

    settings = json.loads((options.output / "demo.json").read_text(encoding="utf-8"))
    held_out = json.loads((options.output / "held_out.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    docstrings = [each for each in mine_docstrings() if not each.held_out]
    to_calibrate = encode(make_examples(docstrings, options.examples, seed=1), tokenizer)
    to_evaluate = encode({task: [Example(*each) for each in rows] for task, rows in held_out.items()}, tokenizer)
    batches = [batch for rows in to_calibrate.values() for batch in evaluation_batches(rows, tokenizer, 64)]
    model = load_method(options.output / "SMoRA", adapters.methods()["SMoRA"], settings["model"], torch.float32)

    print(f"{'adapter':<26} {'explained':>9} {'loss':>8}  held-out accuracy: {', '.join(to_evaluate)}, mean")

    def show(name: str, explained: float | None, loss: float | None) -> None:
        scores = list(accuracy(predict(model, to_evaluate, tokenizer), to_evaluate).values())
        cells = " ".join(f"{score:.3f}" for score in (*scores, sum(scores) / len(scores)))
        share = "" if explained is None else f"{explained:.1%}"
        print(f"{name:<26} {share:>9} {'' if loss is None else f'{loss:.4f}':>8}  {cells}", flush=True)

    runs = [(method, None) for method in METHODS] + [(METHODS[0], r) for r in options.ranks]
    for number, (method, r) in enumerate(runs):
        factors, report = calibrate(model, batches, r=r, method=method, progress=False)
        if number == 0:
            show("routed", None, report.loss_before)
        with static_adapter(model, factors):
            show(f"{method}, r={report.r}", report.explained, report.loss_after)
    with static_adapter(model, {}):
        show("no adapter, trained heads", None, None)


if __name__ == "__main__":
    main()
