"""Two real processes on gloo: data-parallel and sharded training equal one process on the same global batch."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import models
from distributed_worker import STEPS, batches, biases, make_model, train
from gates import GATES
from rank_experts import load_rank_experts, save_rank_experts

HERE = Path(__file__).parents[1]
SOURCE = HERE.parent / "src"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def launch(engine: str, folder: Path) -> None:
    """Train all three gates on two processes, which write into the folder."""
    for gate in GATES:
        (folder / gate).mkdir()
    if engine.startswith("zero"):
        launcher = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
        run([sys.executable, "-m", *launcher, str(HERE / "deepspeed_worker.py"), engine, str(folder)])
        return
    # --multi_gpu is the launcher for several processes; ACCELERATE_USE_CPU turns them to gloo.
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--main_process_port", str(free_port()), str(HERE / "distributed_worker.py"), engine, str(folder)),
    ]
    run(command)


def run(command: list[str]) -> None:
    path = os.pathsep.join([str(SOURCE), str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    environment |= {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]


def alone(gate: str, folder: Path):
    """The same training in this process: its losses, balancing biases and adapter."""
    model = make_model(gate)
    losses = [float(loss) for loss in train(model, gate)]
    save_rank_experts(model, folder)
    return losses, biases(model), load_file(folder / "adapter_model.safetensors")


def report(folder: Path, gate: str, rank: int) -> dict:
    return json.loads((folder / f"{gate}-{rank}.json").read_text())


needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


@pytest.mark.parametrize(
    "engine",
    ["ddp", "fsdp2", pytest.param("zero2", marks=needs_deepspeed), pytest.param("zero3", marks=needs_deepspeed)],
)
def test_two_processes_equal_one(engine, tmp_path):
    """One test an engine, because the processes take much longer to start than to train."""
    launch(engine, tmp_path)
    for gate in GATES:
        reports = [report(tmp_path, gate, rank) for rank in range(2)]
        losses, bias, expected = alone(gate, tmp_path / "alone" / gate)
        check_engine(engine, reports)
        assert len(losses) == STEPS
        assert losses[-1] != losses[0]
        for found in reports:
            assert found["losses"] == pytest.approx(losses, rel=2e-5)
            assert found["bias"] == bias  # the same on all ranks, to the bit
        assert any(value for values in bias.values() for value in values) == (gate == "token")
        assert [found["written"] for found in reports] == [1, 0]
        for way in ("ours",) if engine.startswith("zero") else ("ours", "peft"):
            check_adapter(tmp_path / gate / way, gate, expected)


def check_engine(engine: str, reports: list[dict]) -> None:
    for found in reports:
        if engine == "ddp":
            assert found["engine"] == "DistributedDataParallel"
        elif engine.startswith("zero"):
            assert found["engine"].startswith("DeepSpeedZeroOptimizer")
            assert (found["sharded"] > 40) == (engine == "zero3")
        else:
            assert found["engine"].startswith("FSDP")
            assert found["sharded"] > 40


def check_adapter(folder: Path, gate: str, expected: dict[str, torch.Tensor]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        # Adam divides by the root of squared gradients: where those are tiny, rounding shows.
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=2e-4, msg=lambda t, n=name: f"{n}: {t}")
    loaded = load_rank_experts(models.llama(), folder).eval()
    with torch.no_grad():
        assert torch.isfinite(loaded(**next(batches(gate))).logits).all()
