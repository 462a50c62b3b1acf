"""Tokens per second of decoding with a cache, adapters on every linear layer of a Llama-shaped model.

python examples/benchmarks/speed/decode.py --hidden 1024 --layers 4 --batch 1 8
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import nn

from measure import in_turn, machine, overheads, spread, write
from models import VARIANTS, adapt, base_model
from rank_experts import use_task
from variants import pytorch_or_native


def decoding(model: nn.Module, batch: int, tokens: int, variant: str) -> Callable[[], None]:
    """Return one greedy generation of `tokens` tokens an example."""
    prompt = torch.randint(1, 1024, (batch, 4))

    def run() -> None:
        generate = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        if variant.startswith("more8"):
            with use_task(model, "middle"):
                model.generate(input_ids=prompt, **generate)
        else:
            model.generate(input_ids=prompt, **generate)

    return run


def main() -> None:
    """Read the arguments, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--variants", nargs="+", default=VARIANTS[:-2], choices=VARIANTS)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--name", default="decode")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    dtype = getattr(torch, args.dtype)
    models = {name: adapt(base_model("llama", args.hidden, args.layers, dtype), name).eval() for name in args.variants}
    for batch in args.batch:
        runs = {
            name: pytorch_or_native(name, decoding(model, batch, args.tokens, name)) for name, model in models.items()
        }
        times = in_turn(runs, args.repeats, args.clock, warm_up=1)
        rate = {k: round(batch * args.tokens / v["median_ms"] * 1e3, 1) for k, v in spread(times).items()}
        total = overheads(times, lambda variant: "lora64", base=None)
        row = {name: getattr(args, name) for name in ("hidden", "layers", "tokens", "dtype")}
        rows.append({"batch": batch, **row, "times": spread(times), "tokens_per_second": rate, "total": total})
        print(batch, rate, total["range"], flush=True)
    write(args.name, machine(args.threads, args.clock), rows)


if __name__ == "__main__":
    main()
