"""The op by PyTorch's backend against the reference: outputs, every gradient, what is saved, when it steps aside."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from ops.cases import Watched, assert_close, base_of, by_reference, task_gate, token_gate, trained
from rank_experts.ops import Base, load_of_output, rank_experts, rank_experts_reference, task_gates
from rank_experts.ops.announcement import announce
from rank_experts.ops.backends import cpu, pytorch
from rank_experts.ops.backends.cpu.build import library
from rank_experts.routing import TokenGate, select_experts

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 8e-3}

TOKEN = {
    "token": dict(num_experts=12, top_k=3),
    "all": dict(num_experts=5, top_k=5),
    "one": dict(num_experts=7, top_k=1),
    "softmax": dict(num_experts=12, top_k=3, score_function="softmax"),
    "biased": dict(num_experts=12, top_k=3, biased_gates=True),
    "below zero": dict(num_experts=12, top_k=5, biased_gates=True),
    "biased softmax": dict(num_experts=12, top_k=3, score_function="softmax", biased_gates=True),
    "blocks": dict(num_experts=4, top_k=2, expert_rank=3),
    "biased blocks": dict(num_experts=4, top_k=2, expert_rank=3, biased_gates=True),
}
KINDS = pytest.mark.parametrize("gate", ["token", "given", "dense"])


@pytest.fixture(autouse=True)
def _in_pytorch(monkeypatch):
    # The native kernel has tests of its own.
    monkeypatch.setattr(cpu, "serves", lambda op: False)
    monkeypatch.setattr(cpu, "serves_task_gate", lambda gate: False)


class Case:
    """One layer's tensors; small whole numbers for x and W_g, so that every path computes the same logits."""

    def __init__(self, gate, shape=(37, 10), d_out=9, dtype=torch.float64, adapter=None, conv=False, bias=True, rows=1):
        d_in, adapter, used = shape[-1], adapter or dtype, 6
        layer = Conv1D(d_out, d_in) if conv else nn.Linear(d_in, d_out, bias=bias)
        self.layer = layer.to(dtype).requires_grad_(False)
        self.base, self.gate, r = base_of(self.layer), None, 6
        if gate in TOKEN:
            self.gate = token_gate(d_in, **TOKEN[gate], dtype=adapter)
            r = self.gate.num_experts * self.gate.expert_rank
            with torch.no_grad():
                self.gate.weight.copy_(torch.randint(-4, 5, self.gate.weight.shape) / 8)
                self.gate.balance_bias.copy_(torch.randint(0, 5, self.gate.balance_bias.shape) / 64)
                if gate == "below zero":  # keys of both signs among the chosen, and tokens with none above
                    self.gate.balance_bias.sub_(0.7)
        elif gate in ("given", "fewer"):
            used = r if gate == "given" else 4
            wide = torch.promote_types(adapter, torch.float32)
            self.gate = torch.rand(rows, used, dtype=wide).requires_grad_()
        self.A = torch.randn(r, d_in).to(adapter).requires_grad_()
        self.B = torch.randn(d_out, r).to(adapter).requires_grad_()
        self.x = (torch.randint(-8, 9, shape) / 4).to(dtype).requires_grad_()
        self.dy = torch.randn(*shape[:-1], d_out)

    def run(self, fused: bool, dropped=None):
        """What the op returns or the reference, and its output with all gradients."""
        function = rank_experts if fused else by_reference
        adapted = function(self.base, self.x, self.A, self.B, self.gate, scale=0.7, dropped=dropped)
        wanted = trained(self.x, self.A, self.B, self.gate, dropped)
        grads = torch.autograd.grad(adapted.y, wanted, self.dy.to(adapted.y), retain_graph=True)
        return adapted, [adapted.y, *grads]


def assert_same(case: Case, tolerance: float, dropped=None):
    (fused, ours), (plain, theirs) = case.run(True, dropped), case.run(False, dropped)
    assert type(fused.y.grad_fn).__name__ == "UpdateBackward"
    assert fused.y.grad_fn.backend is pytorch
    assert (fused.indices is None) == (plain.indices is None)
    assert plain.indices is None or torch.equal(fused.indices, plain.indices)
    assert_close(ours, theirs, tolerance, smallest=1e-3)
    for our, their in zip(ours, theirs, strict=True):
        assert our.is_contiguous() or not their.is_contiguous()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("gate", [*TOKEN, "given", "fewer", "dense"])
