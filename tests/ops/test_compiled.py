"""The update as one node of a compiled graph: what torch.library asks of it, and what it must equal."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn

from ops.cases import base_of, by_reference, task_gate, token_gate, trained
from rank_experts.ops import compiled, rank_experts, task_gates
from rank_experts.ops.backends import cpu
from rank_experts.routing import TaskGate, TokenGate, select_experts

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


class Layer(nn.Module):
    """An adapted layer, as small as can be; a task gate's tasks are 0, 1, 0, …"""

    def __init__(self, kind: str, d: int = 32):
        super().__init__()
        self.base = nn.Linear(d, d).requires_grad_(False)
        r = {"token": 64, "task": 8, "dense": 8}[kind]
        self.A, self.B = nn.Parameter(torch.randn(r, d) / d**0.5), nn.Parameter(torch.randn(d, r) / r**0.5)
        self.gate = {"token": lambda: token_gate(d, r, 8), "task": lambda: task_gate(24, r, [3, 5])}.get(kind, list)()
        self.weights = nn.ParameterList(trained(self.gate))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = None
        if isinstance(self.gate, TokenGate):
            gate = self.gate._replace(weight=self.weights[0])
        elif isinstance(self.gate, TaskGate):
            gate = task_gates(TaskGate(*self.weights), torch.arange(len(x)) % 2)
        return rank_experts(base_of(self.base), x, self.A, self.B, gate, scale=0.5).y


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


@pytest.mark.parametrize("kind", ["token", "task", "dense"])
def test_each_layer_is_one_node_of_forward_and_one_of_backward(kind):
    model, backend = nn.Sequential(Layer(kind), nn.ReLU(), Layer(kind)), Counting()
    x = torch.randn(4, 10, 32)
    y = torch.compile(model, fullgraph=True, backend=backend)(x)
    torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-4)
    y.square().sum().backward()
    assert backend.forward == [2]
    assert backend.backward == [2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("case", TOKEN)
def test_what_torch_asks_of_a_token_gates_node(case, dropped, dtype):
    gate = token_gate(10, **(dict(num_experts=12, top_k=2) | TOKEN[case]), dtype=dtype)
    y, x, A, B = tensors(dtype, num_ranks=gate.num_experts * gate.expert_rank)
    gone = x.detach().clone().requires_grad_() if dropped else None
    operands = (x, gone, A, B, gate.weight, gate.balance_bias)
    constants = (gate.top_k, gate.score_function, gate.biased_gates, 0.7, dtype)
    torch.library.opcheck(compiled.forward, (y, *operands, *constants))
    with torch.no_grad():
        _, *kept = compiled.forward(y, *operands, *constants)
        needed = [True, dropped, True, True, True]
        torch.library.opcheck(compiled.backward, (y, *operands, *kept, *constants, needed))


def test_the_results_of_a_node_share_no_memory(monkeypatch):
    # PyTorch's backend makes the gradients of A and W_g by one product.
    monkeypatch.setattr(cpu, "serves", lambda op: False)
    gate, (y, x, A, B) = token_gate(10, 12, 2), tensors()
    operands, constants = (x, None, A, B, gate.weight, gate.balance_bias), (2, "sigmoid", False, 0.7, torch.float32)
    with torch.no_grad():
        _, *kept = compiled.forward(y, *operands, *constants)
        found = compiled.backward(y, *operands, *kept, *constants, [True, False, True, True, True])
    assert len({each.untyped_storage().data_ptr() for each in found}) == 4


@pytest.mark.parametrize("num_used", [5, 12])
@pytest.mark.parametrize("rows", [None, 1, 3, 36])
def test_what_torch_asks_of_a_given_gates_node(rows, num_used):
    y, x, A, B = tensors()
    gates = None if rows is None else torch.rand(rows, num_used).requires_grad_()
    operands, constants = (x, None, A, B, gates, None), (0, "", False, 0.7, torch.float32)
    torch.library.opcheck(compiled.forward, (y, *operands, *constants))
    with torch.no_grad():
        _, *kept = compiled.forward(y, *operands, *constants)
        needed = [True, False, True, True, gates is not None]
        torch.library.opcheck(compiled.backward, (y, *operands, *kept, *constants, needed))


@pytest.mark.parametrize("frozen", [None, "x", "A", "B", "gate"])
@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("kind", ["token", "biased", "given", "fewer", "dense"])
def test_gradients_equal_the_references(kind, drop, frozen):
    base = base_of(nn.Linear(10, 9).requires_grad_(False))
    _, x, A, B = tensors()
    gate = None
    if kind in ("given", "fewer"):
        gate = torch.rand(3, 12 if kind == "given" else 5).requires_grad_()
    elif kind != "dense":
        gate = token_gate(10, 12, top_k=3, biased_gates=kind == "biased")
    named = {"x": x, "A": A, "B": B, "gate": gate.weight if isinstance(gate, TokenGate) else gate}
    if frozen is not None and named[frozen] is not None:
        named[frozen].requires_grad_(False)

    def run(function, x):
        return function(base, x, A, B, gate, scale=0.7, dropped=x.sin() if drop else None).y

    ours = torch.compile(lambda x: run(rank_experts, x), fullgraph=True, backend="aot_eager")(x)
    reference, wanted = run(by_reference, x), trained(*named.values())
    dy = torch.randn_like(ours)
    torch.testing.assert_close(ours, reference)
    for our, their in zip(
        torch.autograd.grad(ours, wanted, dy), torch.autograd.grad(reference, wanted, dy), strict=True
    ):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5)


