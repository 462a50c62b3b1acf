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
from rank_experts.context import Call, RoutingScope
from rank_experts.layer import AdapterSettings, RankExpertLinear
from rank_experts.model import adapted_layers
from rank_experts.routing import TaskRouter, TokenRouter

D_IN, D_OUT, R = 5, 7, 6


def make_layer(kind, base=None, dropout=0.0, init_weights=False, d_in=D_IN, d_out=D_OUT, r=R, **router_options):
    layer = RankExpertLinear(base or nn.Linear(d_in, d_out), path="proj", scope=RoutingScope())
    router = None
    if kind == "token":
        expert_rank = router_options.get("expert_rank", 1)
        router = TokenRouter(d_in, r // expert_rank, **({"top_k": 2} | router_options))
    elif kind == "task":
        router = TaskRouter(d_in, r, num_tasks=3, **router_options)
        layer.scope.tasks["default"] = ("a", "b", "c")
    layer.add_adapter("default", r, AdapterSettings(alpha=3.0), router, dropout=dropout, init_weights=init_weights)
    layer.set_adapter(["default"])
    layer.base_layer.requires_grad_(False)
    return layer.double()


def oracle_output(kind, layer, x, task_ids=None):
    rows = x.reshape(-1, layer.in_features)
    y = layer.base_layer(rows)
    A, B = layer.rank_expert_A["default"], layer.rank_expert_B["default"]
    alpha = layer.settings["default"].alpha
    if kind == "token":
        router = layer.rank_expert_router["default"]
        gate = oracle.token_gate(
            rows, router.weight, router.balance_bias.double(), router.top_k, router.expert_rank, router.score_function
        )
        scale = alpha / router.top_k
    elif kind == "task":
        router = layer.rank_expert_router["default"]
        gate = oracle.task_gate(
            router.task_embedding, router.gate_weight, router.gate_bias, task_ids, router.rank_scaling
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
        ("task", {"rank_scaling": "rank", "embedding_dim": 4}),
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
    trained = (layer.rank_expert_A["default"], layer.rank_expert_B["default"])

    def function(x, A, B):
        with Call(layer.scope, tasks=torch.tensor([0, 2]) if kind == "task" else None):
            return torch.func.functional_call(layer, {"rank_expert_A.default": A, "rank_expert_B.default": B}, (x,))

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
    router = layer.rank_expert_router["default"]
    experts = []
    for e in range(3):
        down, up = nn.Linear(D_IN, 2, bias=False).double(), nn.Linear(2, D_OUT, bias=False).double()
        down.weight.data = layer.rank_expert_A["default"][2 * e : 2 * e + 2]
        up.weight.data = layer.rank_expert_B["default"][:, 2 * e : 2 * e + 2]
        experts.append(nn.Sequential(down, up))
    score = (x @ router.weight.T).sigmoid()
    best = score.topk(2).indices
    expected = layer.base_layer(x)
    for n in range(len(x)):
        total = score[n, best[n]].sum()
        for e in best[n].tolist():
            expected[n] += layer.scale("default") * (2 * score[n, e] / total) * experts[e](x[n])
    torch.testing.assert_close(layer(x), expected)


def test_one_block_of_all_ranks_is_lora():
    layer = make_layer("token", expert_rank=R, top_k=1)
    x = torch.randn(4, D_IN, dtype=torch.float64)
    A, B = layer.rank_expert_A["default"], layer.rank_expert_B["default"]
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
    seen = []
    layer.rank_expert_router["default"].register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    x = torch.randn(400, D_IN, dtype=torch.float64)
    layer.train()
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    assert all(torch.equal(each, x) for each in seen)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_scales():
    assert make_layer("token", top_k=2).scale("default") == 3.0 / 2
    assert make_layer("task").scale("default") == 3.0 / R
    assert make_layer("dense").scale("default") == 3.0 / R


def test_output_keeps_the_base_dtype_while_the_adapter_stays_float32():
    layer = make_layer("token").float()
    layer.base_layer.to(torch.bfloat16)
    out = layer(torch.randn(2, 3, D_IN, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert layer.rank_expert_A["default"].grad.dtype == torch.float32


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
            gate_bias = layer.rank_expert_router["default"].gate_bias
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
