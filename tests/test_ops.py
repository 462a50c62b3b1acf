"""The fused op against the plain reference: outputs, every gradient, what is saved, and when it steps aside."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from rank_experts import RankExpertConfig, inject_rank_experts
from rank_experts.context import Call, RoutingScope
from rank_experts.layer import AdapterSettings, RankExpertLinear
from rank_experts.ops import dispatch, native, native_given, rank_experts, rank_experts_reference
from rank_experts.ops.gate import select
from rank_experts.ops.native_build import library
from rank_experts.ops.products import multiply
from rank_experts.routing import TokenRouter, select_experts

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 8e-3}

TOKEN = {
    "token": dict(num_experts=12, top_k=3),
    "all": dict(num_experts=5, top_k=5),
    "one": dict(num_experts=7, top_k=1),
    "softmax": dict(num_experts=12, top_k=3, score_function="softmax"),
    "biased": dict(num_experts=12, top_k=3, biased_gates=True),
    "biased softmax": dict(num_experts=12, top_k=3, score_function="softmax", biased_gates=True),
    "blocks": dict(num_experts=4, top_k=2, expert_rank=3),
    "biased blocks": dict(num_experts=4, top_k=2, expert_rank=3, biased_gates=True),
}


@pytest.fixture(autouse=True)
def _given_gates_in_pytorch(monkeypatch):
    # The kernel for few ranks has tests of its own.
    monkeypatch.setattr(native_given, "supports", lambda *args: False)


class Case:
    """One layer's tensors; small whole numbers for x and W_g, so that every path computes the same logits."""

    def __init__(self, gate, shape=(37, 10), d_out=9, dtype=torch.float64, adapter=None, conv=False, bias=True, rows=1):
        d_in, adapter = shape[-1], adapter or dtype
        self.base = (Conv1D(d_out, d_in) if conv else nn.Linear(d_in, d_out, bias=bias)).to(dtype).requires_grad_(False)
        self.gate, r = None, 6
        if gate in TOKEN:
            self.gate = TokenRouter(d_in, **TOKEN[gate]).to(adapter)
            r = self.gate.num_experts * self.gate.expert_rank
            with torch.no_grad():
                self.gate.weight.copy_(torch.randint(-4, 5, self.gate.weight.shape) / 8)
                self.gate.balance_bias.copy_(torch.randint(0, 5, self.gate.balance_bias.shape) / 64)
        elif gate == "given":
            wide = torch.promote_types(adapter, torch.float32)
            self.gate = torch.rand(rows, r, dtype=wide).requires_grad_()
        self.A = torch.randn(r, d_in).to(adapter).requires_grad_()
        self.B = torch.randn(d_out, r).to(adapter).requires_grad_()
        self.x = (torch.randint(-8, 9, shape) / 4).to(dtype).requires_grad_()
        self.dy = torch.randn(*shape[:-1], d_out)

    def wanted(self):
        """Every tensor that gets a gradient."""
        gate = [self.gate.weight] if isinstance(self.gate, TokenRouter) else [] if self.gate is None else [self.gate]
        return [tensor for tensor in (self.x, self.A, self.B, *gate) if tensor.requires_grad]

    def run(self, fused: bool, **kwargs):
        """Output and gradients of the dispatcher's choice, or of the reference."""
        dropped = kwargs.pop("dropped", None)
        if fused:
            dropout = None if dropped is None else lambda x: dropped
            adapted = rank_experts(self.base, self.x, self.A, self.B, self.gate, scale=0.7, dropout=dropout, **kwargs)
        else:
            adapted = dispatch._reference(
                self.base, self.x, self.A, self.B, self.gate, 0.7, dropped, kwargs.get("output")
            )
        wanted = [*self.wanted(), *([dropped] if dropped is not None else [])]
        grads = torch.autograd.grad(adapted.y, wanted, self.dy.to(adapted.y), retain_graph=True)
        return adapted, [adapted.y, *grads]


def assert_same(case: Case, tolerance: float, **kwargs):
    fused, ours = case.run(True, **kwargs)
    _, theirs = case.run(False, **kwargs)
    assert type(fused.y.grad_fn).__name__ in ("TokenGatedBackward", "GivenGatesBackward")
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == their.dtype
        assert our.shape == their.shape
        assert our.is_contiguous() or not their.is_contiguous()
        scale = their.abs().max().item() if their.numel() else 0.0
        torch.testing.assert_close(our, their, rtol=tolerance, atol=tolerance * max(scale, 1e-3))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("gate", [*TOKEN, "given", "dense"])