def test_the_choice_is_the_references_bit_for_bit():
    # Whole numbers, so that every way of adding up gives the same logits, with many ties.
    gate = token_gate(10, 12, top_k=5)
    with torch.no_grad():
        gate.weight.copy_(torch.randint(-2, 3, gate.weight.shape) / 4)
    base, A, B = base_of(nn.Linear(10, 9)), torch.randn(12, 10), torch.randn(9, 12)
    x = torch.randint(-4, 5, (200, 10)) / 2
    run = torch.compile(lambda x: rank_experts(base, x, A, B, gate).indices, fullgraph=True, backend="aot_eager")
    assert torch.equal(run(x), select_experts(gate.logits(x).sigmoid(), 5))


@EVERY
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_the_dtypes_that_it_gives_uncompiled(kind, autocast):
    module = Layer(kind)
    x = torch.randn(40, 32, requires_grad=True)
    run_compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    wanted = trained(x, *module.parameters())
    found = []
    for run in (run_compiled, module):
        with torch.autocast("cpu", autocast):
            y = run(x)
        found.append([y, *torch.autograd.grad(y.float().square().sum(), wanted)])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=3e-2 * theirs.abs().max().item())


@EVERY
def test_one_graph_serves_any_number_of_tokens(kind):
    module = Layer(kind)
    run = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    torch._dynamo.utils.counters.clear()
    for num_tokens in (40, 7, 300):
        x = torch.randn(num_tokens, 32, requires_grad=True)
        dy = torch.randn(num_tokens, 32)
        ours, theirs = run(x), module(x)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        (ours,), (theirs,) = torch.autograd.grad(ours, x, dy), torch.autograd.grad(theirs, x, dy)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@EVERY
def test_functional_transforms_within_a_compiled_function(kind):
    module = Layer(kind)
    x, tangent = torch.randn(5, 32), torch.randn(5, 32)
    functions = (
        lambda x: torch.func.jvp(module, (x,), (tangent,))[1],
        lambda x: torch.func.grad(lambda x: module(x).square().sum())(x),
        lambda x: torch.func.vmap(lambda row: module(row))(x[:, None]),
    )
    for function in functions:
        run = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(run(x), function(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["token", "task", "dense"])
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_needs_nothing_of_this_library(kind, strict):
    module = Layer(kind)
    x = torch.randn(5, 32)
    program = torch.export.export(module, (x,), strict=strict)
    assert nodes(program.graph_module) == 0
    torch.testing.assert_close(program.module()(x), module(x), rtol=1e-4, atol=1e-5)
