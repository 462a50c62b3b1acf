"""Layers that read one input (q, k, v): with `share_inputs`, without, with the native kernel, and PEFT's LoRA.

overhead = (variant − frozen layers) / (PEFT LoRA r=64 − frozen layers), the three layers together

python examples/benchmarks/shared.py --tokens 64 512 --width 768 2048
"""

from __future__ import annotations

import argparse
from itertools import product
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from measure import in_turn, machine, overheads, spread, write
from rank_experts import RankExpertConfig, inject_rank_experts
from variants import pytorch_or_native, step

NAMES = ["q", "k", "v"]
KINDS = ["base", "lora64", "smora apart", "smora shared", "dense64 apart", "dense64 shared", "smora native"]


class Readers(nn.Module):
    """Three layers that read one tensor, which has a graph of its own as in a model."""

    def __init__(self, d: int, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(d, d, bias=False, dtype=dtype).requires_grad_(False) for _ in NAMES)

    def forward(self, x: Tensor) -> Tensor:
        """(N, d) to (N, d)."""
        x = x * 1
        return self.q(x) + self.k(x) + self.v(x)


def variant(kind: str, d: int, dtype: torch.dtype) -> nn.Module:
    """Build "base", "lora64", or one of ours: "smora" or "dense64", then "apart" or "shared"."""
    model = Readers(d, dtype)
    if kind == "base":
        return model
    common: dict[str, Any] = dict(target_modules=NAMES)
    if kind == "lora64":
        config = LoraConfig(r=64, lora_alpha=16, init_lora_weights=False, **common)
        return get_peft_model(model, config, autocast_adapter_dtype=False).base_model.model
    make = RankExpertConfig.smora if kind.startswith("smora") else RankExpertConfig.lora
    config = make(r=64, init_weights=False, share_inputs=kind.endswith("shared"), **common)
    return inject_rank_experts(model, config, autocast_adapter_dtype=False)


def main() -> None:
    """Read the arguments, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--width", type=int, nargs="+", default=[768, 2048])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--name", default="shared")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for dtype_name, d, num_tokens in product(args.dtype, args.width, args.tokens):
        dtype = getattr(torch, dtype_name)
        x, dy = torch.randn(num_tokens, d, dtype=dtype, requires_grad=True), torch.randn(num_tokens, d, dtype=dtype)
        runs = {kind: pytorch_or_native(kind, step(variant(kind, d, dtype).train(), x, dy)) for kind in KINDS}
        times = in_turn(runs, args.repeats, args.clock, seconds=8)
        overhead = overheads(times, lambda kind: "lora64")
        row = {"tokens": num_tokens, "width": d, "dtype": dtype_name}
        rows.append({**row, "times": spread(times), "overhead": overhead})
        print(*row.values(), "overhead", overhead["range"], flush=True)
    write(args.name, machine(args.threads, args.clock), rows)


if __name__ == "__main__":
    main()
