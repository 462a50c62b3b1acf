"""Adapted models on a CUDA device against the same models on the CPU, in float64 there: kernels, tasks, graphs."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import StaticCache

import models
from rank_experts import RankExpertConfig, inject_rank_experts

pytestmark = pytest.mark.gpu
TASKS = ["long", "short", "middle"]


def adapted(router: str, **kwargs):
    preset = RankExpertConfig.smora if router == "token" else RankExpertConfig.more
    values = {"r": 16, "top_k": 4} if router == "token" else {"r": 8, "tasks": TASKS}
    config = preset(**values, **kwargs, target_modules=["q_proj", "v_proj", "down_proj"], init_weights=False)
    return inject_rank_experts(models.llama(), config).eval()


def inputs(device: str):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (3, 9), generator=generator).to(device)
    return {"input_ids": ids, "labels": ids}


def called(router: str, device: str):
    return inputs(device) | ({"task_ids": torch.tensor([2, 0, 1], device=device)} if router == "task" else {})


@pytest.mark.parametrize("router", ["token", "task"])
@pytest.mark.parametrize("training", [True, False])
def test_a_model_gives_what_it_gives_on_the_cpu(router, training):
    exact = adapted(router).double().train(training)
    model = copy.deepcopy(exact).float().cuda()
    theirs = exact(**called(router, "cpu"))
    ours = model(**called(router, "cuda"))
    torch.testing.assert_close(ours.logits.cpu().double(), theirs.logits, rtol=1e-4, atol=1e-4)
    ours.loss.backward(), theirs.loss.backward()
    expected = {name: p.grad for name, p in exact.named_parameters() if p.requires_grad}
    for name, p in model.named_parameters():
        if p.requires_grad and expected[name] is not None:
            size = expected[name].abs().max().item()
            torch.testing.assert_close(p.grad.cpu().double(), expected[name], rtol=1e-3, atol=1e-3 * size, msg=name)


@pytest.mark.parametrize("router", ["token", "task"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_stays_near(router, dtype):
    exact = adapted(router).double()
    model = copy.deepcopy(exact).float().cuda()
    with torch.autocast("cuda", dtype):
        ours = model(**called(router, "cuda"))
    theirs = exact(**called(router, "cpu"))
    ours.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    torch.testing.assert_close(ours.loss.cpu(), theirs.loss, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("router", ["token", "task"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_gives_what_it_gives_on_the_cpu(router, beams):
    model = adapted(router)
    ids = inputs("cpu")["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    found = []
    for device in ("cpu", "cuda"):
        named = {"task_ids": torch.tensor([1, 0, 2], device=device)} if router == "task" else {}
        found.append(model.to(device).generate(ids.to(device), **named, **options).cpu())
    assert torch.equal(*found)


def test_ids_that_are_no_tasks_fail_on_the_device():
    script = (
        "import torch\n"
        "from calls.test_on_a_gpu import adapted, called\n"
        "model = adapted('task').cuda()\n"
        "model(**called('task', 'cuda'))\n"
        "model(**called('task', 'cuda') | {'task_ids': torch.tensor([2, 0, 3], device='cuda')})\n"
        "torch.cuda.synchronize()\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "device-side assert" in done.stderr


@pytest.mark.parametrize("router", ["token", "task"])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_waits_for_the_device(router, training):
    layer = nn.Sequential(nn.Linear(16, 12))
    config = RankExpertConfig.smora(r=8, top_k=2) if router == "token" else RankExpertConfig.more(TASKS, r=8)
    config.target_modules = ["0"]
    model = inject_rank_experts(layer, config).cuda().train(training)
    x = torch.randn(3, 5, 16, device="cuda", requires_grad=True)
    told = {"task_ids": torch.tensor([2, 0, 1], device="cuda")} if router == "task" else {}
    for mode in ("default", "error"):  # The first step compiles kernels.
        torch.cuda.set_sync_debug_mode(mode)
        try:
            model(x, **told).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("router", ["token", "task"])
def test_a_compiled_model_with_cuda_graphs_gives_the_same(router):
    model = adapted(router).cuda()
    compiled = torch.compile(model.forward, mode="reduce-overhead", dynamic=False)
    with torch.no_grad():
        theirs = model(**called(router, "cuda")).logits
        for _ in range(3):
            ours = compiled(**called(router, "cuda")).logits.clone()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_step_of_decoding_is_captured_in_a_graph():
    model = adapted("token").cuda()
    cache = StaticCache(config=model.config, max_cache_len=16)
    ids, place = torch.tensor([[5]], device="cuda"), torch.tensor([0], device="cuda")
    step = {"input_ids": ids, "past_key_values": cache, "cache_position": place, "position_ids": place[None]}
    with torch.no_grad():
        theirs = model(**step).logits.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                model(**step)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ours = model(**step).logits
        graph.replay()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
