"""One linear layer, tasks whose conflict is known: from which overlap on does routing win, and what does it cost?

    python examples/benchmarks/evidence/conflict.py --list       # what is done, what is left
    python examples/benchmarks/evidence/conflict.py              # does what is left; start it twice for two cores
    python examples/benchmarks/evidence/conflict_page.py         # docs/results/conflict.md from the records

`teacher.py` says what the tasks are. An adapter of a frozen layer is trained by Adam on fresh inputs, all methods at
scale 1, each at the best of four rates, which is chosen on tasks (a seed) that are not reported. What counts is the
error left on 4,096 fresh inputs: 0 is best, 1 is what no adapter leaves. One thread a process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from methods import ALL, COSTS, METHODS
from rank_experts import update_router_bias
from records import Record, Records, Settings, key
from runner import Planned, arguments, once, status, work
from teacher import Teacher

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
SEEDS = (0, 1, 2, 3, 4)
DEVELOPMENT_SEED = 1000
HELD_OUT = 4096
POINT = {"teacher": "subspaces", "tasks": 8, "rank": 4, "overlap": 1.0, "visible": 1.0}
POINT |= {"noise": 0.05, "width": 256, "steps": 300, "batch": 512}
"""The point that every sweep goes through: eight tasks in full conflict."""

METHODS_HERE = [name for name in METHODS if name not in ("head", "lora_96", "lora_128")]
BUDGET = ["lora_8", "lora_64", "blocks_8x8_top2", "blocks_32x2_top4", "smora_64_8", "more_8"]

SWEEPS: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "overlap": ([{"overlap": share} for share in (1.0, 0.0, 0.5, 0.25, 0.75)], METHODS_HERE),
    "costs": ([{}], list(COSTS)),
    "nested": ([{"teacher": "nested", "rank": 8}], METHODS_HERE),
    "tasks": ([{"tasks": count} for count in (1, 2, 4, 16, 32)], METHODS_HERE),
    "visible": ([{"visible": size} for size in (0.0, 0.25, 0.5, 2.0)], BUDGET),
    "rank": ([{"rank": rank} for rank in (1, 2, 8)], BUDGET),
    "steps": ([{"steps": steps} for steps in (100, 1000, 3000)], BUDGET),
}
"""Name of a sweep to (what differs from POINT, methods)."""


class Layer(nn.Module):
    """A frozen linear layer whose adapter learns an update; gives the mean square error as its loss."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        """Return `logits` (N, d), the layer's output, and with labels (N, d) `loss`."""
        y = self.layer(x)
        return SequenceClassifierOutput(loss=None if labels is None else F.mse_loss(y, labels), logits=y)


def run(settings: Settings) -> Record:
    """Train and evaluate once."""
    method = ALL[settings["method"]]
    names = ("tasks", "rank", "overlap", "visible", "noise", "width", "seed")
    teacher = Teacher(settings["teacher"], **{name: settings[name] for name in names})
    own = list(range(teacher.tasks)) if method.per_task else [None]
    found = [_train(teacher, settings, task) for task in own]
    error, energy = (sum(values) for values in zip(*(pair for pair, _ in found)))
    return {"result": {"error": error / energy}, "cost": {"trained_parameters": sum(count for _, count in found)}}


def _train(teacher: Teacher, settings: Settings, task: int | None) -> tuple[tuple[float, float], int]:
    # Returns (squared error, squared size of the update) on held-out inputs, and the count of trained parameters.
    method = ALL[settings["method"]]
    torch.manual_seed(settings["seed"])
    layer = Layer(settings["width"])
    weight = layer.layer.weight.detach().clone()
    names = [f"task {number}" for number in range(teacher.tasks if task is None else 1)]
    model = method.attach(layer, ["layer"], settings["scale"] * method.unit, names)
    groups = method.groups(model, settings["rate"])
    optimizer = torch.optim.Adam(groups, fused=True)
    # A task alone sees the inputs that fall to it in the mixture.
    size = settings["batch"] if task is None else settings["batch"] // teacher.tasks
    generator = torch.Generator().manual_seed(settings["seed"])
    model.train()
    for _ in range(settings["steps"]):
        x, update, task_ids = teacher.batch(size, generator, task)
        told = {"task_ids": task_ids} if method.told else {}
        loss = model(x=x, labels=x @ weight.T + update, **told).loss
        loss.backward()
        optimizer.step()
        update_router_bias(layer)
        optimizer.zero_grad()
    model.eval()
    held_out = HELD_OUT if task is None else HELD_OUT // teacher.tasks
    generator = torch.Generator().manual_seed(settings["seed"] + 10**6)
    x, update, task_ids = teacher.batch(held_out, generator, task)
    told = {"task_ids": task_ids} if method.told else {}
    with torch.no_grad():
        left = model(x=x, **told).logits - x @ weight.T - update
    trained = sum(p.numel() for group in groups for p in group["params"])
    return (float(left.square().sum()), float(update.square().sum())), trained


def points(sweep: str) -> list[Settings]:
    """Return a sweep's settings without method, rate and seed."""
    return [POINT | different for different in SWEEPS[sweep][0]]


def settings_of(point: Settings, method: str, rate: float, seed: int) -> Settings:
    """Return a run's settings, all of them."""
    role = "development" if seed == DEVELOPMENT_SEED else "reported"
    config = ALL[method].values | {"kind": ALL[method].kind, "router_factor": ALL[method].router_factor}
    return point | {"method": method, "scale": 1.0, "rate": rate, "seed": seed, "role": role, "config": config}


Errors = dict[str, float]


def errors_of(records: Sequence[Record]) -> Errors:
    """Return the error of each run, by its settings' key."""
    return {key(record["settings"]): record["result"]["error"] for record in records}


def best_rate(errors: Errors, point: Settings, method: str) -> float | None:
    """Return the rate with the least error in development, or None until all four have been tried."""
    tried = {rate: errors.get(key(settings_of(point, method, rate, DEVELOPMENT_SEED))) for rate in RATES}
    found = {rate: math.inf if math.isnan(error) else error for rate, error in tried.items() if error is not None}
    return min(found, key=lambda rate: found[rate]) if len(found) == len(RATES) else None


def plan(records: Sequence[Record]) -> Planned:
    """Return (sweep, settings) of every run: a point's development runs come before its own."""
    errors = errors_of(records)
    planned: Planned = []
    for sweep, (_, methods) in SWEEPS.items():
        for point in points(sweep):
            tried = [settings_of(point, name, rate, DEVELOPMENT_SEED) for name in methods for rate in RATES]
            best = {name: best_rate(errors, point, name) for name in methods}
            planned += [(sweep, each) for each in tried]
            planned += [
                (sweep, None if rate is None else settings_of(point, name, rate, seed))
                for seed in SEEDS
                for name, rate in best.items()
            ]
    return once(planned)


def main(argv: list[str] | None = None) -> None:
    """Print the status, or do what is left."""
    args = arguments(__doc__, "conflict").parse_args(argv)
    records = Records(args.records)
    if not args.list:
        torch.set_num_threads(1)
        work(plan, run, records, args.groups, args.limit)
    print(status(plan, records.read()))


if __name__ == "__main__":
    main()
