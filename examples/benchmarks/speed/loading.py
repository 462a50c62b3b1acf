"""Time to import the library, to adapt a model of 7-billion-parameter shape, and to load an adapter onto it.

The base lies on the meta device; PEFT's LoRA of rank 64 does the same beside it. Adapters are bfloat16, on every linear
layer. Loaded by `PeftModel.from_pretrained` they come to life on the CPU, ours and PEFT's.

python examples/benchmarks/speed/loading.py
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from measure import Rounds, in_turn, machine, overheads, spread, write
from rank_experts import RankExpertConfig, inject_rank_experts

IMPORTS = {"peft": "import peft", "rank_experts": "import peft, rank_experts"}


def base(layers: int, hidden: int) -> nn.Module:
    """A Llama on the meta device; 32 layers of 4,096 have 7 billion parameters."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def inject(kind: str, model: nn.Module) -> nn.Module:
    """Adapt a model by `inject_rank_experts`, or by `get_peft_model` with either config."""
    if kind == "inject_rank_experts":
        return inject_rank_experts(
            model, RankExpertConfig.smora(alpha=4, target_modules="all-linear"), autocast_adapter_dtype=False
        )
    config: Any = RankExpertConfig.smora(alpha=4, target_modules="all-linear")
    if kind == "lora64":
        config = LoraConfig(r=64, target_modules="all-linear")
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def save(kind: str, model: nn.Module, folder: Path) -> None:
    """Write an adapter of the model's shape."""
    adapted = inject(kind, model)
    for module in adapted.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad:
                setattr(module, name, nn.Parameter(torch.zeros(parameter.shape, dtype=parameter.dtype)))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if name == "balance_bias":
                module.register_buffer(name, torch.zeros(buffer.shape))
    adapted.save_pretrained(folder)


def import_seconds(statement: str) -> float:
    """Return the processor time of a fresh interpreter that runs a statement."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", statement], check=True, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def importing(repeats: int) -> Rounds:
    """Return the milliseconds of each statement, in turn."""
    found: Rounds = {name: [] for name in IMPORTS}
    for _ in range(repeats):
        for name, statement in IMPORTS.items():
            found[name].append(1e3 * import_seconds(statement))
    return found


def main() -> None:
    """Read the arguments, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--name", default="loading")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    kinds = ["lora64", "smora", "inject_rank_experts"]
    size = {"layers": args.layers, "hidden": args.hidden}
    times = importing(min(args.repeats, 5))  # each takes seconds
    total = overheads(times, lambda kind: "peft", base=None)
    rows: list[dict[str, Any]] = [{"of": "importing", "times": spread(times), "total": total}]
    print("importing", total["range"], flush=True)

    # The base is made anew for each run, outside of the clock: adapting changes it.
    def adapting(kind: str) -> Callable[[], None]:
        models = [base(**size) for _ in range(args.repeats + 1)]
        return lambda: (inject(kind, models.pop()), None)[1]

    times = in_turn({kind: adapting(kind) for kind in kinds}, args.repeats, args.clock, warm_up=1)
    total = overheads(times, lambda kind: "lora64", base=None)
    rows.append({"of": "adapting", **size, "times": spread(times), "total": total})
    print("adapting", total["range"], flush=True)
    with tempfile.TemporaryDirectory() as folder:
        loads = {}
        for kind in kinds[:2]:
            save(kind, base(**size), Path(folder) / kind)
            models = [base(**size) for _ in range(args.repeats + 1)]

            def load(path: Path = Path(folder) / kind, models: list[nn.Module] = models) -> None:
                PeftModel.from_pretrained(models.pop(), path, low_cpu_mem_usage=True, torch_device="cpu")

            loads[kind] = load
        sizes = {kind: sum(file.stat().st_size for file in (Path(folder) / kind).iterdir()) for kind in loads}
        times = in_turn(loads, args.repeats, args.clock, warm_up=1)
    total = overheads(times, lambda kind: "lora64", base=None)
    rows.append({"of": "loading", **size, "times": spread(times), "total": total, "bytes": sizes})
    print("loading", total["range"], sizes, flush=True)
    write(args.name, machine(args.threads, args.clock), rows)


if __name__ == "__main__":
    main()
