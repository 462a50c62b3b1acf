"""One adapted layer: the formula, its gradients, and what it equals."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import oracle
from helpers import task_config
from models import batch, llama
from rank_experts import inject_rank_experts
from rank_experts.calls import Call, RoutingScope
from rank_experts.layers import AdapterSettings, RankExpertLinear, adapted_layers

D_IN, D_OUT, R = 5, 7, 6


def make_layer(kind, base=None, dropout=0.0, init_weights=False, d_in=D_IN, d_out=D_OUT, r=R, **options):
    layer = RankExpertLinear(base or nn.Linear(d_in, d_out), path="proj", scope=RoutingScope())
    if kind == "token":
        options = {"top_k": 2} | options
    elif kind == "task":
        options = {"num_tasks": 3} | options
        layer.scope.tasks["default"] = ("a", "b", "c")
    settings = AdapterSettings(r, 3.0, kind, dropout=dropout, **options)
    layer.add_adapter("default", settings, init_weights=init_weights)
    layer.set_adapter(["default"])
    layer.base_layer.requires_grad_(False)
    return layer.double()


def oracle_output(kind, layer, x, task_ids=None):
    rows = x.reshape(-1, layer.in_features)
    y = layer.base_layer(rows)
    A, B = layer.rank_experts["default"].A, layer.rank_experts["default"].B
    alpha = layer.rank_experts["default"].settings.alpha
    if kind == "token":
        router = layer.rank_experts["default"]
        gate = oracle.token_gate(
            rows,
            router.router_weight,
            router.balance_bias.double(),
            router.settings.top_k,
            router.settings.expert_rank,
            router.settings.score_function,
        )
        scale = alpha / router.settings.top_k
    elif kind == "task":
        router = layer.rank_experts["default"]
        gate = oracle.task_gate(
            router.task_embedding, router.gate_weight, router.gate_bias, task_ids, router.settings.rank_scaling
        ).repeat_interleave(len(rows) // len(task_ids), 0)
        scale = alpha / len(A)
    else:
        gate, scale = torch.ones(len(rows), len(A), dtype=x.dtype), alpha / len(A)
    return oracle.update(y, rows, A, B, gate, scale).reshape(*x.shape[:-1], layer.out_features)


@pytest.mark.parametrize("shape", [(3, 4, D_IN), (5, D_IN), (1, 1, D_IN), (2, 3, 2, D_IN)])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("dense", {}),
        ("token", {}),
        ("token", {"expert_rank": 3, "top_k": 1}),
        ("token", {"score_function": "softmax", "top_k": 4}),
        ("task", {}),
        ("task", {"rank_scaling": "quadratic", "task_embedding_dim": 4}),
    ],
)
def test_forward_and_every_gradient_equal_the_oracle(kind, options, shape):
    layer = make_layer(kind, **options)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(shape[0]) % 3 if kind == "task" else None
    with Call(layer.scope, tasks=ids):
        got = layer(x)
    want = oracle_output(kind, layer, x, ids)
    torch.testing.assert_close(got, want)
    probe = torch.randn_like(got)
    inputs = [x] + [p for n, p in layer.named_parameters() if p.requires_grad and not n.endswith("projection")]
    grads = (torch.autograd.grad((out * probe).sum(), inputs) for out in (got, want))
    for first, second in zip(*grads):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("kind", ["dense", "token", "task"])
def test_gradcheck(kind):
    layer = make_layer(kind, d_in=3, d_out=4, r=4)
    x = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    trained = (layer.rank_experts["default"].A, layer.rank_experts["default"].B)

    def function(x, A, B):
        with Call(layer.scope, tasks=torch.tensor([0, 2]) if kind == "task" else None):
            return torch.func.functional_call(layer, {"rank_experts.default.A": A, "rank_experts.default.B": B}, (x,))

    assert torch.autograd.gradcheck(function, (x, *trained))


@pytest.mark.parametrize("kind", ["dense", "token", "task"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_changes_no_bit(kind, dtype):
    layer = make_layer(kind, init_weights=True).to(dtype)
    x = torch.randn(3, 4, D_IN, dtype=dtype)
    with Call(layer.scope, tasks="b" if kind == "task" else None):
        assert torch.equal(layer(x), layer.base_layer(x))


def test_a_block_router_is_a_mixture_of_separate_loras():
    # SMoRA, section 3: a rank-wise router with blocks of ranks equals a mixture of LoRA experts.
    layer = make_layer("token", expert_rank=2, top_k=2)
    x = torch.randn(9, D_IN, dtype=torch.float64)
    router = layer.rank_experts["default"]
    experts = []
    for e in range(3):
        down, up = nn.Linear(D_IN, 2, bias=False).double(), nn.Linear(2, D_OUT, bias=False).double()
        down.weight.data = layer.rank_experts["default"].A[2 * e : 2 * e + 2]
        up.weight.data = layer.rank_experts["default"].B[:, 2 * e : 2 * e + 2]
        experts.append(nn.Sequential(down, up))
    score = (x @ router.router_weight.T).sigmoid()
    best = score.topk(2).indices
    expected = layer.base_layer(x)
    for n in range(len(x)):
        total = score[n, best[n]].sum()
        for e in best[n].tolist():
            expected[n] += layer.rank_experts["default"].scale * (2 * score[n, e] / total) * experts[e](x[n])
    torch.testing.assert_close(layer(x), expected)


def test_one_block_of_all_ranks_is_lora():
    layer = make_layer("token", expert_rank=R, top_k=1)
    x = torch.randn(4, D_IN, dtype=torch.float64)
    A, B = layer.rank_experts["default"].A, layer.rank_experts["default"].B
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 3.0 * x @ A.T @ B.T)


@pytest.mark.parametrize("kind", ["dense", "token", "task"])
def test_conv1d(kind):
    layer = make_layer(kind, base=Conv1D(D_OUT, D_IN))
    x = torch.randn(2, 3, D_IN, dtype=torch.float64)
    ids = torch.tensor([1, 0]) if kind == "task" else None
    with Call(layer.scope, tasks=ids):
        torch.testing.assert_close(layer(x), oracle_output(kind, layer, x, ids))


def test_dropout_reaches_a_and_not_the_router():
    layer = make_layer("token", dropout=0.5)
    x = torch.randn(400, D_IN, dtype=torch.float64)
    layer.train()
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    chosen = []
    with Call(layer.scope, observers=(lambda path, adapter, x, routing, call: chosen.append(routing.indices),)):
        layer(x), layer(x)
    expected = layer.rank_experts["default"].token_gate().route(x).indices
    assert all(torch.equal(indices, expected) for indices in chosen)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_scales():
    assert make_layer("token", top_k=2).rank_experts["default"].scale == 3.0 / 2
    assert make_layer("task").rank_experts["default"].scale == 3.0 / R
    assert make_layer("dense").rank_experts["default"].scale == 3.0 / R


def test_output_keeps_the_base_dtype_while_the_adapter_stays_float32():
    layer = make_layer("token").float()
    layer.base_layer.to(torch.bfloat16)
    out = layer(torch.randn(2, 3, D_IN, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert layer.rank_experts["default"].A.grad.dtype == torch.float32


def test_no_tokens():
    layer = make_layer("token")
    layer.train()
    assert layer(torch.randn(0, 4, D_IN, dtype=torch.float64)).shape == (0, 4, D_OUT)


def test_the_order_of_gradients_does_not_depend_on_the_tasks():
    """DeepSpeed's ZeRO-2 adds up, over the processes, the gradients that come first, second, …"""

    def order(used):
        model = inject_rank_experts(llama(num_hidden_layers=1), task_config()).train()
        found = []
        for path, layer in adapted_layers(model):
            gate_bias = layer.rank_experts["default"].gate_bias
            with torch.no_grad():
                gate_bias.copy_(9 * torch.nn.functional.one_hot(torch.tensor(used(path) - 1), 4))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda _, name=name: found.append(name))
        model(**batch("llama"), task_ids=torch.tensor([0, 1, 2, 0])).loss.backward()
        return found

    expected = order(lambda path: 4)
    assert len(expected) == 7 * 5
    assert order(lambda path: 2) == expected
    assert order(lambda path: 2 if "k_proj" in path or "up_proj" in path else 4) == expected


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16().float()])
def test_balance_bias_stays_float32_and_exact_through_casts(cast):
    layer = make_layer("token").float()
    router = layer.rank_experts["default"]
    router.balance_bias += 0.5 + 1e-3
    before = router.balance_bias.clone()
    cast(layer)
    assert router.balance_bias.dtype == torch.float32
    assert torch.equal(router.balance_bias, before)


class Blocks(nn.Linear):
    """A block-diagonal layer, as DeepSeek V4 has one: it calls itself linear, and has other features."""

    def forward(self, x):
        return super().forward(x.unflatten(-1, (2, -1))).flatten(-2)


@pytest.mark.parametrize("kind", ["token", "task", "dense"])
def test_a_layer_with_other_features_than_it_says_is_refused_by_name(kind):
    """The kernels write as many as it says."""
    layer = make_layer(kind, base=Blocks(D_IN, D_OUT))
    x = torch.randn(3, 2 * D_IN, dtype=torch.float64)
    with (
        Call(layer.scope, tasks="b"),
        pytest.raises(ValueError, match=r"proj \(Blocks\) returned .*expected \(…, 5\) to \(…, 7\).*exclude_modules"),
    ):
        layer(x)
