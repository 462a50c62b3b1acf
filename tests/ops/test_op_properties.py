"""The fused op equals the reference for whatever shape, gate, dtype and layout hypothesis thinks of."""

from __future__ import annotations

from unittest.mock import patch

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ops.cases import assert_close, base_of, by_reference, token_gate, trained
from rank_experts.ops import rank_experts
from rank_experts.ops.backends import cpu
from rank_experts.ops.backends.gate import select
from rank_experts.routing import expert_load, select_experts

DTYPES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}


@st.composite
def layers(draw):
    num_experts = draw(st.integers(1, 20))
    return dict(
        num_tokens=draw(st.one_of(st.integers(0, 3), st.integers(30, 70))),
        d_in=draw(st.integers(1, 24)),
        d_out=draw(st.integers(1, 24)),
        num_experts=num_experts,
        expert_rank=draw(st.integers(1, 4)),
        top_k=draw(st.integers(1, num_experts)),
        score_function=draw(st.sampled_from(["sigmoid", "softmax"])),
        biased_gates=draw(st.booleans()),
        dtype=draw(st.sampled_from(list(DTYPES))),
        strided=draw(st.booleans()),
        dropout=draw(st.booleans()),
        base_trains=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )


@settings(max_examples=120, deadline=None, derandomize=True)
@given(layers())
def test_token_gate(case):
    torch.manual_seed(case["seed"])
    d_in, d_out, dtype = case["d_in"], case["d_out"], case["dtype"]
    constants = {name: case[name] for name in ("num_experts", "top_k", "expert_rank", "score_function", "biased_gates")}
    gate = token_gate(d_in, **constants, dtype=dtype)
    r = gate.num_experts * gate.expert_rank
    with torch.no_grad():  # Whole numbers: the same logits, with many ties, however they are added up.
        gate.weight.copy_(torch.randint(-2, 3, gate.weight.shape) / 4)
        gate.balance_bias.copy_(torch.randint(0, 3, gate.balance_bias.shape) / 8 + 0.25)
    base = nn.Linear(d_in, d_out).to(dtype).requires_grad_(case["base_trains"])
    A = torch.randn(r, d_in).to(dtype).requires_grad_()
    B = torch.randn(d_out, r).to(dtype).requires_grad_()
    x = (torch.randint(-4, 5, (case["num_tokens"], d_in * 2)) / 2).to(dtype)
    x = (x[:, ::2] if case["strided"] else x[:, :d_in]).requires_grad_()
    keep = torch.randint(0, 2, x.shape).to(dtype)
    dropped = keep.mul(x) if case["dropout"] else None
    dy = torch.randn(len(x), d_out).to(dtype)
    wanted = [*trained(x, A, B, gate), *trained(*base.parameters())]
    ours, theirs = (
        function(base_of(base), x, A, B, gate, scale=0.3, dropped=dropped) for function in (rank_experts, by_reference)
    )
    assert torch.equal(ours.indices, theirs.indices)
    found = ([adapted.y, *torch.autograd.grad(adapted.y, wanted, dy, retain_graph=True)] for adapted in (ours, theirs))
    assert_close(*found, DTYPES[dtype])


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.data())
def test_given_gates(data):
    examples, length = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 9))
    d_in, d_out, r = (data.draw(st.integers(1, 16)) for _ in range(3))
    dtype = data.draw(st.sampled_from(list(DTYPES)))
    rows = data.draw(st.sampled_from([None, 1, examples, examples * length]))
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    base = nn.Linear(d_in, d_out).to(dtype).requires_grad_(False)
    A, B = torch.randn(r, d_in).to(dtype).requires_grad_(), torch.randn(d_out, r).to(dtype).requires_grad_()
    x = torch.randn(examples, length, d_in).to(dtype).requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    used = data.draw(st.integers(1, r))
    gates = torch.rand(max(rows, 1), used, dtype=wide, requires_grad=True) if rows is not None else None
    dy = torch.randn(examples, length, d_out).to(dtype)
    # The kernel for few ranks has a test of its own.
    with patch.object(cpu, "serves", lambda op: False):
        ours, theirs = (
            function(base_of(base), x, A, B, gates, scale=0.3).y for function in (rank_experts, by_reference)
        )
        found = ([y, *torch.autograd.grad(y, trained(x, A, B, gates), dy)] for y in (ours, theirs))
        assert_close(*found, DTYPES[dtype])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_select_and_count(data):
    num_tokens, num_experts = data.draw(st.integers(0, 90)), data.draw(st.integers(1, 256))
    top_k = data.draw(st.integers(1, num_experts))
    torch.manual_seed(data.draw(st.integers(0, 2**20)))
    levels = data.draw(st.sampled_from([2, 5, 1000, 2**24]))
    keys = (torch.randint(-levels, levels + 1, (num_tokens, num_experts)) / levels).float()
    chosen = select(keys, top_k)
    assert torch.equal(chosen, select_experts(keys, top_k))
    mask = torch.rand(num_tokens) < 0.5
    load = torch.bincount(chosen[mask].flatten(), minlength=num_experts).float()
    assert torch.equal(expert_load(chosen, num_experts, mask), load)
