"""How an adapted layer's cost grows with ranks and tasks, and a model's with its layers; with tokens: layer.py.

python examples/benchmarks/speed/growth.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from measure import in_turn, machine, spread, write
from models import adapt, base_model
from rank_experts import RankExpertConfig, inject_rank_experts
from training_step import training_step
from variants import choose_ranks, pytorch_or_native, step

Runs = dict[str, Callable[[], None]]


def over_ranks(num_tokens: int, d: int, ranks: list[int]) -> tuple[Runs, list[dict[str, Any]]]:
    """SMoRA, LoRA and PEFT's LoRA of each rank; an eighth of the ranks is active."""
    x, dy = torch.randn(num_tokens, d, requires_grad=True), torch.randn(num_tokens, d)
    runs, rows = {}, []
    for r in ranks:
        common: dict[str, Any] = dict(target_modules=["0"], init_weights=False)
        theirs = LoraConfig(r=r, lora_alpha=16, target_modules=["0"], init_lora_weights=False)
        layers = {
            "lora": get_peft_model(nn.Sequential(nn.Linear(d, d)), theirs).base_model.model[0],
            "dense": inject_rank_experts(nn.Sequential(nn.Linear(d, d)), RankExpertConfig.lora(r=r, **common))[0],
        }
        for kind in ("smora", "smora native"):
            config = RankExpertConfig.smora(r=r, top_k=r // 8, alpha=4, **common)
            layers[kind] = inject_rank_experts(nn.Sequential(nn.Linear(d, d)), config)[0]
        for kind, layer in layers.items():
            runs[f"{kind} {r}"] = pytorch_or_native(kind, step(layer.train(), x, dy))
            rows.append({"of": "ranks", "value": r, "kind": kind})
    return runs, rows


def over_tasks(num_tokens: int, d: int, tasks: list[int]) -> tuple[Runs, list[dict[str, Any]]]:
    """MoRE with 8 ranks, a batch of eight examples of as many tasks as there are."""
    x = torch.randn(8, num_tokens // 8, d, requires_grad=True)
    dy = torch.randn_like(x)
    runs, rows = {}, []
    for number in tasks:
        config = RankExpertConfig.more(
            tasks=[f"task {i}" for i in range(number)],
            alpha=16,
            rank_scaling="none",
            contrastive_coef=0.0,
            target_modules=["0"],
            init_weights=False,
        )
        layer = inject_rank_experts(nn.Sequential(nn.Linear(d, d)), config)[0].train()
        choose_ranks(layer.rank_experts["default"], [1 + i % 8 for i in range(number)])
        runs[f"more {number}"] = step(layer, x, dy, torch.arange(8) % number)
        rows.append({"of": "tasks", "value": number, "kind": "more8 native"})
    return runs, rows


def over_layers(num_tokens: int, hidden: int, layers: list[int]) -> tuple[Runs, list[dict[str, Any]]]:
    """Whole training steps of Llama-shaped models of so many layers."""
    ids = torch.randint(1, 1024, (4, num_tokens // 4))
    runs, rows = {}, []
    for number in layers:
        for kind in ("base", "lora64", "smora", "smora native"):
            model = adapt(base_model("llama", hidden, number, torch.float32), kind).train()
            run = training_step(model, {"input_ids": ids, "labels": ids}, kind)
            runs[f"{kind} {number}"] = pytorch_or_native(kind, run)
            rows.append({"of": "layers", "value": number, "kind": kind})
    return runs, rows


def main() -> None:
    """Read the arguments, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 8, 32, 128])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--name", default="growth")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for runs, described in (
        over_ranks(args.tokens, args.width, args.ranks),
        over_tasks(args.tokens, args.width, args.tasks),
        over_layers(args.tokens, args.hidden, args.layers),
    ):
        times = spread(in_turn(runs, args.repeats, args.clock, warm_up=2))
        rows += [{**row, **value} for row, value in zip(described, times.values(), strict=True)]
        print({name: value["median_ms"] for name, value in times.items()}, flush=True)
    write(args.name, machine(args.threads, args.clock), rows)


if __name__ == "__main__":
    main()
