"""The Triton kernels against the PyTorch ones, under Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from helpers import nan_in_new_buffers
from ops.cases import base_of
from rank_experts.ops import autograd, backends
from rank_experts.ops.backends import gate, pytorch, triton
from rank_experts.ops.backends.triton import kernels
from rank_experts.ops.operands import Base, Operands
from rank_experts.routing import TokenGate, expert_load

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
if torch.cuda.is_available():  # The interpreter and a GPU exclude each other.
    DEVICES = DEVICES[1:]

SCALE = 0.7
# Experts, ranks of each, and the rest of a token gate.
GATES = {
    "token": (12, 1, dict(top_k=3)),
    "odd": (37, 1, dict(top_k=8)),
    "one": (1, 1, dict(top_k=1)),
    "softmax": (12, 1, dict(top_k=3, score_function="softmax")),
    "biased": (12, 1, dict(top_k=3, biased_gates=True)),
    "below zero": (12, 1, dict(top_k=5, biased_gates=True)),
    "biased softmax": (12, 1, dict(top_k=5, score_function="softmax", biased_gates=True)),
    "blocks": (4, 3, dict(top_k=2)),
    "biased blocks": (5, 4, dict(top_k=3, biased_gates=True)),
    "many": (256, 1, dict(top_k=8)),
}


@pytest.fixture(autouse=True)
def _nan_in_new_buffers(monkeypatch):
    nan_in_new_buffers(monkeypatch, kernels)


def close(ours, theirs, tolerance):
    assert ours.dtype == theirs.dtype
    size = theirs.abs().max().item() if theirs.numel() else 0.0
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * size, equal_nan=True)


def tensors(name, num_tokens, dtype, device):
    num_experts, rho, constants = GATES[name]
    # Logits a sixteenth apart, with ties; beside the projections in one tensor, as the op has them.
    both = torch.randn(num_tokens, num_experts * (rho + 1), device=device)
    both[:, -num_experts:] = torch.randint(-40, 41, (num_tokens, num_experts), device=device) / 16
    projection, logits = both.to(dtype)[:, : num_experts * rho], both[:, -num_experts:]
    bias = torch.randint(0, 4, (num_experts,), device=device) / 8 + (-1.1 if name == "below zero" else 0.125)
    return logits, projection, TokenGate(torch.empty(num_experts, 0), bias, **constants)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("num_tokens", [0, 1, 35])
def test_the_gate_and_its_derivative(name, num_tokens, dtype, device):
    logits, projection, token = tensors(name, num_tokens, dtype, device)
    u, indices, kept = kernels.forward(logits, projection, token, SCALE)
    their_u, their_indices, their_kept = gate.forward(logits, projection, token, SCALE)
    assert torch.equal(indices, their_indices)
    close(u, their_u, TOLERANCE[dtype])
    for ours, theirs in zip(kept, their_kept, strict=True):
        close(ours, theirs, TOLERANCE[dtype])
    r = projection.shape[1]
    B, dy = torch.randn(11, r, device=device).to(dtype), torch.randn(num_tokens, 11, device=device).to(dtype)
    ours, theirs = kernels.backward(dy, B, kept, token, SCALE), gate.backward(dy, B, their_kept, token, SCALE)
    for our, their in zip(ours, theirs, strict=True):
        close(our, their, TOLERANCE[dtype])


@pytest.mark.parametrize("device", DEVICES)
def test_ties_signs_and_nans(device):
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, -torch.nan], device=device)
    logits = values[torch.randint(0, 8, (100, 20), device=device)]
    bias, projection = torch.zeros(20, device=device), torch.ones(100, 20, device=device)
    token = TokenGate(torch.empty(20, 0), bias, 6, score_function="softmax")
    u, indices, _ = kernels.forward(logits, projection, token, 1.0)
    _, their_indices, _ = gate.forward(logits, projection, token, 1.0)
    assert torch.equal(indices, their_indices)
    lost = logits.isnan().any(1)
    assert lost.any()
    assert u[lost].isnan().any(1).all()


@pytest.mark.parametrize("device", DEVICES)
def test_an_unused_rank_that_is_not_finite_does_not_count(device):
    logits, projection, token = tensors("token", 9, torch.float32, device)
    _, indices, kept = kernels.forward(logits, projection, token, SCALE)
    B, dy = torch.randn(11, 12, device=device), torch.randn(9, 11, device=device)
    B[:, 4] = torch.inf
    both, _ = kernels.backward(dy, B, kept, token, SCALE)
    unused = (indices != 4).all(1)
    assert unused.any()
    assert both[unused].isfinite().all()
    y = torch.zeros(9, 11, device=device)
    kernels.decode(y, logits, projection, B, token, SCALE)
    assert y[unused].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("y_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoding_in_one_launch(name, y_dtype, dtype, device):
    logits, projection, token = tensors(name, 5, dtype, device)
    token.balance_bias.fill_(
        0.125
    )  # The same for all: the kernel's own sigmoid may differ from PyTorch's in the last bit.
    B, y = torch.randn(45, projection.shape[1], device=device).to(dtype), torch.randn(5, 45, device=device).to(y_dtype)
    u, indices, _ = gate.forward(logits, projection, token, SCALE)
    expected = (y.float() + u.float() @ B.float().t()).to(y_dtype)
    assert torch.equal(kernels.decode(y, logits, projection, B, token, SCALE), indices)
    close(y, expected, max(TOLERANCE[y_dtype], TOLERANCE[dtype]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ["token", "blocks", "softmax"])
def test_the_whole_op(name, dtype, device):
    num_experts, rho, constants = GATES[name]
    base = base_of(nn.Linear(10, 9).to(device, dtype).requires_grad_(False))
    r = num_experts * rho
    shapes = ((33, 10), (r, 10), (9, r), (num_experts, 10))
    x, A, B, weight = (torch.randint(-4, 5, shape, device=device).div(4).to(dtype).requires_grad_() for shape in shapes)
    dy = torch.randn(33, 9, device=device).to(dtype)
    token = TokenGate(weight, torch.zeros(num_experts, device=device), **constants)
    op = Operands(x, None, A, B, token, SCALE, dtype)
    assert triton.serves(op)
    runs = []
    for backend in (triton, pytorch):
        y, indices = autograd.update(base, op, backend)
        runs.append([y, indices, *torch.autograd.grad(y, (x, A, B, weight), dy)])
    for ours, theirs in zip(*runs, strict=True):
        close(ours, theirs, TOLERANCE[dtype])
    with torch.no_grad():
        y, indices = triton.decode(base, op._replace(x=x[:3]))
        close(y, runs[1][0][:3], TOLERANCE[dtype])
        assert torch.equal(indices, runs[1][1][:3])
        assert triton.decode(base, op) is None


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
    assert torch.equal(triton.count(y, indices, num_experts, mask), expected)
    assert num_tokens < 30 or 0 < expected.sum() < indices.numel()


def test_what_is_served():
    x, A, B = torch.randn(5, 10), torch.randn(256, 10), torch.randn(9, 256)
    op = Operands(x, None, A, B, TokenGate(torch.randn(8, 10), torch.zeros(8), 2), 1.0, torch.bfloat16)
    assert triton.serves(op)
    assert not triton.serves(op._replace(A=torch.randn(257, 10)))
    assert not triton.serves(op._replace(dtype=torch.float64))
    assert not triton.serves(op._replace(x=x.double()))
    assert not triton.serves(op._replace(gate=None))
    y, indices = torch.randn(5, 9), torch.zeros(5, 2, dtype=torch.int64)
    assert triton.count(y, indices, 257, None) is None


@pytest.mark.gpu
def test_the_choice_on_a_gpu():
    x, A, B = torch.randn(5, 10, device="cuda"), torch.randn(8, 10, device="cuda"), torch.randn(9, 8, device="cuda")
    token = TokenGate(torch.randn(8, 10, device="cuda"), torch.zeros(8, device="cuda"), 2)
    op = Operands(x, None, A, B, token, 1.0, torch.float32)
    assert backends.choose(op) is triton
    assert backends.choose(op._replace(gate=None)) is pytorch
    with torch.no_grad():
        assert backends.decode(Base(lambda x: x[:, :9].clone(), fresh=True), op) is not None
