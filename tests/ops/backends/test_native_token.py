"""The native CPU kernel against the reference: outputs, every gradient, the choice, and where it steps aside."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from helpers import nan_in_new_buffers
from ops.cases import Watched, assert_close, base_of, by_reference, token_gate, trained
from rank_experts.ops import Base, load_of_output, rank_experts
from rank_experts.ops.backends import cpu
from rank_experts.ops.backends.cpu import token
from rank_experts.ops.backends.cpu.build import find_compiler, library
from rank_experts.ops.operands import Operands
from rank_experts.routing import select_experts

if find_compiler() is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

GATES = {
    "token": dict(num_experts=64, top_k=8),
    "all": dict(num_experts=5, top_k=5),
    "one": dict(num_experts=7, top_k=1),
    "softmax": dict(num_experts=12, top_k=3, score_function="softmax"),
    "biased": dict(num_experts=12, top_k=3, biased_gates=True),
    "below zero": dict(num_experts=12, top_k=5, biased_gates=True),
    "biased softmax": dict(num_experts=12, top_k=3, score_function="softmax", biased_gates=True),
    "blocks": dict(num_experts=4, top_k=2, expert_rank=3),
    "biased blocks": dict(num_experts=5, top_k=2, expert_rank=7, biased_gates=True),
    "many": dict(num_experts=256, top_k=4),
    "more than a byte": dict(num_experts=300, top_k=4),
}
# Of base layer and input, and of the adapter.
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.bfloat16, torch.float32),
    "wide": (torch.float32, torch.bfloat16),
}
NARROW = {"float32": 2e-5, "mixed": 1e-2, "bfloat16": 4e-2, "wide": 4e-2}


@pytest.fixture(autouse=True)
def _native_wherever_it_can(monkeypatch):
    for module in (cpu, token):
        monkeypatch.setattr(module, "pays", lambda top_k, num_experts: True)
    assert library() is not None


@pytest.fixture
def _nan_in_new_buffers(monkeypatch):
    nan_in_new_buffers(monkeypatch, token)


def make(gate, dtypes="float32", shape=(37, 150), d_out=141, seed=0):
    """A layer's tensors, with whole numbers for x and W_g, so that every path computes the same logits."""
    torch.manual_seed(seed)
    dtype, adapter = DTYPES[dtypes]
    lowered = 1.0 if gate == "below zero" else 0.0
    gate = token_gate(shape[-1], **(GATES[gate] if isinstance(gate, str) else gate), dtype=adapter)
    r = gate.num_experts * gate.expert_rank
    with torch.no_grad():
        gate.weight.copy_(torch.randint(-4, 5, gate.weight.shape) / 32)
        gate.balance_bias.copy_(torch.randint(0, 5, gate.balance_bias.shape) / 64 + 0.25 - lowered)
    base = nn.Linear(shape[-1], d_out).to(dtype).requires_grad_(False)
    A, B = torch.randn(r, shape[-1]).to(adapter), torch.randn(d_out, r).to(adapter)
    x = (torch.randint(-8, 9, shape) / 4).to(dtype)
    return base, x.requires_grad_(), A.requires_grad_(), B.requires_grad_(), gate


def both(base, x, A, B, gate, dropped=None, dy=None):
    """(output, indices, gradients …) by the kernel and by the reference."""
    wanted, results = trained(x, A, B, gate, dropped), []
    for function in (rank_experts, by_reference):
        adapted = function(base_of(base), x, A, B, gate, scale=0.7, dropped=dropped)
        torch.manual_seed(1)
        seen = torch.randn(adapted.y.shape) if dy is None else dy
        grads = torch.autograd.grad(adapted.y, wanted, seen.to(adapted.y.dtype), retain_graph=True)
        results.append([adapted.y, adapted.indices, *grads])
    node = results[0][0].grad_fn
    assert type(node).__name__ == "UpdateBackward"
    assert node.backend is cpu
    return results


def decoded(base, x, A, B, gate, scale=1.0):
    """The kernel for a few tokens, asked itself."""
    op = Operands(x, None, A, B, gate, scale, A.dtype)
    return cpu.decode(base_of(base), op) if cpu.serves(op) else None


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.usefixtures("_nan_in_new_buffers")
def test_equals_the_reference(gate, dtypes):
    assert_close(*both(*make(gate, dtypes)), NARROW[dtypes])


