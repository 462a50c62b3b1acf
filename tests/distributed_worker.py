"""One process of a distributed run, started by `accelerate launch` from test_distributed.py.

    accelerate launch ... distributed_worker.py ENGINE FOLDER        ENGINE: ddp or fsdp2

For each gate: trains a tiny model on a fixed global batch of four examples a step, this process's share of it, and
writes the loss curve, this process's balancing biases, and the adapter.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import models
from gates import GATES, config
from rank_experts import save_rank_experts, update_router_bias
from rank_experts.files import saving

STEPS = 6


def batches(gate: str):
    generator = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        ids = torch.randint(1, models.VOCAB, (4, 6), generator=generator)
        mask = torch.ones_like(ids)
        mask[:, -1] = 0
        inputs = {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
        if gate == "task":
            inputs["task_ids"] = torch.tensor([0, 1, 2, 0])
        yield inputs


def make_model(gate: str):
    torch.manual_seed(0)
    kwargs = {"r": 8, "balance_rate": 0.05} if gate == "token" else {}
    return get_peft_model(models.llama(), config(gate, task_type="CAUSAL_LM", **kwargs)).train()


def train(model, gate: str, rank: int = 0, world: int = 1):
    """Yield the loss of this process's share of each global batch, after a step on it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for inputs in batches(gate):
        loss = model(**{name: tensor.chunk(world)[rank] for name, tensor in inputs.items()}).loss
        loss.backward()
        optimizer.step()
        update_router_bias(model)
        optimizer.zero_grad()
        yield loss.detach()


def biases(model) -> dict[str, list[float]]:
    return {name: b.tolist() for name, b in model.named_buffers() if "balance_bias" in name}


def run(accelerator: Accelerator, gate: str, engine: str, folder: Path) -> None:
    model = make_model(gate)
    if engine == "fsdp2":
        # What accelerate's plugin does with `fsdp_version: 2`; the plugin itself wants an accelerator.
        for block in model.get_base_model().model.layers:
            fully_shard(block)
        fully_shard(model)
    else:
        model = accelerator.prepare(model)
    rank = accelerator.process_index
    losses = [float(accelerator.gather(loss).mean()) for loss in train(model, gate, rank, accelerator.num_processes)]
    plain = accelerator.unwrap_model(model)
    written = []
    write_pair = saving.write_pair
    saving.write_pair = lambda *args, **kwargs: written.append(1) or write_pair(*args, **kwargs)
    save_rank_experts(plain, folder / gate / "ours")
    saving.write_pair = write_pair
    report = {
        "engine": type(model).__name__,
        "sharded": sum(isinstance(p, DTensor) for p in model.parameters()),
        "losses": losses,
        "bias": biases(plain),
        "written": len(written),
    }
    (folder / f"{gate}-{rank}.json").write_text(json.dumps(report))
    state = get_model_state_dict(plain, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    plain.save_pretrained(folder / gate / "peft", state_dict=state, is_main_process=accelerator.is_main_process)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    torch.set_num_threads(1)
    launched = Accelerator(cpu=True)
    for each in GATES:
        run(launched, each, sys.argv[1], Path(sys.argv[2]))
    launched.end_training()
