"""The update as one node of a compiled graph: what torch.library asks of it, and what it must equal."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn

import models
from gates import GATES, batch, config
from rank_experts import RankExpertConfig, inject_rank_experts
from rank_experts.model import adapted_layers
from rank_experts.ops import dispatch, node, rank_experts
from rank_experts.routing import TokenRouter, select_experts

TOKEN = {
    "sigmoid": {},
    "biased": dict(biased_gates=True),
    "softmax": dict(score_function="softmax"),
    "blocks": dict(expert_rank=3),
    "many": dict(num_experts=300),
}
EVERY = pytest.mark.parametrize("kind", ["token", "dense"])


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def layer(kind: str, d: int = 32, **kwargs) -> nn.Module:
    model = nn.Sequential(nn.Linear(d, d), nn.ReLU())
    make = dict(token=RankExpertConfig.smora, dense=RankExpertConfig.lora)[kind]
    return inject_rank_experts(model, make(target_modules=["0"], init_weights=False, **kwargs))[0]


def tensors(dtype=torch.float32, shape=(3, 12, 10), num_ranks=12, d_out=9, grad=True):
    x, A, B = torch.randn(shape), torch.randn(num_ranks, shape[-1]), torch.randn(d_out, num_ranks)
    y = torch.randn(*shape[:-1], d_out)
    return [t.to(dtype).requires_grad_(grad) for t in (y, x, A, B)]


def nodes(graph) -> int:
    return sum(each.op == "call_function" and "rank_experts" in str(each.target) for each in graph.graph.nodes)


class Counting:
    """A backend that runs the graphs as they are and counts our nodes in forward's and backward's."""

    def __init__(self):
        self.forward, self.backward = [], []

    def __call__(self, graph, inputs):
        def count(into):
            def compiler(graph, inputs):
                into.append(nodes(graph))
                return make_boxed_func(graph.forward)

            return compiler

        return torch._dynamo.backends.common.aot_autograd(
            fw_compiler=count(self.forward), bw_compiler=count(self.backward)
        )(graph, inputs)


@pytest.mark.parametrize("gate", GATES)
def test_each_layer_is_one_node_of_forward_and_one_of_backward(gate):
    torch.manual_seed(0)
    model = inject_rank_experts(models.llama(num_hidden_layers=1), config(gate, target_modules=["q_proj", "down_proj"]))
    backend = Counting()
    torch.compile(model.train(), fullgraph=True, backend=backend)(**batch(gate)).loss.backward()
    assert len(list(adapted_layers(model))) == 2
    assert backend.forward == [2]
    assert backend.backward == [2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("case", TOKEN)
def test_what_torch_asks_of_a_token_gates_node(case, dropped, dtype):
    router = TokenRouter(10, **(dict(num_experts=12, top_k=2) | TOKEN[case])).to(dtype)
    y, x, A, B = tensors(dtype, num_ranks=router.num_experts * router.expert_rank)
    gone = x.detach().clone().requires_grad_() if dropped else None
    constants = (router.top_k, router.score_function, router.biased_gates, 0.7, dtype)
    arguments = (y, x, gone, A, B, router.weight, router.balance_bias, *constants)
    torch.library.opcheck(node.token_gated, arguments)
    with torch.no_grad():
        _, *chosen = node.token_gated(*arguments)
        needed = [True, dropped, True, True, True]
        torch.library.opcheck(
            node.token_gated_backward,
            (y, x, gone, A, B, router.weight, router.balance_bias, *chosen, *constants, needed),
        )


@pytest.mark.parametrize("gates", [None, 1, 3, 36])
def test_what_torch_asks_of_a_given_gates_node(gates):
    y, x, A, B = tensors()
    gates = None if gates is None else torch.rand(gates, len(A)).requires_grad_()
    torch.library.opcheck(node.given_gates, (y, x, A, B, gates, 0.7, torch.float32))
    with torch.no_grad():
        _, projection = node.given_gates(y, x, A, B, gates, 0.7, torch.float32)
        needed = [True, True, True, gates is not None]
        torch.library.opcheck(node.given_gates_backward, (y, x, A, B, gates, projection, 0.7, torch.float32, needed))


@pytest.mark.parametrize("frozen", [None, "x", "A", "B", "gate"])
@pytest.mark.parametrize("kind", ["token", "biased", "given", "dense"])
def test_gradients_equal_the_references(kind, frozen):
    base = nn.Linear(10, 9).requires_grad_(False)
    _, x, A, B = tensors()
    gate = torch.rand(3, 12).requires_grad_() if kind == "given" else None
    router = TokenRouter(10, 12, top_k=3, biased_gates=kind == "biased") if kind in ("token", "biased") else None
    gate_tensor = gate if router is None else router.weight
    named = {"x": x, "A": A, "B": B, "gate": gate_tensor}
    if frozen is not None and named[frozen] is not None:
        named[frozen].requires_grad_(False)
    wanted = [tensor for tensor in named.values() if tensor is not None and tensor.requires_grad]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(x):
        return rank_experts(base, x, A, B, router if router is not None else gate, scale=0.7).y

    reference = dispatch._reference(base, x, A, B, router if router is not None else gate, 0.7, None, None).y
    ours = compiled(x)
    dy = torch.randn_like(ours)
    torch.testing.assert_close(ours, reference)
    for our, their in zip(
        torch.autograd.grad(ours, wanted, dy), torch.autograd.grad(reference, wanted, dy), strict=True
    ):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5)


def test_the_choice_is_the_references_bit_for_bit():
    # Whole numbers, so that every way of adding up gives the same logits, with many ties.
    router = TokenRouter(10, 12, top_k=5)
    with torch.no_grad():
        router.weight.copy_(torch.randint(-2, 3, router.weight.shape) / 4)
    base, A, B = nn.Linear(10, 9), torch.randn(12, 10), torch.randn(9, 12)
    x = torch.randint(-4, 5, (200, 10)) / 2
    compiled = torch.compile(lambda x: rank_experts(base, x, A, B, router).indices, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), select_experts(router.logits(x).sigmoid(), 5))


@EVERY
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_the_dtypes_that_it_gives_uncompiled(kind, autocast):
    module = layer(kind)
    x = torch.randn(40, 32, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    trained = [x, *(p for p in module.parameters() if p.requires_grad)]
    found = []
    for run in (compiled, module):
        with torch.autocast("cpu", autocast):
            y = run(x)
        found.append([y, *torch.autograd.grad(y.float().square().sum(), trained)])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=3e-2 * theirs.abs().max().item())


@EVERY
def test_one_graph_serves_any_number_of_tokens(kind):
    module = layer(kind).eval()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    torch._dynamo.utils.counters.clear()
    for num_tokens in (40, 7, 300):
        x = torch.randn(num_tokens, 32, requires_grad=True)
        dy = torch.randn(num_tokens, 32)
        ours, theirs = compiled(x), module(x)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        (ours,), (theirs,) = torch.autograd.grad(ours, x, dy), torch.autograd.grad(theirs, x, dy)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@EVERY
def test_functional_transforms_within_a_compiled_function(kind):
    module = layer(kind).eval()
    x, tangent = torch.randn(5, 32), torch.randn(5, 32)
    functions = (
        lambda x: torch.func.jvp(module, (x,), (tangent,))[1],
        lambda x: torch.func.grad(lambda x: module(x).square().sum())(x),
        lambda x: torch.func.vmap(lambda row: module(row))(x[:, None]),
    )
    for function in functions:
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), function(x), rtol=1e-4, atol=1e-5)


@EVERY
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_needs_nothing_of_this_library(kind, strict):
    module = layer(kind).eval()
    x = torch.randn(5, 32)
    program = torch.export.export(module, (x,), strict=strict)
    assert nodes(program.graph_module) == 0
    torch.testing.assert_close(program.module()(x), module(x), rtol=1e-4, atol=1e-5)