@pytest.mark.parametrize("gate", ["token", "blocks"])
@pytest.mark.parametrize("shape", [(0, 10), (1, 10), (3, 5, 10), (2, 50, 128), (1, 1, 1), (40, 129)], ids=str)
@pytest.mark.parametrize("d_out", [1, 16, 257])
@pytest.mark.usefixtures("_nan_in_new_buffers")
def test_shapes(gate, shape, d_out):
    assert_close(*both(*make(gate, shape=shape, d_out=d_out)), 2e-5)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.usefixtures("_nan_in_new_buffers")
def test_dropout_reaches_a_alone(dtypes):
    base, x, A, B, gate = make("blocks", dtypes, shape=(4, 9, 150))
    dropped = (x.detach() * torch.randint(0, 2, x.shape)).to(A.dtype).requires_grad_()
    assert_close(*both(base, x, A, B, gate, dropped), NARROW[dtypes])


@pytest.mark.parametrize("frozen", ["x", "A", "B", "weight", "all but B", "all but x"])
@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.usefixtures("_nan_in_new_buffers")
def test_only_the_gradients_that_are_needed(frozen, drop):
    base, x, A, B, gate = make("token")
    tensors = dict(x=x, A=A, B=B, weight=gate.weight)
    kept = [frozen.removeprefix("all but ")] if "but" in frozen else [name for name in tensors if name != frozen]
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in kept)
    dropped = x.detach().mul(2).requires_grad_(x.requires_grad) if drop else None
    assert_close(*both(base, x, A, B, gate, dropped), 2e-5)


@pytest.mark.parametrize("num_tokens", [16, 37])
def test_bfloat16_is_rounded_to_nearest(num_tokens):
    base, x, A, B, gate = make("token", "mixed", (num_tokens, 150))
    with torch.no_grad():
        ours = rank_experts(base_of(base), x, A, B, gate).y
        theirs = by_reference(base_of(base), x, A, B, gate, scale=1.0).y
    assert (ours == theirs).float().mean() > 0.95


def test_strided_tensors():
    base, _, A, _, gate = make("token", shape=(1, 40), d_out=30)
    x = (torch.randint(-8, 9, (7, 6, 80)) / 4)[..., ::2].transpose(0, 1).requires_grad_()
    A = torch.randn(40, len(A)).t().requires_grad_()
    B = torch.randn(len(A), 30).t().requires_grad_()
    assert_close(*both(base, x, A, B, gate, dy=torch.randn(30, 6, 7).permute(1, 2, 0)), 2e-5)


def test_an_output_that_must_not_be_overwritten():
    base, x, A, B, gate = make("token")
    watched = Watched(base)
    ours = rank_experts(Base(watched), x, A, B, gate)
    theirs = by_reference(base_of(base), x, A, B, gate)
    assert ours.y.grad_fn.backend is cpu
    found = ([adapted.y, *torch.autograd.grad(adapted.y.sum(), trained(x, A, B, gate))] for adapted in (ours, theirs))
    assert_close(*found, 2e-5)
    with torch.no_grad():
        rank_experts(Base(watched), x[:3], A, B, gate)
    watched.assert_unchanged()


def test_an_output_that_was_wrongly_called_fresh_is_noticed():
    base, x, A, B, gate = make("token")
    # exp needs its own output for its derivative.
    y = rank_experts(Base(lambda x: base(x).exp(), fresh=True), x, A, B, gate).y
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("apart", [False, True])
def test_the_output_may_be_changed_in_place(apart):
    base, x, A, B, gate = make("token", shape=(4, 9, 150))
    base.bias.requires_grad_(apart)  # A base layer that is trained is applied apart.
    found = []
    for adapted in (
        rank_experts(base_of(base), x, A, B, gate),
        by_reference(base_of(base), x, A, B, gate, scale=1.0),
    ):
        adapted.y.mul_(2).sum().backward(inputs=[x])
        found.append([adapted.y, adapted.indices, x.grad])
        x.grad = None
    assert_close(*found, 2e-5)


