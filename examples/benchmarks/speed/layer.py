"""Time and memory of one adapted layer, forward and backward, against PEFT's LoRA and the published algorithm.

    overhead = (variant − frozen layer) / (PEFT LoRA − frozen layer)      total = variant / PEFT LoRA

with PEFT LoRA of rank 64 for SMoRA and of rank 8 for MoRE. At large widths the frozen layer hides everything in
`total`, so both are given.

"smora" and "more8" are PyTorch alone, with "native" the native CPU kernel where there is a compiler.

    python examples/benchmarks/speed/layer.py --tokens 512 4096 --width 768 2048 --dtype float32
"""

from __future__ import annotations

import argparse
from itertools import product
from typing import Any

import torch

from measure import in_turn, machine, overheads, peak_bytes, saved_bytes, spread, write
from rank_experts.ops import rank_experts_reference
from variants import TASKS, PublishedSMoRA, layer, pytorch_or_native, step

KINDS = ["base", "lora64", "smora", "smora native", "dense64", "lora8"]
KINDS += [f"more8 {tasks}{kernel}" for tasks in ("one task", "mixed") for kernel in ("", " native")]


def check(d: int, dtype: torch.dtype) -> None:
    """Refuse to time what does not compute the formula."""
    ours = layer("smora", d, dtype)
    x = torch.randn(64, d, dtype=dtype)
    A, B = ours.rank_experts["default"].A, ours.rank_experts["default"].B
    gates = ours.rank_experts["default"].token_gate().route(x).gates
    expected = rank_experts_reference(ours.base_layer(x), x, A, B, gates, ours.rank_experts["default"].scale)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    with torch.no_grad():
        for found in (ours(x), PublishedSMoRA(ours)(x)):
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def reference(kind: str) -> str:
    """Return what a kind is compared with."""
    return "lora8" if kind.startswith("more8") else "lora64"


def measure(
    num_tokens: int, d: int, dtype: torch.dtype, repeats: int, seconds: float, clock: str, published: bool
) -> dict[str, Any]:
    """Measure all kinds at one size."""
    x = torch.randn(num_tokens, d, dtype=dtype, requires_grad=True)
    dy = torch.randn(num_tokens, d, dtype=dtype)
    kinds = [*KINDS, *(["published"] if published else [])]
    runs, layers = {}, {}
    for kind in kinds:
        layers[kind] = module = layer(kind.split()[0], d, dtype).train()
        mixed = torch.arange(min(num_tokens, 4)) % len(TASKS)
        if kind.startswith("more8 mixed"):
            view = x.view(len(mixed), -1, d).detach().requires_grad_()
            run = step(module, view, dy.view(view.shape), mixed)
        else:
            run = step(module, x, dy, TASKS[1] if kind.startswith("more8") else None)
        runs[kind] = pytorch_or_native(kind, run)
    times = in_turn(runs, repeats, clock, warm_up=2, seconds=seconds, seldom=["published"])
    row: dict[str, Any] = {"tokens": num_tokens, "width": d, "dtype": str(dtype).removeprefix("torch.")}
    row |= {"rounds": len(times["base"]), "times": spread(times)}
    row["overhead"] = overheads(times, reference)
    row["total"] = overheads(times, reference, base=None)
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
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 512, 4096, 16384], help="multiples of 4, or 1")
    parser.add_argument("--width", type=int, nargs="+", default=[768, 2048, 4096])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=15, help="rounds of each size, at least")
    parser.add_argument("--seconds", type=float, default=15, help="go on with a size for so long, 200 rounds at most")
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
        published = num_tokens <= args.published_up_to
        row = measure(num_tokens, d, dtype, args.repeats, args.seconds, args.clock, published)
        rows.append(row)
        shown = {k: v for k, v in row["overhead"]["range"].items() if k not in ("base", "lora64", "lora8")}
        print(num_tokens, d, dtype_name, row["rounds"], "rounds, overhead", shown, flush=True)
    write(args.name, machine(args.threads, args.clock), rows)


if __name__ == "__main__":
    main()
