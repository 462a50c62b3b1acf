"""Two real processes on gloo: data-parallel and sharded training equal one process on the same global batch."""

from __future__ import annotations

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

HERE = Path(__file__).parent
SOURCE = HERE.parent / "src"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def run(request, tmp_path_factory):
    """Two processes, all three gates; returns the engine and the folder that they wrote."""
    folder = tmp_path_factory.mktemp(request.param)
    for gate in GATES:
        (folder / gate).mkdir()
    # --multi_gpu is the launcher for several processes; ACCELERATE_USE_CPU turns them to gloo.
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--main_process_port", str(free_port()), str(HERE / "distributed_worker.py"), request.param, str(folder)),
    ]
    path = os.pathsep.join([str(SOURCE), str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    return request.param, folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same training in this process."""
    results = {}
    for gate in GATES:
        model = make_model(gate)
        losses = [float(loss) for loss in train(model, gate)]
        folder = tmp_path_factory.mktemp(gate)
        save_rank_experts(model, folder)
        results[gate] = losses, biases(model), load_file(folder / "adapter_model.safetensors")
    return results


def report(folder: Path, gate: str, rank: int) -> dict:
    return json.loads((folder / f"{gate}-{rank}.json").read_text())


@pytest.mark.parametrize("gate", GATES)
def test_the_engine_is_what_it_claims_to_be(run, gate):
    engine, folder = run
    for rank in range(2):
        found = report(folder, gate, rank)
        if engine == "ddp":
            assert found["engine"] == "DistributedDataParallel"
        else:
            assert found["engine"].startswith("FSDP")
            assert found["sharded"] > 40


@pytest.mark.parametrize("gate", GATES)
def test_the_loss_curve_equals_one_process(run, alone, gate):
    _, folder = run
    losses, _, _ = alone[gate]
    assert len(losses) == STEPS
    assert losses[-1] != losses[0]
    for rank in range(2):
        assert report(folder, gate, rank)["losses"] == pytest.approx(losses, rel=2e-5)


def test_the_balancing_bias_is_identical_on_all_ranks(run, alone):
    _, folder = run
    first, second = (report(folder, "token", rank)["bias"] for rank in range(2))
    assert first == second == alone["token"][1]
    assert any(abs(value) > 0 for bias in first.values() for value in bias)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("way", ["ours", "peft"])
def test_the_adapter_equals_one_process_and_loads_anywhere(run, alone, gate, way):
    _, folder = run
    tensors = load_file(folder / gate / way / "adapter_model.safetensors")
    expected = alone[gate][2]
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        # Adam divides by the root of squared gradients: where those are tiny, rounding shows.
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-3, atol=2e-4, msg=lambda t, name=name: f"{name}: {t}"
        )
    loaded = load_rank_experts(models.llama(), folder / gate / way).eval()
    inputs = next(batches(gate))
    with torch.no_grad():
        assert torch.isfinite(loaded(**inputs).logits).all()


@pytest.mark.parametrize("gate", GATES)
def test_saving_happens_once(run, gate):
    _, folder = run
    assert [report(folder, gate, rank)["written"] for rank in range(2)] == [1, 0]