def test_a_second_derivative():
    base, x, A, B, gate = make("token", shape=(9, 20))
    found = []
    for adapted in (
        rank_experts(base_of(base), x, A, B, gate, scale=0.7),
        by_reference(base_of(base), x, A, B, gate, scale=0.7),
    ):
        (dx,) = torch.autograd.grad(adapted.y.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), (x, A, B, gate.weight)))
    for our, their in zip(*found, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-4 * their.abs().max().item())


@pytest.mark.parametrize("num_experts", [2, 9, 64, 256, 300])
def test_ties_and_signs_are_bit_for_bit_the_routers_choice(num_experts, monkeypatch):
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45])
    keys = special[torch.randint(0, len(special), (200, num_experts))]
    negative_nan = torch.tensor([-4194304], dtype=torch.int32).view(torch.float32)
    keys = torch.where(keys.isnan() & (torch.rand(keys.shape) < 0.5), negative_nan, keys)
    monkeypatch.setattr(token, "selection_keys", lambda *args: keys)
    for top_k in {1, num_experts // 2, num_experts}:
        base, *tensors = make(dict(num_experts=num_experts, top_k=top_k), shape=(200, 8), d_out=8)
        assert torch.equal(rank_experts(base_of(base), *tensors).indices, select_experts(keys, top_k))


@pytest.mark.parametrize("num_tokens", [3, 100])
def test_nans(num_tokens):
    base, x, A, B, gate = make(dict(num_experts=20, top_k=6, score_function="softmax"), shape=(num_tokens, 20))
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, -torch.nan])
    with torch.no_grad():
        gate.weight.copy_(torch.eye(20))
        gate.balance_bias.zero_()
        x.copy_(torch.randint(-1, 2, x.shape))
        x[1::2, 7] = special[torch.randint(6, 8, x[1::2, 7].shape)]
    ours = rank_experts(base_of(base), x, A, B, gate)
    theirs = by_reference(base_of(base), x, A, B, gate, scale=1.0)
    assert torch.equal(ours.indices, theirs.indices)
    assert torch.equal(ours.y.isnan(), theirs.y.isnan())
    assert ours.y[1::2].isnan().all()
    assert ours.y[::2].isfinite().all()


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [-300.0, 300.0])
def test_a_saturated_router_gives_finite_gates(value, dtypes):
    base, x, A, B, gate = make("token", dtypes)
    with torch.no_grad():
        gate.weight.fill_(value)
        gate.balance_bias.zero_()
        x.copy_(x.abs() + 1)
    ours, theirs = both(base, x, A, B, gate)
    assert all(result.isfinite().all() for result in ours)
    assert_close(ours[:2], theirs[:2], 5 * NARROW[dtypes])


@pytest.mark.parametrize("logit", [-80.0, -9.0, -0.625, -0.375, 0.0, 0.375, 3.0, 12.0])
def test_the_routers_gradient_is_exact_for_sure_and_unsure_scores(logit):
    base, x, A, B, gate = make("token")
    with torch.no_grad():
        x[:, 0] = 1.0
        gate.weight[:, 1:] /= 256
        gate.weight[:, 0] = logit
        gate.balance_bias.fill_(0.0)
    ours, theirs = both(base, x, A, B, gate)
    assert torch.equal(ours[1], theirs[1])
    torch.testing.assert_close(ours[-1], theirs[-1], rtol=1e-3, atol=1e-4 * theirs[-1].abs().max().item())


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("num_tokens", [1, 3, 6, 16])
def test_a_few_tokens_without_gradients(gate, num_tokens, dtypes):
    base, x, A, B, gate = make(gate, dtypes, (num_tokens, 67), 45)
    with torch.no_grad():
        gate.balance_bias.fill_(0.25)  # The same for all: the kernel's own sigmoid may differ in the last bit.
        assert decoded(base, x, A, B, gate) is not None
        ours = rank_experts(base_of(base), x, A, B, gate, scale=0.7)
        theirs = by_reference(base_of(base), x, A, B, gate, scale=0.7)
    assert_close(ours[:2], theirs[:2], NARROW[dtypes])


