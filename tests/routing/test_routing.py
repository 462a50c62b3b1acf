"""The gates and their losses against the oracle, and the numerics that bite."""

from __future__ import annotations

import pytest
import torch

import oracle
from rank_experts.routing import (
    TaskGate,
    TokenGate,
    balance_loss,
    contrastive_loss,
    expert_load,
    pool_examples,
    select_experts,
    token_routing,
)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("num_experts", "top_k", "expert_rank"), [(7, 3, 1), (4, 2, 3), (5, 5, 1), (3, 1, 2)])
def test_token_gates_and_gradients_equal_the_oracle(score, biased, num_experts, top_k, expert_rank):
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(num_experts, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.rand(num_experts)
    gates = TokenGate(weight, bias, top_k, expert_rank, score, biased).route(x).gates
    expected = oracle.token_gate(x, weight, bias.double(), top_k, expert_rank, score, biased)
    torch.testing.assert_close(gates, expected)
    probe = torch.randn_like(gates)
    got = torch.autograd.grad((gates * probe).sum(), (x, weight))
    want = torch.autograd.grad((expected * probe).sum(), (x, weight))
    torch.testing.assert_close(got, want)


def test_gates_of_a_token_add_up_to_top_k_over_the_chosen_alone():
    routing = TokenGate(torch.randn(8, 6), torch.zeros(8), top_k=3).route(torch.randn(10, 6))
    torch.testing.assert_close(routing.gates.sum(-1), torch.full((10,), 3.0))
    assert ((routing.gates > 0).sum(-1) == 3).all()


def test_of_equal_keys_the_lower_index_wins():
    keys = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert select_experts(keys, 2).tolist() == [[1, 2], [0, 1]]


@pytest.mark.parametrize("bias", [-0.5, -1.0, -100.0, [-0.75, -0.25, -0.5], [0.5, -0.5, -1.0]])
def test_biased_gates_are_finite_and_keep_their_sign_whatever_the_bias(bias):
    """Where keys add up to 0 the published code divides by it, and below it every gate changes its sign."""
    logits = torch.tensor([[0.0, 0.0, 0.0], [2.0, -2.0, 0.5], [-9.0, 9.0, 0.0]], requires_grad=True)
    gates = token_routing(logits, torch.tensor(bias).expand(3), top_k=3, biased_gates=True).gates
    assert (gates >= 0).all()
    torch.testing.assert_close(gates.sum(-1), torch.full((3,), 3.0))
    (gates * torch.arange(9.0).view(3, 3)).sum().backward()
    assert logits.grad.isfinite().all()


def test_balance_bias_selects_but_does_not_enter_the_value():
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    bias = torch.tensor([5.0, 0.0, 0.0])
    gates = token_routing(logits, bias, top_k=2).gates
    chosen = logits[0, [0, 2]].sigmoid()
    torch.testing.assert_close(gates[0, [0, 2]], 2 * chosen / chosen.sum())
    leaking = token_routing(logits, bias, top_k=2, biased_gates=True).gates
    assert leaking[0, 0] > 1.4


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("level", [-100.0, -1e4, 100.0])
def test_extreme_logits_do_not_divide_zero_by_zero(score, level):
    gates = token_routing(torch.full((1, 6), level), torch.zeros(6), top_k=3, score_function=score).gates
    assert gates.tolist() == [[1, 1, 1, 0, 0, 0]]


def test_a_nan_logit_is_not_selected_silently():
    logits = torch.tensor([[0.0, float("nan"), 2.0], [0.0, 1.0, 2.0]])
    gates = token_routing(logits, torch.zeros(3), top_k=2).gates
    assert gates[0].isnan().any()
    assert gates[1].isfinite().all()


def test_selection_in_bfloat16_equals_that_of_its_float32_values():
    x = torch.randn(2000, 64, dtype=torch.bfloat16)
    gate = TokenGate(torch.randn(64, 64) / 8, torch.zeros(64), top_k=8)
    expected = gate.route(x.float()).indices
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gate.route(x).indices, expected)
    assert gate.route(x).gates.dtype == torch.float32


def test_expert_load_counts_unmasked_tokens():
    indices = torch.tensor([[0, 2], [2, 1], [3, 0]])
    assert expert_load(indices, 5).tolist() == [2, 1, 2, 1, 0]
    assert expert_load(indices, 5, torch.tensor([True, True, False])).tolist() == [1, 1, 2, 0, 0]
    assert expert_load(indices[:0], 5).tolist() == [0] * 5


def test_balance_loss_is_switch_transformers():
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([1, 1, 1, 1, 0, 0], dtype=torch.bool)
    routing = token_routing(logits, torch.zeros(4), top_k=1, score_function="softmax")
    kept = logits[:4].softmax(-1)
    share = torch.stack([(kept.argmax(-1) == i).double().mean() for i in range(4)])
    expected = 4 * (share * kept.mean(0)).sum()
    torch.testing.assert_close(balance_loss(routing, mask), expected)
    got, want = (
        torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (balance_loss(routing, mask), expected)
    )
    torch.testing.assert_close(got, want)
    assert balance_loss(routing, torch.zeros(6, dtype=torch.bool)) == 0


@pytest.mark.parametrize("scaling", ["linear", "quadratic", "none"])
def test_task_gates_and_gradients_equal_the_oracle(scaling):
    ids = torch.tensor([3, 0, 0, 2, 1])
    parameters = [torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((4, 6), (5, 6), (5,))]
    gates = TaskGate(*parameters, scaling).route(ids).gates
    expected = oracle.task_gate(*parameters, ids, scaling)
    torch.testing.assert_close(gates, expected)
    probe = torch.randn_like(gates)
    got = torch.autograd.grad((gates * probe).sum(), parameters)
    want = torch.autograd.grad((expected * probe).sum(), parameters)
    torch.testing.assert_close(got, want)
    assert all(grad.abs().sum() > 0 for grad in got)


def test_a_task_uses_its_first_ranks():
    gate = TaskGate(torch.randn(3, 6), torch.randn(5, 6), torch.randn(5), rank_scaling="none")
    routing = gate.route(torch.arange(3))
    for gate, rank in zip(routing.gates, routing.indices.tolist()):
        assert gate.tolist() == [1.0] * rank + [0.0] * (5 - rank)


def test_contrastive_loss_equals_the_oracle():
    h = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    e = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 2, 1, 1, 0])
    got, want = contrastive_loss(h, e, ids, 0.5), oracle.contrastive(h, e, ids, 0.5)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, (h, e)), torch.autograd.grad(want, (h, e)))


@pytest.mark.parametrize(
    ("pooling", "expected"), [("mean", [[2.0], [4.5]]), ("first", [[1.0], [4.0]]), ("last", [[3.0], [5.0]])]
)
def test_pooling_leaves_padding_out_wherever_it_lies(pooling, expected):
    x = torch.tensor([[[1.0], [3.0], [9.0]], [[9.0], [4.0], [5.0]]])
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert pool_examples(x, mask, pooling).tolist() == expected
    assert pool_examples(x, torch.zeros(2, 3), pooling).tolist() == [[0.0], [0.0]]
