"""The op as adapted layers use it: who watches a base layer, what is saved, what a few tokens see, what is compiled."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import models
from gates import GATES, batch, config
from helpers import TASKS
from ops.test_compiled import Counting, nodes
from rank_experts import RankExpertConfig, inject_rank_experts
from rank_experts.calls import Call, RoutingScope
from rank_experts.layers import AdapterSettings, RankExpertLinear, adapted_layers
from rank_experts.ops import rank_experts_reference
from rank_experts.ops.backends import cpu
from rank_experts.ops.backends.cpu.build import library
from rank_experts.routing import select_experts

KINDS = pytest.mark.parametrize("kind", ["token", "dense"])


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


def adapted(kind: str, d: int = 32, **kwargs) -> RankExpertLinear:
    """A layer of a model, so that it is what users get."""
    model = nn.Sequential(nn.Linear(d, d), nn.ReLU())
    make = dict(token=RankExpertConfig.smora, task=RankExpertConfig.more, dense=RankExpertConfig.lora)[kind]
    kwargs = (dict(tasks=TASKS) if kind == "task" else {}) | kwargs
    inject_rank_experts(model, make(target_modules=["0"], init_weights=False, **kwargs))
    return model[0]


def trained(layer: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


def saved_bytes(layer: nn.Module, x: torch.Tensor) -> int:
    """Bytes saved for backward beyond x and the parameters."""
    known = {p.untyped_storage().data_ptr() for p in layer.parameters()} | {x.untyped_storage().data_ptr()}
    found: dict[int, int] = {}
    kept: list[torch.Tensor] = []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    assert y.requires_grad
    return sum(found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_saved_for_backward(dtype):
    x = torch.randn(256, 128, dtype=dtype, requires_grad=True)
    lora = LoraConfig(r=64, target_modules=["0"])
    lora = get_peft_model(nn.Sequential(nn.Linear(128, 128).to(dtype)), lora, autocast_adapter_dtype=False)
    theirs = saved_bytes(lora.base_model.model[0], x)
    assert theirs == 256 * 64 * dtype.itemsize
    # One byte an index, four (two) a score and as many a projection, for 8 of 64 ranks: 0.28 (0.31).
    ours = saved_bytes(adapted("token", 128, r=64, top_k=8).to(dtype), x)
    assert ours == 256 * 8 * (1 + 2 * dtype.itemsize)
    assert ours < 0.32 * theirs
    assert saved_bytes(adapted("dense", 128, r=64).to(dtype), x) == theirs


@pytest.mark.parametrize("native", [False, True])
def test_the_task_gate_computes_the_used_ranks_alone(native, monkeypatch):
    if not native:
        monkeypatch.setattr(cpu, "serves", lambda op: False)
        monkeypatch.setattr(cpu, "serves_task_gate", lambda gate: False)
    layer = adapted("task", r=8, contrastive_coef=0.0, tasks=["a"])
    adapter = layer.rank_experts["default"]
    with torch.no_grad():
        adapter.gate_weight.zero_()
        adapter.gate_bias.zero_()
        adapter.gate_bias[2] = 5
    x = torch.randn(64, 32, requires_grad=True)
    assert saved_bytes(layer, x) - 64 * 3 * 4 < 512  # three ranks of eight, and the gate's few numbers
    layer(x).sum().backward()
    assert adapter.A.grad.shape == (8, 32)
    assert adapter.A.grad[:3].abs().min() > 0
    assert not adapter.A.grad[3:].any()
    assert not adapter.B.grad[:, 3:].any()


@KINDS
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("num_tokens", [4, 40])
def test_hooks_see_the_base_layers_own_output(kind, grad, num_tokens):
    layer, seen = adapted(kind), []
    layer.base_layer.register_forward_hook(lambda module, args, output: seen.append((output, output.clone())))
    x = torch.randn(num_tokens, 32, requires_grad=True)
    with torch.set_grad_enabled(grad):
        y = layer(x)
    if grad:
        y.sum().backward()
    ((output, copy),) = seen
    assert torch.equal(output, copy)
    assert not torch.equal(output, y)


@KINDS
def test_backward_hooks_and_pre_hooks_of_the_base_layer_run(kind):
    layer, seen = adapted(kind), []
    layer.base_layer.register_full_backward_hook(lambda module, dx, dy: seen.append((dx[0], dx[0].clone())))
    layer.base_layer.register_forward_pre_hook(lambda module, args: seen.append("before"))
    layer(torch.randn(40, 32, requires_grad=True)).sum().backward()
    assert seen[0] == "before"
    assert torch.equal(*seen[1])


@KINDS
def test_a_trained_bias_of_the_base_layer_gets_its_gradient(kind):
    layer = adapted(kind)
    layer.base_layer.bias.requires_grad_(True)
    layer(torch.randn(2, 20, 32)).sum().backward()
    torch.testing.assert_close(layer.base_layer.bias.grad, torch.full((32,), 40.0))


def test_a_base_layer_with_a_forward_of_its_own_is_called_and_differentiated():
    layer = adapted("token")
    adapter = layer.rank_experts["default"]
    layer.base_layer.forward = lambda x: 3 * x
    x = torch.randn(40, 32, requires_grad=True)
    gates = adapter.token_gate().route(x).gates
    expected = rank_experts_reference(3 * x, x, adapter.A, adapter.B, gates, adapter.scale)
    y, dy = layer(x), torch.randn(40, 32)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, dy)[0] for out in (y, expected)), rtol=1e-4, atol=1e-4)


@KINDS
def test_an_input_changed_after_forward_is_noticed(kind):
    layer, x = adapted(kind), torch.randn(40, 32)
    y = layer(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_load_counts_the_chosen():
    layer = adapted("token", r=8, top_k=3)
    layer(torch.randn(4, 25, 32))
    assert layer.scope.take_load(layer.path, "default").sum() == 300
    x = torch.randn(100, 32)
    layer(x)
    indices = select_experts(layer.rank_experts["default"].token_gate().logits(x).sigmoid(), 3)
    load = layer.scope.take_load(layer.path, "default")
    assert torch.equal(load, torch.bincount(indices.flatten(), minlength=8).float())


@KINDS
def test_a_compiled_layer_has_no_graph_break(kind):
    layer, x = adapted(kind), torch.randn(40, 32, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    wanted = [x, *trained(layer)]
    ours, theirs = (torch.autograd.grad(run(x).square().sum(), wanted) for run in (compiled, layer))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gate", GATES)
def test_each_layer_is_one_node_of_forward_and_one_of_backward(gate):
    torch.manual_seed(0)
    model = inject_rank_experts(models.llama(num_hidden_layers=1), config(gate, target_modules=["q_proj", "down_proj"]))
    backend = Counting()
    torch.compile(model.train(), fullgraph=True, backend=backend)(**batch(gate)).loss.backward()
    assert len(list(adapted_layers(model))) == 2
    assert backend.forward == [2]
    assert backend.backward == [2]


@KINDS
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_layer_needs_nothing_of_this_library(kind, strict):
    layer, x = adapted(kind).eval(), torch.randn(5, 32)
    program = torch.export.export(layer, (x,), strict=strict)
    assert nodes(program.graph_module) == 0
    torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-4, atol=1e-5)


def layer_with_two_adapters() -> RankExpertLinear:
    """A layer in evaluation with two token gates, one of them active."""
    torch.manual_seed(0)
    layer = RankExpertLinear(nn.Linear(40, 33), path="proj", scope=RoutingScope())
    for name, alpha in (("default", 3.0), ("other", 5.0)):
        layer.add_adapter(name, AdapterSettings(8, alpha, "token", top_k=2, dropout=0.5), init_weights=False)
    layer.set_adapter(["default"])
    return layer.eval().requires_grad_(False)


def _replace(layer: RankExpertLinear, name: str, tensor: torch.Tensor) -> None:
    setattr(layer.rank_experts["default"], name, nn.Parameter(tensor))


CHANGES = {
    "A in place": lambda layer: layer.rank_experts["default"].A.mul_(2),
    "A's data": lambda layer: setattr(layer.rank_experts["default"].A, "data", torch.randn(8, 40)),
    "another B": lambda layer: _replace(layer, "B", torch.randn(33, 8)),
    "the gate": lambda layer: layer.rank_experts["default"].router_weight.neg_(),
    "the bias": lambda layer: layer.rank_experts["default"].balance_bias.copy_(torch.arange(8.0)),
    "the base layer": lambda layer: setattr(layer, "base_layer", nn.Linear(40, 33)),
    "another adapter": lambda layer: layer.set_adapter(["other"]),
    "two adapters": lambda layer: layer.set_adapter(["default", "other"]),
    "adapters off": lambda layer: layer.enable_adapters(False),
    "bfloat16": lambda layer: _replace(layer, "B", layer.rank_experts["default"].B.bfloat16()),
    "base hook": lambda layer: layer.base_layer.register_forward_hook(lambda module, args, y: y + 1),
    "base pre-hook": lambda layer: layer.base_layer.register_forward_pre_hook(lambda module, args: args[0] * 2),
    "base forward": lambda layer: setattr(layer.base_layer, "forward", lambda x: torch.ones(*x.shape[:-1], 33)),
    "every module's hook": lambda layer: nn.modules.module.register_module_forward_hook(
        lambda module, args, y: y * 2 if isinstance(module, nn.Linear) else None
    ),
}


@pytest.mark.skipif(library() is None, reason="no C++ compiler")
@pytest.mark.parametrize("change", CHANGES)
def test_a_few_tokens_see_every_change(change, monkeypatch):
    layer, x = layer_with_two_adapters(), torch.randn(2, 3, 40)
    with torch.no_grad():
        before = layer(x)
        handle = CHANGES[change](layer)
        try:
            ours = layer(x)
            monkeypatch.setattr(cpu, "serves", lambda op: False)
            theirs = layer(x)
        finally:
            if hasattr(handle, "remove"):
                handle.remove()
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
    if change != "bfloat16":
        assert not torch.allclose(ours, before, atol=1e-3)


def test_a_few_tokens_see_who_watches_and_who_mixes():
    layer, x = layer_with_two_adapters(), torch.randn(2, 3, 40)
    seen = []
    with torch.no_grad():
        with Call(layer.scope, observers=(lambda *args: seen.append(args),)):
            layer(x)
        with Call(layer.scope, adapter_names=["default", "other"]):
            mixed = layer(x)
        expected = layer(x[:1]), layer.set_adapter("other") or layer(x[1:])
    assert len(seen) == 1
    torch.testing.assert_close(mixed, torch.cat(expected))


def test_a_few_tokens_see_dropout_and_transforms():
    layer, x = layer_with_two_adapters(), torch.randn(3, 40)
    with torch.no_grad():
        plain = layer(x)
        torch.testing.assert_close(torch.func.vmap(layer)(x[:, None])[:, 0], plain)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        layer.rank_experts["default"].train()
        assert not torch.allclose(layer(x), plain)
        traced = torch.jit.trace(layer.eval(), x)
        torch.testing.assert_close(traced(x[:2]), plain[:2])