@pytest.mark.parametrize("strided", ["x", "A", "B", "weight"])
def test_a_few_strided_tokens_without_gradients(strided):
    base, x, A, B, gate = make("token", shape=(6, 40), d_out=40)
    tensors = {name: tensor.detach() for name, tensor in dict(x=x, A=A, B=B, weight=gate.weight).items()}
    tensors[strided] = tensors[strided].t().contiguous().t()
    tensors["gate"] = gate._replace(weight=tensors.pop("weight"))
    with torch.no_grad():
        assert decoded(base, **tensors) is None
        assert_close(*(f(base_of(base), **tensors)[:2] for f in (rank_experts, by_reference)), 2e-5)


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("how", ["weight", "fresh"])
def test_a_few_tokens_of_any_plain_base_layer(conv, bias, how):
    _, x, A, B, gate = make("token", shape=(2, 3, 40))
    base = Conv1D(141, 40) if conv else nn.Linear(40, 141, bias=bias)
    base = base_of(base.requires_grad_(False)) if how == "weight" else Base(base.forward, fresh=True)
    with torch.no_grad():
        assert cpu.decode(base, Operands(x, None, A, B, gate, 1.0, A.dtype)) is not None
        assert_close(*(f(base, x, A, B, gate)[:2] for f in (rank_experts, by_reference)), 2e-5)


def test_a_few_tokens_of_a_subclass_are_left_to_it():
    class Own(torch.Tensor):
        pass

    base, x, A, B, gate = make("token", shape=(6, 40))
    with torch.no_grad():
        plain = rank_experts(base_of(base), x, A, B, gate).y
        y = rank_experts(base_of(base), x.detach().as_subclass(Own), A, B, gate).y
        assert type(y) is Own
        torch.testing.assert_close(y.as_subclass(torch.Tensor), plain, rtol=2e-5, atol=2e-5)


CHANGES = {
    "A in place": lambda base, A, B, gate: A.mul_(2),
    "A's data": lambda base, A, B, gate: setattr(A, "data", torch.randn(64, 40)),
    "the gate": lambda base, A, B, gate: gate.weight.neg_(),
    "the bias": lambda base, A, B, gate: gate.balance_bias.copy_(torch.arange(64.0)),
    "the base layer": lambda base, A, B, gate: setattr(base, "weight", nn.Parameter(torch.randn(141, 40))),
    "the base layer's bias": lambda base, A, B, gate: base.bias.add_(1),
    "bfloat16": lambda base, A, B, gate: setattr(B, "data", B.bfloat16()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_few_tokens_see_every_change(change, monkeypatch):
    base, x, A, B, gate = make("token", shape=(2, 3, 40))
    with torch.no_grad():
        before = rank_experts(base_of(base), x, A, B, gate).y
        CHANGES[change](base, A, B, gate)
        assert decoded(base, x, A, B, gate) is not None
        ours = rank_experts(base_of(base), x, A, B, gate).y
        monkeypatch.setattr(cpu, "serves", lambda op: False)
        theirs = rank_experts(base_of(base), x, A, B, gate).y
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-4)
    if change != "bfloat16":
        assert not torch.allclose(ours, before, atol=1e-3)


def test_a_few_tokens_see_dropout_and_who_wants_the_routing():
    base, x, A, B, gate = make("token", shape=(2, 3, 40))
    dropped = x.detach() * torch.randint(0, 2, x.shape)
    with torch.no_grad():
        ours, theirs = (f(base_of(base), x, A, B, gate, dropped=dropped).y for f in (rank_experts, by_reference))
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-4)
        assert rank_experts(base_of(base), x, A, B, gate, want_routing=True).routing is not None