def test_equals_the_reference(gate, dtype):
    assert_same(Case(gate, dtype=dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("gate", ["token", "blocks", "given", "dense"])
@pytest.mark.parametrize("shape", [(0, 10), (1, 10), (3, 5, 10), (2, 50, 13), (1, 1, 1)], ids=str)
def test_shapes(gate, shape):
    assert_same(Case(gate, shape=shape), 1e-10)


@pytest.mark.parametrize("rows", [1, 2, 4, 12])
def test_a_row_of_gates_for_several_tokens(rows):
    assert_same(Case("given", shape=(4, 3, 10), rows=rows), 1e-10)


@pytest.mark.parametrize("gate", ["token", "given", "dense"])
@pytest.mark.parametrize("options", [dict(conv=True), dict(bias=False)], ids=str)
def test_base_layers(gate, options):
    assert_same(Case(gate, **options), 1e-10)


@pytest.mark.parametrize("gate", ["token", "given", "dense"])
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_adapter_on_a_narrower_base(gate, base):
    case = Case(gate, dtype=base, adapter=torch.float32)
    assert_same(case, TOLERANCE[base])
    assert case.run(True)[1][2].dtype == torch.float32


@pytest.mark.parametrize("gate", ["token", "given", "dense"])
def test_a_narrower_adapter_on_a_float32_base(gate):
    case = Case(gate, dtype=torch.float32, adapter=torch.bfloat16)
    with torch.no_grad():
        case.base.weight.mul_(1e3)
    assert_same(case, TOLERANCE[torch.bfloat16])
    # The base's own digits survive.
    assert not torch.equal(case.run(True)[0].y, case.run(True)[0].y.bfloat16().float())


@pytest.mark.parametrize("gate", ["token", "biased", "given", "dense"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(gate, dtype, base):
    case = Case(gate, dtype=base, adapter=torch.float32, shape=(3, 20, 10))
    with torch.autocast("cpu", dtype=dtype):
        assert_same(case, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("gate", ["token", "blocks", "given", "dense"])
def test_dropout_reaches_a_alone(gate):
    case = Case(gate)
    dropped = (case.x.detach() * torch.randint(0, 2, case.x.shape)).requires_grad_()
    _, ours = case.run(True, dropped=dropped)
    _, theirs = case.run(False, dropped=dropped)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gate", ["token", "given", "dense"])
def test_strided_inputs(gate):
    case = Case(gate, shape=(6, 7, 10))
    case.x = torch.randn(7, 6, 20, dtype=torch.float64)[..., ::2].transpose(0, 1).requires_grad_()
    case.dy = torch.randn(9, 6, 7).permute(1, 2, 0)
    case.A = torch.randn(10, len(case.A), dtype=torch.float64).t().requires_grad_()
    assert_same(case, 1e-10)


@pytest.mark.parametrize("gate", ["token", "given", "dense"])
@pytest.mark.parametrize("frozen", ["x", "A", "B", "gate"])
def test_only_the_gradients_that_are_needed(gate, frozen):
    case = Case(gate)
    if frozen == "gate":
        if gate == "dense":
            pytest.skip("has no gate")
        (case.gate.weight if gate == "token" else case.gate).requires_grad_(False)
    else:
        getattr(case, frozen).requires_grad_(False)
    assert_same(case, 1e-10)


@pytest.mark.parametrize("gate", ["token", "given", "dense"])
def test_without_gradients(gate):
    case = Case(gate)
    with torch.no_grad():
        fused = rank_experts(case.base, case.x, case.A, case.B, case.gate, scale=0.7).y
        plain = dispatch._reference(case.base, case.x, case.A, case.B, case.gate, 0.7, None, None).y
    torch.testing.assert_close(fused, plain)


@pytest.mark.parametrize("gate", TOKEN)
def test_gradcheck(gate):
    case = Case(gate, shape=(40, 5), d_out=3)
    with torch.no_grad():  # Away from ties, where the choice jumps.
        case.gate.weight.copy_(torch.randn(case.gate.weight.shape))

    def function(x, A, B, weight):
        case.gate.weight = nn.Parameter(weight) if not weight.requires_grad else weight
        return rank_experts(case.base, x, A, B, case.gate, scale=0.7).y

    del case.gate._parameters["weight"]
    weight = torch.randn(case.gate.balance_bias.shape[0], 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (case.x, case.A, case.B, weight), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (case.x, case.A, case.B, weight), fast_mode=True)


@pytest.mark.parametrize("gate", ["given", "dense"])
@pytest.mark.parametrize("drop", [False, True])
def test_gradcheck_of_given_gates(gate, drop):
    case = Case(gate, shape=(2, 3, 5), d_out=3, rows=2)
    inputs = [case.x, case.A, case.B] + ([case.gate] if gate == "given" else [])

    def function(x, A, B, gates=None):
        return rank_experts(case.base, x, A, B, gates, scale=0.7, dropout=torch.sin if drop else None).y

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("gate", ["token", "biased", "given"])
def test_the_second_derivative_equals_the_references(gate):
    case = Case(gate)
    found = []
    for fused in (True, False):
        y = case.run(fused)[0].y
        (dx,) = torch.autograd.grad(y.square().sum(), case.x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), case.wanted()))
    for our, their in zip(*found, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-9, atol=1e-9 * their.abs().max().item())


SPECIAL = [0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan"), 1e-45, -1e-45]


@pytest.mark.parametrize("num_experts", [2, 9, 64, 256, 300])
@pytest.mark.parametrize("num_tokens", [1, 200])
def test_select_is_bit_for_bit_the_routers(num_experts, num_tokens):
    keys = torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), (num_tokens, num_experts))]
    negative_nan = torch.tensor([-4194304], dtype=torch.int32).view(torch.float32)
    keys = torch.where(keys.isnan() & (torch.rand(keys.shape) < 0.5), negative_nan, keys)
    for top_k in {1, num_experts // 2, num_experts}:
        assert torch.equal(select(keys, top_k), select_experts(keys, top_k))
        wide = torch.randn(num_tokens, num_experts * 2)[:, ::2]
        assert torch.equal(select(wide, top_k), select_experts(wide, top_k))


@pytest.mark.parametrize("num_tokens", [5, 100])
def test_a_tie_goes_to_the_lower_index_and_a_nan_is_never_dropped(num_tokens):
    case = Case("token", shape=(num_tokens, 10), dtype=torch.float32)
    with torch.no_grad():
        case.gate.weight.zero_()
        case.gate.balance_bias.zero_()
        case.gate.weight[5, 0] = torch.nan
        case.x[:, 0] = 0
    adapted = rank_experts(case.base, case.x, case.A, case.B, case.gate, scale=0.7)
    assert adapted.y.isnan().all()
    assert adapted.indices.tolist() == [[5, 0, 1]] * num_tokens


def test_a_saturated_router_gives_finite_gates():
    for value in (-300.0, 300.0):
        case = Case("token", dtype=torch.float32)
        with torch.no_grad():
            case.gate.weight.fill_(value)
            case.x.copy_(case.x.abs() + 1)
        ours, theirs = case.run(True)[1], case.run(False)[1]
        assert all(result.isfinite().all() for result in ours)
        torch.testing.assert_close(ours[0], theirs[0])


class Seen(TorchDispatchMode):
    """The operators that run, with the shapes of what they return."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.calls.append((str(func), tuple(found.shape) if isinstance(found, torch.Tensor) else None))
        return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_accelerator_multiplies_in_16_bits_and_adds_in_32(dtype):
    with FakeTensorMode(), Seen() as seen:
        x, A, weight = (torch.empty(rows, 64, dtype=dtype, device="cuda") for rows in (100, 8, 12))
        projection, logits = multiply(x, [(A, dtype), (weight, torch.float32)])
    assert (projection.dtype, projection.shape) == (dtype, (100, 8))
    assert (logits.dtype, logits.shape) == (torch.float32, (100, 12))
    assert [shape for name, shape in seen.calls if "mm" in name] == [(100, 20)]
    assert not [name for name, shape in seen.calls if shape == (100, 64) and "empty" not in name]


def test_a_float32_router_on_an_accelerator_is_not_rounded():
    with FakeTensorMode(), Seen() as seen:
        x, A = (torch.empty(rows, 64, dtype=torch.bfloat16, device="cuda") for rows in (100, 8))
        weight = torch.empty(12, 64, device="cuda")
        multiply(x, [(A, torch.bfloat16), (weight, torch.float32)])
    assert [(name, shape) for name, shape in seen.calls if "mm" in name] == [
        ("aten.mm.default", (100, 8)),
        ("aten.mm.default", (100, 12)),
    ]


@pytest.mark.gpu
def test_the_wide_product_is_exact_but_for_the_order_of_its_sum():
    x, A, weight = (torch.randn(rows, 512, dtype=torch.bfloat16, device="cuda") for rows in (100, 8, 64))
    _, logits = multiply(x, [(A, torch.bfloat16), (weight, torch.float32)])
    exact = x.double() @ weight.double().t()
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())


def adapted(kind: str, d: int = 32, **kwargs) -> RankExpertLinear:
    """A layer of a model, so that it is what users get."""
    model = nn.Sequential(nn.Linear(d, d), nn.ReLU())
    make = dict(token=RankExpertConfig.smora, task=RankExpertConfig.more, dense=RankExpertConfig.lora)[kind]
    if kind == "task":
        kwargs = dict(tasks=["a", "b"]) | kwargs
    inject_rank_experts(model, make(target_modules=["0"], init_weights=False, **kwargs))
    return model[0]


def saved_bytes(layer: nn.Module, x: torch.Tensor) -> int:
    """Bytes saved for backward beyond x and the parameters."""
    known = {p.untyped_storage().data_ptr() for p in layer.parameters()} | {x.untyped_storage().data_ptr()}
    found: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    assert y.requires_grad
    return sum(found.values())


def test_what_is_saved_for_backward():
    x = torch.randn(256, 128, requires_grad=True)
    lora = get_peft_model(nn.Sequential(nn.Linear(128, 128)), LoraConfig(r=64, target_modules=["0"])).base_model.model[
        0
    ]
    theirs = saved_bytes(lora, x)
    assert theirs == 256 * 64 * 4
    # One byte an index, four a score and four a projection, for 8 of 64 ranks: 9/32 = 0.28.
    ours = saved_bytes(adapted("token", 128, r=64, top_k=8), x)
    assert ours == theirs * 9 // 32
    assert saved_bytes(adapted("dense", 128, r=64), x) == theirs
    # Of the token gate's balancing bias a copy is kept only where it enters the gates.
    assert saved_bytes(adapted("token", 128, r=64, top_k=8, biased_gates=True), x) == ours + 64 * 4


def test_saved_in_sixteen_bits():
    x = torch.randn(256, 128, dtype=torch.bfloat16, requires_grad=True)
    layer = adapted("token", 128, r=64, top_k=8).to(torch.bfloat16)
    assert saved_bytes(layer, x) == 256 * 8 * (1 + 2 + 2)


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("gate", ["token", "given", "dense"])
def test_the_output_may_be_changed_in_place(gate, conv):
    case = Case(gate, shape=(3, 5, 10), conv=conv)
    adapted, _ = case.run(True)
    adapted.y.mul_(2)
    found = torch.autograd.grad(adapted.y, case.x, case.dy.to(adapted.y))[0]
    torch.testing.assert_close(found, 2 * case.run(False)[1][1])


def test_the_load_counts_the_chosen():
    layer = adapted("token", r=8, top_k=3)
    layer(torch.randn(4, 25, 32))
    load = layer.take_load("default")
    assert load.sum() == 300
    router = layer.rank_expert_router["default"]
    x = torch.randn(100, 32)
    layer(x)
    indices = select_experts(router.logits(x).sigmoid(), 3)
    assert torch.equal(layer.take_load("default"), torch.bincount(indices.flatten(), minlength=8).float())


def test_hooks_see_the_base_layers_own_output():
    layer = adapted("token")
    seen = []
    layer.base_layer.register_forward_hook(lambda module, args, output: seen.append((output, output.clone())))
    x = torch.randn(40, 32, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    ((output, copy),) = seen
    assert torch.equal(output, copy)
    assert not torch.equal(output, y)


def test_backward_hooks_and_pre_hooks_of_the_base_layer_run():
    layer = adapted("dense")
    seen = []
    layer.base_layer.register_full_backward_hook(lambda module, dx, dy: seen.append((dx[0], dx[0].clone())))
    layer.base_layer.register_forward_pre_hook(lambda module, args: seen.append("before"))
    layer(torch.randn(40, 32, requires_grad=True)).sum().backward()
    assert seen[0] == "before"
    assert torch.equal(*seen[1])


@pytest.mark.parametrize("kind", ["token", "dense"])
def test_a_trained_bias_of_the_base_layer_gets_its_gradient(kind):
    layer = adapted(kind)
    layer.base_layer.bias.requires_grad_(True)
    layer(torch.randn(2, 20, 32)).sum().backward()
    torch.testing.assert_close(layer.base_layer.bias.grad, torch.full((32,), 40.0))


def test_a_base_layer_with_a_forward_of_its_own_is_called_and_differentiated():
    layer = adapted("token")
    layer.base_layer.forward = lambda x: 3 * x
    x = torch.randn(40, 32, requires_grad=True)
    A, B = layer.rank_expert_A["default"], layer.rank_expert_B["default"]
    gates = layer.rank_expert_router["default"](x).gates
    expected = rank_experts_reference(3 * x, x, A, B, gates, layer.scale("default"))
    y, dy = layer(x), torch.randn(40, 32)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*(torch.autograd.grad(out, x, dy)[0] for out in (y, expected)), rtol=1e-4, atol=1e-4)


def test_an_input_changed_after_forward_is_noticed():
    layer = adapted("token")
    x = torch.randn(40, 32)
    y = layer(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("joined", [False, True], ids=["apart", "joined"])
def test_the_task_gate_computes_the_used_ranks_alone(joined, monkeypatch):
    if joined:
        monkeypatch.undo()
    layer = adapted("task", r=8, contrastive_coef=0.0)
    router = layer.rank_expert_router["default"]
    with torch.no_grad():
        router.gate_weight.zero_()
        router.gate_bias.zero_()
        router.gate_bias[2] = 5
    x = torch.randn(64, 32, requires_grad=True)
    layer.scope.tasks["default"] = ("a",)
    ours = saved_bytes(layer, x)
    assert ours - 64 * 3 * 4 < 512  # three ranks of eight, and the router's few numbers
    layer(x).sum().backward()
    assert layer.rank_expert_A["default"].grad.shape == (8, 32)
    assert layer.rank_expert_A["default"].grad[:3].abs().min() > 0
    assert not layer.rank_expert_A["default"].grad[3:].any()
    assert not layer.rank_expert_B["default"].grad[:, 3:].any()


@pytest.mark.parametrize("kind", ["token", "dense"])
def test_two_runs_agree_in_every_bit(kind):
    layer = adapted(kind, 64)
    x = torch.randn(300, 64, requires_grad=True)
    runs = []
    for _ in range(2):
        y = layer(x)
        trained = [p for p in layer.parameters() if p.requires_grad]
        runs.append([y, *torch.autograd.grad(y.sum(), [x, *trained])])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("kind", ["token", "dense"])
def test_a_compiled_layer_has_no_graph_break(kind):
    layer = adapted(kind)
    x = torch.randn(40, 32, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
    ours = torch.autograd.grad(compiled(x).square().sum(), trained)
    theirs = torch.autograd.grad(layer(x).square().sum(), trained)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-4)


def test_functional_transforms_take_the_reference():
    layer = adapted("token").eval()
    x = torch.randn(5, 32)
    tangent = torch.randn(5, 32)
    _, ours = torch.func.jvp(layer, (x,), (tangent,))
    step = 1e-3
    theirs = (layer(x + step * tangent) - layer(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


def test_the_balancing_loss_reaches_the_router():
    layer = adapted("token", load_balance="loss")
    with Call(layer.scope) as call:
        layer(torch.randn(40, 32))
    ((_, loss),) = call.losses
    (grad,) = torch.autograd.grad(loss, layer.rank_expert_router["default"].weight)
    assert grad.abs().max() > 0


@pytest.mark.parametrize(
    ("native_serves", "choice"), [(False, "fused function, gate in PyTorch"), (True, "native CPU kernel")]
)
def test_the_choice_is_said_once(caplog, monkeypatch, native_serves, choice):
    if not native_serves:
        monkeypatch.setattr(native, "supports", lambda *args: False)
    elif library() is None:
        pytest.skip("no C++ compiler")
    dispatch.announce.cache_clear()
    layer = adapted("token")
    with caplog.at_level(logging.INFO, logger="rank_experts.ops"):
        for _ in range(3):
            layer(torch.randn(40, 32))
    assert [record.message for record in caplog.records] == [f"rank_experts computes adapted layers with: {choice}"]


def test_several_adapters_add_up():
    layer = RankExpertLinear(nn.Linear(8, 6).requires_grad_(False), path="proj", scope=RoutingScope())
    for name in ("one", "two"):
        layer.add_adapter(name, r=4, settings=AdapterSettings(alpha=4), init_weights=False)
    x = torch.randn(40, 8, requires_grad=True)
    base = layer.base_layer(x)
    alone = []
    for name in ("one", "two"):
        layer.set_adapter(name)
        alone.append(layer(x) - base)
    layer.set_adapter(["one", "two"])
    y = layer(x)
    torch.testing.assert_close(y, base + alone[0] + alone[1])
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    expected = torch.autograd.grad(base + alone[0] + alone[1], x, dy)[0]
    torch.testing.assert_close(dx, expected)
