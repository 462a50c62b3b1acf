"""How much of a token-routed adapter a static LoRA keeps: the calibrated export against naive merging.

    python examples/demo --output demo-output
    python examples/benchmarks/glue/static_export.py demo demo-output
    python examples/benchmarks/glue/static_export.py glue --data GLUE_FOLDER --steps 800  # glue_small.py's arguments

Takes a trained SMoRA adapter, the demo's (eight languages behind one head, which conflict) or one that it trains on
GLUE as glue_small.py does (a head a task, no conflict), makes it static in several ways on training examples, and
measures for each the share of the adapter's output energy that it explains there, the loss there, and the scores on
held-out examples. Records go to docs/results/static_export.json; `headline.py` makes tables of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rank_experts.convert.calibrate import METHODS, calibrate, static_adapter

sys.path.append(str(Path(__file__).resolve().parents[2]))

from demo.files import Test, load_method, predict
from languages import Experiment
from methods import METHODS as ADAPTERS

RECORDS = Path("docs/results/static_export.json")
Record = dict[str, Any]
Score = Callable[[], dict[str, float]]


def compare(data: str, model: nn.Module, batches: list[dict[str, Any]], ranks: list[int], score: Score) -> list[Record]:
    """Measure an adapter, its static forms, and the model without it; return a record of each."""
    records: list[Record] = []

    def add(form: str, r: int | None = None, explained: float | None = None, loss: float | None = None) -> None:
        scores = {task: round(value, 4) for task, value in score().items()}
        record = {"data": data, "form": form, "r": r, "explained": explained, "loss": loss, "scores": scores}
        records.append(record | {"mean": round(statistics.fmean(scores.values()), 4)})
        print(json.dumps(records[-1]), flush=True)

    runs = [(method, None) for method in METHODS] + [(METHODS[0], r) for r in ranks]
    for number, (method, r) in enumerate(runs):
        factors, report = calibrate(model, batches, r=r, method=method, progress=False)
        assert report.loss_before is not None
        assert report.loss_after is not None
        if number == 0:
            add("routed", None, None, round(report.loss_before, 4))
        with static_adapter(model, factors):
            add(method, report.r, round(report.explained, 4), round(report.loss_after, 4))
    with static_adapter(model, {}):
        add("no adapter, trained heads")
    return records


def of_demo(options: argparse.Namespace) -> list[Record]:
    experiment = Experiment(options.output / "data")
    train, states = experiment.data.splits["train"], experiment.states("train", True)
    batches = []
    for number in range(len(experiment.data.languages)):
        for own in (train.languages == number).nonzero().flatten()[: options.examples].split(64):
            inputs = {"head_ids": train.languages[own], "labels": train.labels[own]}
            batches.append(states.batch(own) | inputs)
    test, method = Test.load(options.output), ADAPTERS["smora_64_8"]
    model = load_method(options.output / "smora_64_8", experiment.encoder, method, bfloat16=False).eval()

    def score() -> dict[str, float]:
        right = predict(model, method, False, test).argmax(-1) == test.examples.labels
        each = {name: right[test.examples.languages == number] for number, name in enumerate(test.languages)}
        return {name: found.float().mean().item() for name, found in each.items()}

    return compare("demo", model, batches, options.ranks, score)


def of_glue(options: argparse.Namespace, arguments: list[str]) -> list[Record]:
    import glue_data
    import glue_small

    args = glue_small.parse([*arguments, "--methods", "smora_r64_k8"])
    benchmark = glue_small.Benchmark(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    method = glue_small.METHODS["smora_r64_k8"]
    seed = args.seeds[0]
    model = benchmark.build(method, benchmark.tasks, seed)
    benchmark.train(model, method, benchmark.best_rate("smora_r64_k8"), args.steps, seed, "smora_r64_k8")
    model.eval()
    batches = []
    for task_id, task in enumerate(benchmark.tasks):
        train = benchmark.data[task].train
        rows = train.lengths[: options.examples].argsort()
        for part in rows.split(64):
            ids = torch.full((len(part),), task_id)
            batches.append(glue_data.collate(train, part.tolist(), ids, benchmark.device))

    def score() -> dict[str, float]:
        scores = benchmark.evaluate(model, "test")
        return {task: scores[task, glue_data.TASKS[task].metrics[0]] for task in benchmark.tasks}

    with benchmark.autocast():
        return compare("glue", model, batches, options.ranks, score)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=128, help="calibration examples a task, a multiple of 16")
    parser.add_argument("--ranks", type=int, nargs="*", default=[32, 16, 8], help="lower ranks to try")
    commands = parser.add_subparsers(dest="data", required=True)
    commands.add_parser("demo", help="the demo's adapter").add_argument("output", type=Path, help="its output folder")
    commands.add_parser("glue", help="an adapter trained here; arguments as glue_small.py's", add_help=False)
    options, rest = parser.parse_known_args(argv)
    if options.data == "demo" and rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    found = of_demo(options) if options.data == "demo" else of_glue(options, rest)
    records = json.loads(RECORDS.read_text()) if RECORDS.exists() else []
    records = [record for record in records if record["data"] != options.data] + found
    RECORDS.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n")


if __name__ == "__main__":
    main()