def test_a_few_tokens_see_autocast_and_transforms():
    base, x, A, B, gate = make("token", shape=(3, 40))
    for tensor in trained(x, A, B, gate):
        tensor.requires_grad_(False)

    def function(x):
        return rank_experts(base_of(base), x, A, B, gate, scale=0.1).y

    with torch.no_grad():
        plain = function(x)
        torch.testing.assert_close(torch.func.vmap(function)(x[:, None])[:, 0], plain)
        with torch.autocast("cpu", torch.bfloat16):
            assert function(x).dtype == torch.bfloat16
        traced = torch.jit.trace(function, x)
        torch.testing.assert_close(traced(x[:2]), plain[:2])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_load_of_tokens_that_count(dtype, masked):
    y, indices = torch.randn(6, 10, 7, dtype=dtype), torch.stack([torch.randperm(9)[:4] for _ in range(60)])
    y[1, 3:6] = torch.nan
    mask = torch.rand(60) < 0.5 if masked else None
    counts = ~y.flatten(0, 1)[:, 0].isnan() & (mask if masked else torch.tensor(True))
    expected = torch.bincount(indices[counts].flatten(), minlength=9).float()
    assert (cpu.count(y, indices, 9, mask) is None) == (dtype == torch.float64)
    for strided in (y, y.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(load_of_output(strided, indices, 9, mask), expected)
    assert not load_of_output(y[:0], indices[:0], 9).any()


@pytest.mark.parametrize("num_tokens", [5, 300])
def test_two_runs_agree_in_every_bit_and_threads_in_most(num_tokens):
    base, *tensors = make("token", shape=(num_tokens, 700), d_out=300)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 1, 3, 3):
            torch.set_num_threads(threads)
            runs.append(both(base, *tensors)[0])
            with torch.no_grad():
                runs[-1].append(rank_experts(base_of(base), *tensors).y)
    finally:
        torch.set_num_threads(before)
    for first, second in ((runs[0], runs[1]), (runs[2], runs[3])):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert_close(runs[0], runs[2], 2e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_dtypes_are_left_to_pytorch(dtype):
    base, x, A, B, gate = make("token")
    x, A, B, weight = (t.detach().to(dtype).requires_grad_() for t in (x, A, B, gate.weight))
    y = rank_experts(base_of(base.to(dtype)), x, A, B, gate._replace(weight=weight)).y
    assert y.grad_fn.backend is not cpu


def test_many_active_experts_are_left_to_pytorch(monkeypatch):
    monkeypatch.undo()
    base, *tensors = make(dict(num_experts=8, top_k=4))
    assert rank_experts(base_of(base), *tensors).y.grad_fn.backend is not cpu
    base, *tensors = make(dict(num_experts=8, top_k=2))
    assert rank_experts(base_of(base), *tensors).y.grad_fn.backend is cpu


@st.composite
def layers(draw):
    num_experts = draw(st.integers(1, 40))
    return dict(
        num_tokens=draw(st.one_of(st.integers(0, 3), st.integers(30, 70))),
        d_in=draw(st.integers(1, 300)),
        d_out=draw(st.integers(1, 300)),
        gate=dict(
            num_experts=num_experts,
            expert_rank=draw(st.integers(1, 4)),
            top_k=draw(st.integers(1, num_experts)),
            score_function=draw(st.sampled_from(["sigmoid", "softmax"])),
            biased_gates=draw(st.booleans()),
        ),
        dtypes=draw(st.sampled_from(list(DTYPES))),
        drop=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )


@settings(max_examples=120, deadline=None, derandomize=True)
@given(layers())
def test_whatever_hypothesis_thinks_of(case):
    shape = (case["num_tokens"], case["d_in"])
    base, x, A, B, gate = make(case["gate"], case["dtypes"], shape, case["d_out"], case["seed"])
    dropped = (x.detach() * torch.randint(0, 2, x.shape)).to(A.dtype).requires_grad_() if case["drop"] else None
    with patch.object(cpu, "pays", lambda *_: True):
        assert_close(*both(base, x, A, B, gate, dropped), 5 * NARROW[case["dtypes"]])


@pytest.mark.parametrize("shape", [(1, 32, 1), (37, 64, 5), (96, 160, 64), (33, 96, 300), (20, 33, 7)], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_the_routers_product_of_bfloat16(shape, threads):
    num_tokens, d, num_experts = shape
    x, weight = torch.randn(num_tokens, d).bfloat16(), torch.randn(num_experts, d).bfloat16()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        ours = token.router_logits(x, weight)
        product = x @ weight.t()  # PyTorch's own use of the processor's matrix unit, in between and after
        assert torch.equal(ours, token.router_logits(x, weight))
        assert torch.equal(product, x @ weight.t())
    finally:
        torch.set_num_threads(before)
    exact = x.double() @ weight.double().t()
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())