def test_equals_the_reference(gate, dtype):
    assert_same(Case(gate, dtype=dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("gate", ["token", "blocks", "given", "fewer", "dense"])
@pytest.mark.parametrize("shape", [(0, 10), (1, 10), (3, 5, 10), (2, 50, 13), (1, 1, 1)], ids=str)
def test_shapes(gate, shape):
    assert_same(Case(gate, shape=shape), 1e-10)


@pytest.mark.parametrize("gate", ["given", "fewer"])
@pytest.mark.parametrize("rows", [1, 2, 4, 12])
def test_a_row_of_gates_for_several_tokens(gate, rows):
    assert_same(Case(gate, shape=(4, 3, 10), rows=rows), 1e-10)


def test_ranks_without_gates_are_not_used():
    case = Case("fewer")
    with torch.no_grad():
        case.A[4:], case.B[:, 4:] = torch.nan, torch.nan
    _, (y, _, dA, dB, _) = case.run(True)
    assert y.isfinite().all()
    assert not dA[4:].any()
    assert not dB[:, 4:].any()


@pytest.mark.parametrize("shape", [(3, 6), (0, 6), (10, 7), (10,)], ids=str)
def test_gates_that_do_not_fit_are_refused(shape):
    case = Case("dense", shape=(10, 10), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"for 10 tokens and 6 ranks: expected \(G, q\), q ≤ 6"):
        rank_experts(case.base, case.x, case.A, case.B, torch.rand(shape))


@KINDS
@pytest.mark.parametrize("options", [dict(conv=True), dict(bias=False)], ids=str)
def test_base_layers(gate, options):
    assert_same(Case(gate, **options), 1e-10)


@KINDS
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_adapter_on_a_narrower_base(gate, base):
    case = Case(gate, dtype=base, adapter=torch.float32)
    assert_same(case, TOLERANCE[base])
    assert case.run(True)[1][2].dtype == torch.float32


@KINDS
def test_a_narrower_adapter_on_a_float32_base(gate):
    case = Case(gate, dtype=torch.float32, adapter=torch.bfloat16)
    with torch.no_grad():
        case.layer.weight.mul_(1e3)
    assert_same(case, TOLERANCE[torch.bfloat16])
    # The base's own digits survive.
    assert not torch.equal(case.run(True)[0].y, case.run(True)[0].y.bfloat16().float())


@pytest.mark.parametrize("gate", ["token", "biased", "below zero", "given", "dense"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(gate, dtype, base):
    case = Case(gate, dtype=base, adapter=torch.float32, shape=(3, 20, 10))
    with torch.autocast("cpu", dtype=dtype):
        assert_same(case, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("gate", ["token", "blocks", "given", "fewer", "dense"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dropout_reaches_a_alone(gate, dtype):
    case = Case(gate, dtype=dtype, adapter=torch.promote_types(dtype, torch.float32))
    dropped = (case.x.detach() * torch.randint(0, 2, case.x.shape)).requires_grad_()
    assert_same(case, TOLERANCE[dtype], dropped)


@KINDS
def test_strided_inputs(gate):
    case = Case(gate, shape=(6, 7, 10))
    case.x = torch.randn(7, 6, 20, dtype=torch.float64)[..., ::2].transpose(0, 1).requires_grad_()
    case.dy = torch.randn(9, 6, 7).permute(1, 2, 0)
    case.A = torch.randn(10, len(case.A), dtype=torch.float64).t().requires_grad_()
    assert_same(case, 1e-10)


@KINDS
@pytest.mark.parametrize("frozen", ["x", "A", "B", "gate"])
@pytest.mark.parametrize("drop", [False, True])
def test_only_the_gradients_that_are_needed(gate, frozen, drop):
    case = Case(gate)
    if frozen == "gate":
        if gate == "dense":
            pytest.skip("has no gate")
        (case.gate.weight if gate == "token" else case.gate).requires_grad_(False)
    else:
        getattr(case, frozen).requires_grad_(False)
    dropped = case.x.detach().mul(2).requires_grad_(frozen != "x") if drop else None
    assert_same(case, 1e-10, dropped)


@KINDS
def test_without_gradients(gate):
    case = Case(gate)
    with torch.no_grad():
        fused = rank_experts(case.base, case.x, case.A, case.B, case.gate, scale=0.7).y
        plain = by_reference(case.base, case.x, case.A, case.B, case.gate, scale=0.7).y
    torch.testing.assert_close(fused, plain)


@pytest.mark.parametrize("gate", TOKEN)
def test_gradcheck(gate):
    case = Case(gate, shape=(40, 5), d_out=3)

    def function(x, A, B, weight):
        return rank_experts(case.base, x, A, B, case.gate._replace(weight=weight), scale=0.7).y

    # Away from ties, where the choice jumps.
    weight = torch.randn(case.gate.num_experts, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (case.x, case.A, case.B, weight), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (case.x, case.A, case.B, weight), fast_mode=True)


@pytest.mark.parametrize("gate", ["given", "fewer", "dense"])
@pytest.mark.parametrize("drop", [False, True])
def test_gradcheck_of_given_gates(gate, drop):
    case = Case(gate, shape=(2, 3, 5), d_out=3, rows=2)
    inputs = trained(case.x, case.A, case.B, case.gate)

    def function(x, A, B, gates=None):
        return rank_experts(case.base, x, A, B, gates, scale=0.7, dropped=x.sin() if drop else None).y

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("gate", ["token", "biased", "below zero", "given"])
def test_the_second_derivative_equals_the_references(gate):
    case = Case(gate)
    found = []
    for fused in (True, False):
        y = case.run(fused)[0].y
        (dx,) = torch.autograd.grad(y.square().sum(), case.x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), trained(case.x, case.A, case.B, case.gate)))
    assert_close(*found, 1e-9)


@KINDS
def test_a_second_derivative_of_a_trained_base_layer_alone(gate):
    case, found = Case(gate, dtype=torch.float64), []
    case.layer.requires_grad_(True)
    for tensor in trained(case.x, case.A, case.B, case.gate):
        tensor.requires_grad_(False)
    for function in (rank_experts, by_reference):
        y = function(base_of(case.layer), case.x, case.A, case.B, case.gate).y
        (dweight,) = torch.autograd.grad(y.square().sum(), case.layer.weight, create_graph=True)
        found.append(torch.autograd.grad(dweight.square().sum(), case.layer.weight))
    assert_close(*found, 1e-9)


@KINDS
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(gate, reentrant):
    case = Case(gate, shape=(3, 5, 10))
    plain = case.run(True)[1]
    tensors = trained(case.x, case.A, case.B, case.gate)
    y = checkpoint(
        lambda x: rank_experts(case.base, x, case.A, case.B, case.gate, scale=0.7).y, case.x, use_reentrant=reentrant
    )
    y.backward(case.dy.to(y))
    for ours, theirs in zip([y, *(tensor.grad for tensor in tensors)], plain, strict=True):
        assert torch.equal(ours, theirs)


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


def saved_bytes(case: Case, gate: TokenGate | torch.Tensor | None = None) -> int:
    """Bytes saved for backward beyond x and the parameters."""
    parameters = [*case.layer.parameters(), *(t for t in case.gate or () if isinstance(t, torch.Tensor))]
    known = {tensor.untyped_storage().data_ptr() for tensor in (case.x, case.A, case.B, *parameters)}
    found: dict[int, int] = {}
    kept: list[torch.Tensor] = []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = rank_experts(case.base, case.x, case.A, case.B, case.gate if gate is None else gate).y
    assert y.requires_grad
    return sum(found.values())


def wide_case(gate: str, r: int = 64, top_k: int = 8, dtype=torch.float32, **constants) -> Case:
    case = Case("dense", shape=(256, 128), d_out=128, dtype=dtype)
    case.gate = token_gate(128, r, top_k, dtype=dtype, **constants) if gate == "token" else None
    case.A = torch.randn(r, 128).to(dtype).requires_grad_()
    case.B = torch.randn(128, r).to(dtype).requires_grad_()
    return case


def test_what_is_saved_for_backward():
    lora = 256 * 64 * 4  # x Aᵀ
    # One byte an index, four a score and four a projection, for 8 of 64 ranks: 9/32 = 0.28.
    ours = saved_bytes(wide_case("token"))
    assert ours == lora * 9 // 32
    assert saved_bytes(wide_case("dense")) == lora
    # Of the token gate's balancing bias a copy is kept only where it enters the gates.
    assert saved_bytes(wide_case("token", biased_gates=True)) == ours + 64 * 4


def test_saved_in_sixteen_bits():
    assert saved_bytes(wide_case("token", dtype=torch.bfloat16)) == 256 * 8 * (1 + 2 + 2)


@pytest.mark.parametrize("native", [False, True])
def test_of_the_projections_those_of_used_ranks_are_saved(native, monkeypatch):
    if native and library() is None:
        pytest.skip("no C++ compiler")
    case = wide_case("dense", r=8)
    with monkeypatch.context() as patched:
        if native:
            patched.undo()
            monkeypatch.undo()
        gates = task_gates(task_gate(24, 8, [2, 3]), torch.tensor([0, 1, 1, 0]))
        assert gates.shape == (4, 3)
        assert saved_bytes(case, gates) - 256 * 3 * 4 < 512  # and the gates' few numbers


@pytest.mark.parametrize("conv", [False, True])
@KINDS
def test_the_output_may_be_changed_in_place(gate, conv):
    case = Case(gate, shape=(3, 5, 10), conv=conv)
    adapted, _ = case.run(True)
    adapted.y.mul_(2)
    found = torch.autograd.grad(adapted.y, case.x, case.dy.to(adapted.y))[0]
    torch.testing.assert_close(found, 2 * case.run(False)[1][1])


@KINDS
@pytest.mark.parametrize("shape", [(40, 10), (4, 10, 10)], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_an_output_that_is_not_fresh_is_not_overwritten(gate, shape, grad):
    case = Case(gate, shape=shape)
    watched = Watched(case.layer)
    case.base = Base(watched)
    with torch.set_grad_enabled(grad):
        y = rank_experts(case.base, case.x, case.A, case.B, case.gate).y
    if grad:
        y.sum().backward()
    watched.assert_unchanged()
    assert not torch.equal(y, watched.seen[0][0])


@KINDS
@pytest.mark.parametrize("how", ["fresh", "watched"])
def test_a_trained_base_layer_gets_its_gradients(gate, how):
    case = Case(gate, shape=(2, 20, 10))
    case.layer.requires_grad_(True)
    case.base = base_of(case.layer) if how == "fresh" else Base(Watched(case.layer))
    assert case.base.weight is None
    wanted = [*case.layer.parameters(), *trained(case.x, case.A, case.B, case.gate)]
    found = [
        torch.autograd.grad(function(case.base, case.x, case.A, case.B, case.gate).y, wanted, case.dy.double())
        for function in (rank_experts, by_reference)
    ]
    assert_close(*found, 1e-10)


@KINDS
def test_a_trained_base_layer_under_a_frozen_adapter(gate):
    case = Case(gate, shape=(2, 20, 10))
    case.layer.requires_grad_(True)
    for tensor in trained(case.x, case.A, case.B, case.gate):
        tensor.requires_grad_(False)
    rank_experts(base_of(case.layer), case.x, case.A, case.B, case.gate).y.sum().backward()
    torch.testing.assert_close(case.layer.bias.grad, torch.full((9,), 40.0, dtype=torch.float64))


def test_whatever_the_base_layer_does_is_called_and_differentiated():
    case = Case("token", shape=(40, 9), dtype=torch.float32)
    y = rank_experts(Base(lambda x: 3 * x), case.x, case.A, case.B, case.gate, scale=0.7).y
    gates = case.gate.route(case.x).gates
    expected = rank_experts_reference(3 * case.x, case.x, case.A, case.B, gates, 0.7)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(out, case.x, case.dy)[0] for out in (y, expected)), rtol=1e-4, atol=1e-4
    )


@KINDS
def test_an_output_that_is_a_parameter_is_not_overwritten(gate):
    case = Case(gate, shape=(5, 10))
    held = nn.Parameter(torch.randn(5, 9, dtype=torch.float64))
    before = held.detach().clone()
    rank_experts(Base(lambda x: held, fresh=True), case.x, case.A, case.B, case.gate).y.sum().backward()
    assert torch.equal(held, before)
    assert torch.equal(held.grad, torch.ones_like(held))


@pytest.mark.parametrize("order", [1, 2])
def test_several_adapters_add_up(order):
    one, two = Case("token"), Case("dense")
    first, second = ((one.A, one.B, one.gate), (two.A, two.B, two.gate))[:: 1 if order == 1 else -1]
    y = rank_experts(one.base, one.x, *first).y
    y = rank_experts(Base(lambda x: y, fresh=True), one.x, *second).y
    expected = by_reference(Base(lambda x: by_reference(one.base, x, *first).y), one.x, *second).y
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(out, one.x, dy)[0] for out in (y, expected)))


def test_an_input_changed_after_forward_is_noticed():
    case = Case("token")
    case.x.requires_grad_(False)
    y = rank_experts(case.base, case.x, case.A, case.B, case.gate).y
    case.x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("biased", [False, True])
def test_a_balancing_bias_may_move_between_forward_and_backward(biased):
    case = Case("biased" if biased else "token")
    expected = case.run(True)[1]
    y = rank_experts(case.base, case.x, case.A, case.B, case.gate, scale=0.7).y
    case.gate.balance_bias.add_(1)
    found = torch.autograd.grad(y, trained(case.x, case.A, case.B, case.gate), case.dy.to(y))
    for ours, theirs in zip(found, expected[1:], strict=True):
        assert torch.equal(ours, theirs)


@KINDS
def test_two_runs_agree_in_every_bit(gate):
    case = Case(gate, shape=(300, 64), d_out=64, dtype=torch.float32)
    for first, second in zip(case.run(True)[1], case.run(True)[1], strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("gate", ["token", "dense"])
def test_functional_transforms_take_the_reference(gate):
    case = Case(gate, shape=(5, 10))
    tangent, step = torch.randn(5, 10, dtype=torch.float64), 1e-6

    def function(x):
        return rank_experts(case.base, x, case.A, case.B, case.gate).y

    x = case.x.detach() + 0.01 * torch.randn(5, 10)  # away from ties
    _, ours = torch.func.jvp(function, (x,), (tangent,))
    theirs = (function(x + step * tangent) - function(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.func.vmap(function)(x[:, None])[:, 0], function(x))


@pytest.mark.parametrize("gate", ["token", "given", "dense"])
def test_a_subclass_takes_the_reference(gate):
    class Own(torch.Tensor):
        pass

    case = Case(gate, shape=(5, 10))
    y = rank_experts(case.base, case.x.detach().as_subclass(Own), case.A, case.B, case.gate).y
    assert type(y) is Own
    torch.testing.assert_close(torch.Tensor(y), rank_experts(case.base, case.x, case.A, case.B, case.gate).y)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("gate", ["token", "blocks"])
def test_the_whole_routing_where_it_is_wanted(gate, grad):
    case = Case(gate)
    with torch.set_grad_enabled(grad):
        adapted = rank_experts(case.base, case.x, case.A, case.B, case.gate, want_routing=True)
        plain = rank_experts(case.base, case.x, case.A, case.B, case.gate)
    assert plain.routing is None
    assert torch.equal(adapted.indices, plain.indices)
    torch.testing.assert_close(adapted.y, plain.y)
    for ours, theirs in zip(adapted.routing, case.gate.route(case.x), strict=True):
        assert torch.equal(ours, theirs)
    if grad:
        assert torch.autograd.grad(adapted.routing.probabilities[:, 0].sum(), case.gate.weight)[0].any()


@pytest.mark.parametrize("compiled", [False, True])
def test_task_gates_stop_at_the_last_rank_that_is_used(compiled):
    gate = task_gate(24, 8, [2, 5, 3])
    run = torch.compile(task_gates, backend="aot_eager", fullgraph=True) if compiled else task_gates
    ids = torch.tensor([2, 0, 2])
    gates, whole = run(gate, ids), gate.route(ids).gates
    assert gates.shape == ((3, 8) if compiled else (3, 3))
    assert torch.equal(gates, whole[:, : gates.shape[1]])
    ours, theirs = (torch.autograd.grad(found[:, :3].square().sum(), gate[:3]) for found in (gates, whole))
    assert_close(ours, theirs, 1e-6)


def test_the_load_of_a_gates_choice():
    case = Case("token", shape=(4, 25, 10), dtype=torch.float32)
    adapted = rank_experts(case.base, case.x, case.A, case.B, case.gate)
    indices = select_experts(case.gate.logits(case.x.reshape(-1, 10)).sigmoid() + case.gate.balance_bias, 3)
    load = load_of_output(adapted.y, adapted.indices, 12)
    assert load.sum() == 300
    assert torch.equal(load, torch.bincount(indices.flatten(), minlength=12).float())


@pytest.mark.parametrize(("native", "choice"), [(False, pytorch.NAME), (True, cpu.NAME)])
def test_the_choice_is_said_once(caplog, monkeypatch, native, choice):
    if native:
        monkeypatch.undo()
        if library() is None:
            pytest.skip("no C++ compiler")
    announce.cache_clear()
    case = wide_case("token")
    with caplog.at_level(logging.INFO, logger="rank_experts.ops"):
        for _ in range(3):
            rank_experts(case.base, case.x, case.A, case.B, case.gate)
    assert [record.message for record in caplog.records] == [f"rank_experts computes adapted layers with: {choice}"]
