"""Time of a whole training step, forward and backward and AdamW, with adapters on every linear layer.

python examples/benchmarks/speed/training_step.py --shape llama --hidden 512 --layers 8 --length 256 --batch 4
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from measure import in_turn, machine, overheads, spread, write
from models import VARIANTS, adapt, base_model
from rank_experts import update_router_bias
from variants import pytorch_or_native


def training_step(model: nn.Module, inputs: dict[str, Any], variant: str) -> Callable[[], None]:
    """Return one step; the frozen base passes gradients to its input embeddings, as checkpointing has it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
    if variant == "base":
        inputs = inputs | {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).requires_grad_()}
        del inputs["input_ids"]

    def run() -> None:
        model(**inputs).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        if variant.startswith("smora"):
            update_router_bias(model)

    return run


def main() -> None:
    """Read the arguments, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["llama", "t5"], choices=["llama", "t5"])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, nargs="+", default=[4])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--name", default="training_step")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for shape in args.shape:
        for layers in args.layers:
            ids = torch.randint(1, 1024, (args.batch, args.length))
            runs = {}
            # X-LoRA's classifier takes a decoder alone.
            for variant in (each for each in args.variants if each != "xlora" or shape == "llama"):
                model = adapt(base_model(shape, args.hidden, layers, getattr(torch, args.dtype)), variant).train()
                inputs: dict[str, Any] = {"input_ids": ids, "labels": ids}
                if variant.startswith("more8"):
                    inputs["task_ids"] = torch.arange(args.batch) % 3
                runs[variant] = pytorch_or_native(variant, training_step(model, inputs, variant))
            times = in_turn(runs, args.repeats, args.clock, warm_up=1, seldom=["xlora", "published"])
            row = {name: getattr(args, name) for name in ("hidden", "batch", "length", "dtype")}
            total = overheads(times, lambda variant: "lora64", base=None)
            rows.append({"shape": shape, "layers": layers, **row, "times": spread(times), "total": total})
            print(shape, layers, "total", total["range"], flush=True)
    write(args.name, machine(args.threads, args.clock), rows)


if __name__ == "__main__":
    main()
