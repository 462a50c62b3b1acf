"""One process of a DeepSpeed run on CPUs, started by torch.distributed.run from test_distributed.py.

    python -m torch.distributed.run --nproc_per_node 2 deepspeed_worker.py ENGINE FOLDER      ENGINE: zero2 or zero3

Does and writes what distributed_worker.py does, with DeepSpeed's own engine: accelerate leaves DeepSpeed out on CPUs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from distributed_worker import batches, biases, make_model
from gates import GATES
from rank_experts import files, save_rank_experts, update_router_bias


def engine_config(stage: int) -> dict:
    """docs/works-with.md shows this; DeepSpeed clips gradients to a norm of 1 unless told otherwise."""
    return {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def run(gate: str, stage: int, folder: Path) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    model = make_model(gate)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=engine_config(stage))
    losses = []
    for inputs in batches(gate):
        loss = engine(**{name: tensor.chunk(world)[rank] for name, tensor in inputs.items()}).loss
        engine.backward(loss)
        engine.step()
        update_router_bias(engine)
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(float(mean) / world)
    written = []
    write_pair = files.write_pair
    files.write_pair = lambda *args, **kwargs: written.append(1) or write_pair(*args, **kwargs)
    save_rank_experts(engine.module, folder / gate / "ours")
    files.write_pair = write_pair
    report = {
        "engine": type(engine.optimizer).__name__,
        "sharded": sum(hasattr(p, "ds_id") and p.numel() == 0 for p in model.parameters()),
        "losses": losses,
        "bias": biases(model),
        "written": len(written),
    }
    (folder / f"{gate}-{rank}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    for each in GATES:
        run(each, int(sys.argv[1].removeprefix("zero")), Path(sys.argv[2]))
    dist.barrier()
    dist.destroy_process_group()
