"""What adapted layers cost on a GPU, against PEFT's LoRA: one layer's step, and decoding.

    overhead = (variant − frozen layers) / (PEFT LoRA r=64 − frozen layers)

A step or a token is captured in a CUDA graph and replayed, so that the GPU's time counts and Python's does not;
`--eager` leaves Python in, as where nothing else keeps the GPU busy. Not part of `make bench`.

    python examples/benchmarks/speed/gpu.py
    python examples/benchmarks/speed/gpu.py --device cpu --eager --tokens 64 --width 64 --name trial   # whether it runs
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from measure import in_turn, machine, overheads, spread, write
from variants import layer, step

LAYERS = ["base", "lora64", "smora", "dense64"]


def replayed(run: Callable[[], Any], times: int) -> Callable[[], None]:
    """Capture a run in a CUDA graph; return what replays it so many times."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(5):  # Kernels are compiled and tuned.
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return lambda: [graph.replay() for _ in range(times)] and None


def repeated(run: Callable[[], Any], times: int) -> Callable[[], None]:
    """Return what runs so many times."""
    return lambda: [run() for _ in range(times)] and None


def without_gradients(module: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """Return one forward for inference."""

    def run() -> None:
        with torch.no_grad():
            module(x)

    return run


def compare(of: str, runs: dict[str, Callable[[], Any]], args: argparse.Namespace, **size: Any) -> dict[str, Any]:
    """Measure runs in turn; `tokens` and what else is in `size` describes them."""
    timed = {kind: (repeated if args.eager else replayed)(run, args.replays) for kind, run in runs.items()}
    times = in_turn(timed, args.repeats, seconds=args.seconds)
    row = {"of": of, **size, "dtype": args.dtype, "eager": args.eager, "replays": args.replays}
    row |= {"rounds": len(times["base"]), "times": spread(times)}
    row |= {"overhead": overheads(times, lambda kind: "lora64")}
    row |= {"total": overheads(times, lambda kind: "lora64", base=None)}
    print(of, size, "overhead", row["overhead"]["range"], flush=True)
    return row


def main(argv: list[str] | None = None) -> None:
    """Read the arguments, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="tokens of a decoding step")
    parser.add_argument("--width", type=int, nargs="+", default=[4096])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--eager", action="store_true", help="time Python too")
    parser.add_argument("--replays", type=int, default=10, help="runs between two looks at the clock")
    parser.add_argument("--repeats", type=int, default=15, help="rounds of each size, at least")
    parser.add_argument("--seconds", type=float, default=10, help="go on with a size for so long, 200 rounds at most")
    parser.add_argument("--name", default="gpu")
    args = parser.parse_args(argv)
    dtype, rows = getattr(torch, args.dtype), []
    options: dict[str, Any] = {"dtype": dtype, "device": args.device}
    for d in args.width:
        modules = {kind: layer(kind, d, dtype).to(args.device) for kind in LAYERS}
        for num_tokens in args.tokens:
            x, dy = torch.randn(num_tokens, d, **options).requires_grad_(), torch.randn(num_tokens, d, **options)
            runs = {kind: step(module.train(), x, dy) for kind, module in modules.items()}
            rows.append(compare("training", runs, args, tokens=num_tokens, width=d))
        for batch in args.batch:
            x = torch.randn(batch, d, **options)
            runs = {kind: without_gradients(module.eval(), x) for kind, module in modules.items()}
            rows.append(compare("decoding", runs, args, tokens=batch, width=d))
    write(args.name, machine(torch.get_num_threads(), "wall"), rows)


if __name__ == "__main__":
    main()
