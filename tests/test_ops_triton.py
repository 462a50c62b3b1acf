"""The Triton kernels against the PyTorch ones, under Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from helpers import nan_in_new_buffers
from rank_experts.ops import fused, gate, triton_kernels
from rank_experts.ops.fused import Base
from rank_experts.ops.gate import Chosen, GateSpec
from rank_experts.routing import expert_load

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
if torch.cuda.is_available():  # The interpreter and a GPU exclude each other.
    DEVICES = DEVICES[1:]

SPECS = {
    "token": (12, 1, GateSpec(3, "sigmoid", False, 0.7)),
    "odd": (37, 1, GateSpec(8, "sigmoid", False, 0.7)),
    "one": (1, 1, GateSpec(1, "sigmoid", False, 0.7)),
    "softmax": (12, 1, GateSpec(3, "softmax", False, 0.7)),
    "biased": (12, 1, GateSpec(3, "sigmoid", True, 0.7)),
    "biased softmax": (12, 1, GateSpec(5, "softmax", True, 0.7)),
    "blocks": (4, 3, GateSpec(2, "sigmoid", False, 0.7)),
    "biased blocks": (5, 4, GateSpec(3, "sigmoid", True, 0.7)),
    "many": (256, 1, GateSpec(8, "sigmoid", False, 0.7)),
}


@pytest.fixture(autouse=True)
def _nan_in_new_buffers(monkeypatch):
    nan_in_new_buffers(monkeypatch, triton_kernels)


def close(ours, theirs, tolerance):
    assert ours.dtype == theirs.dtype
    size = theirs.abs().max().item() if theirs.numel() else 0.0
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * size, equal_nan=True)


def tensors(name, num_tokens, dtype, device):
    num_experts, rho, spec = SPECS[name]
    # Logits a sixteenth apart, with ties; beside the projections in one tensor, as the op has them.
    both = torch.randn(num_tokens, num_experts * (rho + 1), device=device)
    both[:, -num_experts:] = torch.randint(-40, 41, (num_tokens, num_experts), device=device) / 16
    projection, logits = both.to(dtype)[:, : num_experts * rho], both[:, -num_experts:]
    bias = torch.randint(0, 4, (num_experts,), device=device) / 8 + 0.125
    return logits, projection, bias, spec


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("num_tokens", [0, 1, 35])
def test_the_gate_and_its_derivative(name, num_tokens, dtype, device):
    logits, projection, bias, spec = tensors(name, num_tokens, dtype, device)
    u, indices, chosen = triton_kernels.forward(logits, projection, bias, spec)
    their_u, their_indices, their_chosen = gate.forward(logits, projection, bias, spec)
    assert torch.equal(indices, their_indices)
    close(u, their_u, TOLERANCE[dtype])
    for ours, theirs in zip(chosen, their_chosen, strict=True):
        close(ours, theirs, TOLERANCE[dtype])
    r = projection.shape[1]
    B, dy = torch.randn(11, r, device=device).to(dtype), torch.randn(num_tokens, 11, device=device).to(dtype)
    ours = triton_kernels.backward(dy, B, chosen, bias, spec, len(bias))
    for our, their in zip(ours, gate.backward(dy, B, their_chosen, bias, spec, len(bias)), strict=True):
        close(our, their, TOLERANCE[dtype])


@pytest.mark.parametrize("device", DEVICES)
def test_ties_signs_and_nans(device):
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, -torch.nan], device=device)
    logits = values[torch.randint(0, 8, (100, 20), device=device)]
    bias, projection = torch.zeros(20, device=device), torch.ones(100, 20, device=device)
    spec = GateSpec(6, "softmax", False, 1.0)
    _, indices, _ = triton_kernels.forward(logits, projection, bias, spec)
    u, their_indices, _ = gate.forward(logits, projection, bias, spec)
    assert torch.equal(indices, their_indices)
    lost = logits.isnan().any(1)
    assert lost.any()
    assert u[lost].isnan().any(1).all()


@pytest.mark.parametrize("device", DEVICES)
def test_an_unused_rank_that_is_not_finite_does_not_count(device):
    logits, projection, bias, spec = tensors("token", 9, torch.float32, device)
    _, indices, chosen = triton_kernels.forward(logits, projection, bias, spec)
    B, dy = torch.randn(11, 12, device=device), torch.randn(9, 11, device=device)
    B[:, 4] = torch.inf
    both, _ = triton_kernels.backward(dy, B, chosen, bias, spec, 12)
    unused = (indices != 4).all(1)
    assert unused.any()
    assert both[unused].isfinite().all()
    y = torch.zeros(9, 11, device=device)
    triton_kernels.decode(y, logits, projection, bias, B, spec)
    assert y[unused].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("num_tokens", "d_out", "num_ranks"), [(1, 1, 1), (70, 130, 24), (600, 40, 64)])
def test_both_products_in_one_pass(num_tokens, d_out, num_ranks, dtype, device):
    dy, B, u = (
        torch.randn(shape, device=device).to(dtype)
        for shape in ((num_tokens, d_out), (d_out, num_ranks), (num_tokens, num_ranks))
    )
    du, dB = triton_kernels.products(dy, B, u)
    close(du, (dy.float() @ B.float()).to(dtype), TOLERANCE[dtype])
    close(dB, (u.float().t() @ dy.float()).to(dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("y_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoding_in_one_launch(name, y_dtype, dtype, device):
    logits, projection, bias, spec = tensors(name, 5, dtype, device)
    bias.fill_(0.125)  # The same for all: the kernel's own sigmoid may differ from PyTorch's in the last bit.
    B, y = torch.randn(45, projection.shape[1], device=device).to(dtype), torch.randn(5, 45, device=device).to(y_dtype)
    u, indices, _ = gate.forward(logits, projection, bias, spec)
    expected = (y.float() + u.float() @ B.float().t()).to(y_dtype)
    assert torch.equal(triton_kernels.decode(y, logits, projection, bias, B, spec), indices)
    close(y, expected, max(TOLERANCE[y_dtype], TOLERANCE[dtype]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["token", "blocks", "softmax"])
def test_the_whole_op(name, dtype, device, monkeypatch):
    num_experts, rho, spec = SPECS[name]
    linear = nn.Linear(10, 9).to(device, dtype).requires_grad_(False)
    r = num_experts * rho
    shapes = ((33, 10), (r, 10), (9, r), (num_experts, 10))
    x, A, B, weight = (torch.randint(-4, 5, shape, device=device).div(4).to(dtype).requires_grad_() for shape in shapes)
    bias, dy = torch.zeros(num_experts, device=device), torch.randn(33, 9, device=device).to(dtype)
    runs = []
    for kernels in (triton_kernels, gate):
        for one_pass in (False, True):
            monkeypatch.setattr(triton_kernels, "ONE_PASS", one_pass)
            base = Base(linear, False, True, dtype)
            y, indices = fused.token_gated(x, None, linear.weight, A, B, weight, bias, spec, base, kernels)
            runs.append([y, indices, *torch.autograd.grad(y, (x, A, B, weight), dy)])
    for run in runs[:-1]:
        for ours, theirs in zip(run, runs[-1], strict=True):
            close(ours, theirs, TOLERANCE[dtype])
    with torch.no_grad():
        y, _ = fused.token_gated(x[:3], None, linear.weight, A, B, weight, bias, spec, base, triton_kernels)
        close(y, runs[-1][0][:3], TOLERANCE[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(0, 4, 2), (7, 1, 1), (700, 37, 5), (90, 256, 8)])
def test_the_load_of_tokens_that_count(num_tokens, num_experts, top_k, masked, dtype, device):
    indices = torch.rand(num_tokens, num_experts, device=device).argsort(-1)[:, :top_k]
    y = torch.randn(num_tokens, 6, device=device).to(dtype)[:, ::2]
    y[1::3, 0] = torch.nan
    mask = torch.rand(num_tokens, device=device) < 0.5 if masked else None
    counts = ~y[:, 0].isnan() & (mask if masked else True)
    expected = expert_load(indices, num_experts, counts)
    assert torch.equal(triton_kernels.count_load(y, indices, num_experts, mask), expected)
    assert num_tokens < 30 or 0 < expected.sum() < indices.numel()


def test_what_is_supported():
    assert triton_kernels.supports(torch.bfloat16, 256)
    assert not triton_kernels.supports(torch.bfloat16, 257)
    assert not triton_kernels.supports(torch.float64, 8)
    assert Chosen._fields == ("indices", "values", "projections")
