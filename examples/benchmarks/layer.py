"""Time and memory of one adapted layer, forward and backward, against PEFT's LoRA and the published algorithm.

    overhead = (variant − frozen layer) / (PEFT LoRA − frozen layer)      total = variant / PEFT LoRA

with PEFT LoRA of rank 64 for SMoRA and of rank 8 for MoRE. At large widths the frozen layer hides everything in
`total`, so both are given.

"smora" is SMoRA in PyTorch alone, "smora native" with the native CPU kernel where there is a compiler.

    python examples/benchmarks/layer.py --tokens 512 4096 --width 768 2048 --dtype float32
"""

from __future__ import annotations

import argparse
from itertools import product
from typing import Any

import torch

from measure import in_turn, machine, peak_bytes, saved_bytes, write
from rank_experts.ops import rank_experts_reference
from variants import TASKS, PublishedSMoRA, layer, pytorch_or_native, step

KINDS = ["base", "lora64", "smora", "smora native", "dense64", "lora8", "more8 one task", "more8 mixed"]


def check(d: int, dtype: torch.dtype) -> None:
    """Refuse to time what does not compute the formula."""
    ours = layer("smora", d, dtype)
    x = torch.randn(64, d, dtype=dtype)
    A, B = ours.rank_expert_A["default"], ours.rank_expert_B["default"]
    gates = ours.rank_expert_router["default"](x).gates
    expected = rank_experts_reference(ours.base_layer(x), x, A, B, gates, ours.scale("default"))
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    with torch.no_grad():
        for found in (ours(x), PublishedSMoRA(ours)(x)):
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def measure(num_tokens: int, d: int, dtype: torch.dtype, repeats: int, clock: str, published: bool) -> dict[str, Any]:
    """Measure all kinds at one size."""
    x = torch.randn(num_tokens, d, dtype=dtype, requires_grad=True)
    dy = torch.randn(num_tokens, d, dtype=dtype)
    kinds = [*KINDS, *(["published"] if published else [])]
    runs, layers = {}, {}
    for kind in kinds:
        layers[kind] = module = layer(kind.split()[0], d, dtype).train()
        mixed = torch.arange(min(num_tokens, 4)) % len(TASKS)
        tasks = {"more8 one task": TASKS[1], "more8 mixed": mixed}.get(kind)
        shaped = (num_tokens // len(mixed), len(mixed)) if kind == "more8 mixed" else None
        if shaped and num_tokens % len(mixed) == 0:
            view, dview = x.view(len(mixed), -1, d), dy.view(len(mixed), -1, d)
            view = view.detach().requires_grad_()
            runs[kind] = step(module, view, dview, tasks)
        else:
            run = step(module, x, dy, TASKS[1] if kind.startswith("more8") else None)
            runs[kind] = pytorch_or_native(kind, run)
    times = in_turn(runs, repeats, clock, warm_up=2)
    row: dict[str, Any] = {"tokens": num_tokens, "width": d, "dtype": str(dtype).removeprefix("torch."), "times": times}
    base = times["base"]["median_ms"]
    row["overhead"], row["total"] = {}, {}
    for kind in kinds:
        lora = times["lora8" if kind.startswith("more8") else "lora64"]["median_ms"]
        row["overhead"][kind] = round((times[kind]["median_ms"] - base) / (lora - base), 3)
        row["total"][kind] = round(times[kind]["median_ms"] / lora, 3)
    row["peak_bytes"] = {kind: peak_bytes(runs[kind]) for kind in kinds}
    row["saved_bytes"] = {
        kind: saved_bytes(lambda kind=kind: layers[kind](x), [x, *layers[kind].parameters()])
        for kind in kinds
        if not kind.startswith("more8") and not kind.endswith("native")
    }
    return row


def main() -> None:
    """Read the arguments, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 512, 4096, 16384])
    parser.add_argument("--width", type=int, nargs="+", default=[768, 2048, 4096])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--limit", type=int, default=2**34, help="leave out sizes with more tokens × width²")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--published-up-to", type=int, default=512, help="tokens; the published way needs gigabytes")
    parser.add_argument("--name", default="layer")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for dtype_name, d, num_tokens in product(args.dtype, args.width, args.tokens):
        if num_tokens * d * d > args.limit:
            continue
        dtype = getattr(torch, dtype_name)
        check(d, dtype)
        row = measure(num_tokens, d, dtype, args.repeats, args.clock, num_tokens <= args.published_up_to)
        rows.append(row)
        shown = {kind: value for kind, value in row["overhead"].items() if kind not in ("base", "lora64", "lora8")}
        print(num_tokens, d, dtype_name, "overhead", shown, "total smora", row["total"]["smora"], flush=True)
    write(args.name, machine(args.threads, args.clock), rows)


if __name__ == "__main__":
    main()
