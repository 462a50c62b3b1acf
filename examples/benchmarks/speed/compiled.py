"""Layers under torch.compile: the update as one node of the graph, against the plain formula that inductor fuses.

overhead = (variant − frozen layer) / (PEFT LoRA r=64 − frozen layer), all compiled

python examples/benchmarks/speed/compiled.py --tokens 512 --width 2048
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor, nn

from measure import in_turn, machine, overheads, spread, write
from rank_experts.layers import RankExpertLinear
from rank_experts.ops import rank_experts_reference
from variants import layer, step


class Decomposed(nn.Module):
    """One of our layers, computed by the plain formula."""

    def __init__(self, ours: RankExpertLinear) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, x: Tensor) -> Tensor:
        """(…, d_in) to (…, d_out)."""
        ours = self.ours
        adapter = ours.rank_experts["default"]
        flat = x.reshape(-1, x.shape[-1])
        gates = adapter.token_gate().route(flat).gates if adapter.settings.router == "token" else None
        y = ours.base_layer(flat)
        return rank_experts_reference(y, flat, adapter.A, adapter.B, gates, adapter.scale).view(*x.shape[:-1], -1)


def variants(d: int, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Name to layer; the load is not counted, so that only the update differs."""
    layers: dict[str, nn.Module] = {kind: layer(kind, d, dtype) for kind in ("base", "lora64", "smora", "dense64")}
    for kind in ("smora", "dense64"):
        layers[f"{kind}, plain formula"] = Decomposed(layers[kind])
    return {name: module.eval() for name, module in layers.items()}


def main() -> None:
    """Read the arguments, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512])
    parser.add_argument("--width", type=int, nargs="+", default=[2048])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--name", default="compiled")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for dtype_name, d, num_tokens in product(args.dtype, args.width, args.tokens):
        torch.compiler.reset()
        dtype = getattr(torch, dtype_name)
        x, dy = torch.randn(num_tokens, d, dtype=dtype, requires_grad=True), torch.randn(num_tokens, d, dtype=dtype)
        runs: dict[str, Callable[[], None]] = {}
        for name, module in variants(d, dtype).items():
            runs[name] = step(torch.compile(module, fullgraph=True), x, dy)
        times = in_turn(runs, args.repeats, args.clock, seconds=8)
        overhead = overheads(times, lambda kind: "lora64")
        row = {"tokens": num_tokens, "width": d, "dtype": dtype_name}
        rows.append({**row, "times": spread(times), "overhead": overhead})
        print(*row.values(), "overhead", overhead["range"], flush=True)
    write(args.name, machine(args.threads, args.clock), rows)


if __name__ == "__main__":
    main()
