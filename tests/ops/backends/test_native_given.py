"""The native CPU kernel with given gates and with MoRE's, against the reference: outputs, gradients, and refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers import nan_in_new_buffers
from ops.cases import Watched, assert_close, base_of, by_reference, task_gate, trained
from rank_experts.ops import Base, rank_experts, task_gates
from rank_experts.ops.backends import cpu, pytorch
from rank_experts.ops.backends.cpu import given as kernel
from rank_experts.ops.backends.cpu import tasks
from rank_experts.ops.backends.cpu.build import find_compiler
from rank_experts.routing import TaskGate

if find_compiler() is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

GATES = ["none", "one row", "rows", "fewer", "task", "one task"]
# Of base layer and input, and of the adapter.
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.bfloat16, torch.float32),
    "wide": (torch.float32, torch.bfloat16),
}
TOLERANCE = {"float32": 1e-4, "mixed": 1e-2, "bfloat16": 4e-2, "wide": 4e-2}
IDS = torch.tensor([2, 0, 2, 1])


@pytest.fixture
def _nan_in_new_buffers(monkeypatch):
    for module in (kernel, tasks):
        nan_in_new_buffers(monkeypatch, module)


def draw_for(dtypes):
    """Of one sign in 16 bits: the gates' gradients are sums over all tokens, whose rounding would outgrow them."""
    return torch.randn if dtypes == "float32" else torch.rand


def make(gate, dtypes="float32", shape=(4, 9, 150), d_out=141, r=8, seed=0):
    """A layer's tensors: base, x, A, B, and None, gates, or a task gate and its ids."""
    torch.manual_seed(seed)
    dtype, adapter = DTYPES[dtypes]
    base = nn.Linear(shape[-1], d_out).to(dtype).requires_grad_(False)
    draw = draw_for(dtypes)
    A, B, x = draw(r, shape[-1]).to(adapter), draw(d_out, r).to(adapter), draw(shape).to(dtype)
    ids = {"task": IDS, "one task": torch.tensor([1])}.get(gate)
    sizes = {"one row": (1, r), "rows": (4, r), "fewer": (4, max(r - 2, 1))}
    gates = torch.rand(sizes[gate]).requires_grad_() if gate in sizes else None
    if ids is not None:
        gates = task_gate(24, r, [1, min(3, r), max(r - 1, 1)], adapter), ids
    return base, x.requires_grad_(), A.requires_grad_(), B.requires_grad_(), gates


def by_kernel(base, x, A, B, gate, scale=1.0, dropped=None):
    """The layer's output by the op."""
    gates = task_gates(*gate) if isinstance(gate, tuple) else gate
    return rank_experts(base_of(base), x, A, B, gates, scale=scale, dropped=dropped).y


def reference(base, x, A, B, gate, scale=1.0, dropped=None):
    """The layer's output by the formula."""
    gates = gate[0].route(gate[1]).gates if isinstance(gate, tuple) else gate
    return by_reference(base_of(base), x, A, B, gates, scale=scale, dropped=dropped).y


def wanted_of(x, A, B, gate, dropped=None):
    """All that gets a gradient."""
    return trained(x, A, B, gate[0] if isinstance(gate, tuple) else gate, dropped)


def both(base, x, A, B, gate, dropped=None, dy=None):
    """(output, gradients …) by the kernel and by the reference."""
    wanted, results = wanted_of(x, A, B, gate, dropped), []
    for function in (by_kernel, reference):
        y = function(base, x, A, B, gate, 0.7, dropped)
        torch.manual_seed(1)
        seen = draw_for("float32" if x.dtype == A.dtype == torch.float32 else "narrow")(y.shape) if dy is None else dy
        grads = torch.autograd.grad(y, wanted, seen.to(y.dtype), retain_graph=True, materialize_grads=True)
        results.append([y, *grads])
    assert results[0][0].grad_fn.backend is cpu
    return results


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.usefixtures("_nan_in_new_buffers")
def test_equals_the_reference(gate, dtypes):
    assert_close(*both(*make(gate, dtypes)), TOLERANCE[dtypes])


@pytest.mark.parametrize("gate", ["none", "rows", "fewer", "task"])
@pytest.mark.parametrize("shape", [(4, 1, 10), (4, 5, 129), (4, 50, 128), (4, 1), (100, 7)], ids=str)
@pytest.mark.parametrize("d_out", [1, 16, 257])
@pytest.mark.parametrize("r", [1, 5, 16])
@pytest.mark.usefixtures("_nan_in_new_buffers")
def test_shapes(gate, shape, d_out, r):
    assert_close(*both(*make(gate, shape=shape, d_out=d_out, r=r)), TOLERANCE["float32"])


@pytest.mark.usefixtures("_nan_in_new_buffers")
def test_few_used_ranks_of_many():
    base, x, A, B, _ = make("none", r=40)
    assert_close(*both(base, x, A, B, torch.rand(4, 10).requires_grad_()), TOLERANCE["float32"])
    assert rank_experts(base_of(base), x, A, B, torch.rand(4, 17)).y.grad_fn.backend is pytorch


@pytest.mark.parametrize("gate", ["none", "one row", "one task"])
@pytest.mark.usefixtures("_nan_in_new_buffers")
def test_no_tokens(gate):
    assert_close(*both(*make(gate, shape=(0, 10))), 0)


@pytest.mark.usefixtures("_nan_in_new_buffers")
def test_no_examples():
    base, x, A, B, (gate, _) = make("task", shape=(0, 3, 10))
    y = by_kernel(base, x, A, B, (gate, IDS[:0]))
    grads = torch.autograd.grad(y, trained(x, A, B, gate), torch.zeros_like(y))
    assert y.shape == (0, 3, 141)
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("scaling", ["none", "linear", "quadratic"])
@pytest.mark.usefixtures("_nan_in_new_buffers")
def test_rank_scaling(scaling):
    base, x, A, B, (_, ids) = make("task")
    gate = task_gate(24, 8, [2, 8, 5], rank_scaling=scaling)
    assert_close(*both(base, x, A, B, (gate, ids)), TOLERANCE["float32"])


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.usefixtures("_nan_in_new_buffers")
def test_dropout_reaches_a_alone(gate, dtypes):
    base, x, A, B, gate = make(gate, dtypes)
    dropped = (x.detach() * torch.randint(0, 2, x.shape)).to(A.dtype).requires_grad_()
    assert_close(*both(base, x, A, B, gate, dropped), TOLERANCE[dtypes])


@pytest.mark.parametrize("frozen", ["x", "A", "B", "gate", "all but B", "all but x", "all but gate"])
@pytest.mark.parametrize("gate", ["rows", "task"])
@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.usefixtures("_nan_in_new_buffers")
def test_only_the_gradients_that_are_needed(gate, frozen, drop):
    base, x, A, B, gate = make(gate)
    tensors = dict(x=[x], A=[A], B=[B], gate=trained(gate[0] if isinstance(gate, tuple) else gate))
    kept = [frozen.removeprefix("all but ")] if "but" in frozen else [name for name in tensors if name != frozen]
    for name, each in tensors.items():
        for tensor in each:
            tensor.requires_grad_(name in kept)
    dropped = x.detach().mul(2).requires_grad_(x.requires_grad) if drop else None
    assert_close(*both(base, x, A, B, gate, dropped), TOLERANCE["float32"])


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_part_of_the_gate_may_be_frozen(part):
    base, x, A, B, (gate, ids) = make("task")
    gate[part].requires_grad_(False)
    assert_close(*both(base, x, A, B, (gate, ids)), TOLERANCE["float32"])


@pytest.mark.parametrize("gate", ["rows", "task"])
def test_strided_tensors(gate):
    base, _, _, _, gate = make(gate, shape=(4, 6, 40), d_out=30)
    x = torch.randn(6, 4, 80)[..., ::2].transpose(0, 1).requires_grad_()
    A, B = torch.randn(40, 8).t().requires_grad_(), torch.randn(8, 30).t().requires_grad_()
    if isinstance(gate, tuple):
        strided = (each.detach().t().contiguous().t().requires_grad_() for each in gate[0][:2])
        gate = TaskGate(*strided, gate[0].bias), gate[1]
    else:
        gate = torch.rand(8, 4).t().requires_grad_()
    dy = torch.randn(30, 6, 4).permute(2, 1, 0)
    assert_close(*both(base, x, A, B, gate, dy=dy), TOLERANCE["float32"])


@pytest.mark.parametrize("gate", GATES)
def test_an_output_that_must_not_be_overwritten(gate):
    base, x, A, B, gate = make(gate)
    watched = Watched(base)
    gates = task_gates(*gate) if isinstance(gate, tuple) else gate
    y = rank_experts(Base(watched), x, A, B, gates).y
    theirs = reference(base, x, A, B, gate)
    wanted = wanted_of(x, A, B, gate)
    assert_close(
        [y, *torch.autograd.grad(y.sum(), wanted)],
        [theirs, *torch.autograd.grad(theirs.sum(), wanted)],
        TOLERANCE["float32"],
    )
    with torch.no_grad():
        rank_experts(Base(watched), x, A, B, gates)
    watched.assert_unchanged()


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_the_output_may_be_changed_in_place(gate, apart):
    base, x, A, B, gate = make(gate)
    base.bias.requires_grad_(apart)  # A base layer that is trained is applied apart.
    found = []
    for function in (by_kernel, reference):
        function(base, x, A, B, gate).mul_(2).sum().backward(inputs=[x])
        found.append(x.grad)
        x.grad = None
    assert_close(*([grad] for grad in found), TOLERANCE["float32"])


@pytest.mark.parametrize("shape", [(3, 8), (0, 8), (10, 9)], ids=str)
def test_gates_that_do_not_fit_are_refused(shape):
    base, x, A, B, _ = make("none", shape=(10, 150))
    with pytest.raises(ValueError, match=r"expected \(G, q\), q ≤ 8"):
        rank_experts(base_of(base), x, A, B, torch.rand(shape))


@pytest.mark.parametrize("gate", GATES)
def test_without_gradients(gate):
    tensors = make(gate, "mixed")
    with torch.no_grad():
        assert_close([by_kernel(*tensors, scale=0.7)], [reference(*tensors, scale=0.7)], 1e-2)


@pytest.mark.parametrize("gate", ["rows", "fewer", "task"])
def test_a_second_derivative(gate):
    base, x, A, B, gate = make(gate, shape=(4, 2, 20))
    found = []
    for function in (by_kernel, reference):
        (dx,) = torch.autograd.grad(function(base, x, A, B, gate).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), wanted_of(x, A, B, gate)))
    assert_close(*found, 1e-4)


def test_a_second_derivative_through_the_task_gate_alone():
    gate, found = task_gate(24, 8, [2, 5, 3]), []
    for gates in (task_gates(gate, IDS), gate.route(IDS).gates[:, :5]):
        first = torch.autograd.grad(gates.square().sum(), gate[:3], create_graph=True)
        found.append(torch.autograd.grad(sum(each.square().sum() for each in first), gate[:3]))
    assert_close(*found, 1e-4)


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16"])
def test_autocast(dtypes):
    tensors = make("task", dtypes)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(*both(*tensors), 4e-2)


@pytest.mark.parametrize("scaling", ["none", "linear", "quadratic"])
@pytest.mark.parametrize("num_ranks", [1, 2, 9, 16])
def test_the_choice_is_the_gates(num_ranks, scaling):
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 1.0, 3.0])
    bias = special[torch.randint(0, len(special), (num_ranks,))]
    gate = TaskGate(torch.randint(-2, 3, (50, 7)) / 4, torch.randint(-2, 3, (num_ranks, 7)) / 4, bias, scaling)
    ids = torch.randint(0, 50, (90,))
    gates, probabilities, best = tasks.task_gates(gate, ids)
    expected = gate.route(ids)
    assert torch.equal(best + 1, expected.indices)
    assert gates.shape[1] == expected.indices.max()
    torch.testing.assert_close(gates, expected.gates[:, : gates.shape[1]])
    torch.testing.assert_close(probabilities, expected.probabilities)


def test_a_nan_in_the_gate_is_not_hidden():
    base, x, A, B, gate = make("task")
    with torch.no_grad():
        gate[0].bias[3] = torch.nan
    assert by_kernel(base, x, A, B, gate).isnan().all()
    assert reference(base, x, A, B, gate).isnan().all()


def test_a_task_that_does_not_exist():
    gate = task_gate(24, 8, [1, 2, 3])
    for wrong in (3, -1):
        with pytest.raises(IndexError, match=r"expected 0…2"):
            task_gates(gate, torch.tensor([0, wrong]))


@pytest.mark.parametrize("gate", ["rows", "task"])
@pytest.mark.parametrize("num_tokens", [5, 300])
def test_two_runs_agree_in_every_bit_and_threads_in_most(gate, num_tokens):
    tensors = make(gate, shape=(4, num_tokens, 300))
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 1, 3, 3):
            torch.set_num_threads(threads)
            runs.append(both(*tensors)[0])
    finally:
        torch.set_num_threads(before)
    for first, second in ((runs[0], runs[1]), (runs[2], runs[3])):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert_close(runs[0], runs[2], TOLERANCE["float32"])


FEWER_THREADS = """
import sys
import torch

sys.path[:0] = {tests!r}
torch.set_num_threads(3)
from ops.cases import assert_close, base_of, by_reference
from rank_experts.ops import rank_experts
from rank_experts.ops.backends.cpu import build
if {openmp!r} == "no":
    build._openmp = lambda: None
import test_native_token as token
import test_native_given as given

# With fewer threads than it asks for, PyTorch's own products of bfloat16 are wrong.
for dtypes in ("float32", "bfloat16") if {openmp!r} == "no" else ("float32",):
    assert_close(*token.both(*token.make("token", dtypes, (300, 160))), token.NARROW[dtypes])
    base, *tensors = token.make("token", dtypes, (8, 1600))
    with torch.no_grad():
        assert token.decoded(base, *tensors) is not None
        assert_close(*(f(base_of(base), *tensors)[:2] for f in (rank_experts, by_reference)), 4e-2)
    for gate in ("none", "task"):
        assert_close(*given.both(*given.make(gate, dtypes, (4, 90, 150))), 10 * given.TOLERANCE[dtypes])
"""


@pytest.mark.parametrize(
    ("env", "openmp"),
    [({"OMP_THREAD_LIMIT": "1"}, "yes"), ({"OMP_DYNAMIC": "true"}, "yes"), ({}, "no")],
    ids=["limited", "dynamic", "compiled without OpenMP"],
)
def test_fewer_threads_than_asked_for_do_all_of_the_work(env, openmp, tmp_path):
    cache = {"XDG_CACHE_HOME": str(tmp_path)} if openmp == "no" else {}
    here = Path(__file__).parent
    script = FEWER_THREADS.format(tests=[str(here), str(here.parents[1])], openmp=openmp)
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | env | cache, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("what", ["float64", "ranks", "the gate's dtypes", "a subclass"])
def test_what_is_left_to_pytorch(what):
    class Own(torch.Tensor):
        pass

    base, x, A, B, (gate, ids) = make("task", r=17 if what == "ranks" else 8)
    if what == "ranks":
        gate = task_gate(24, 17, [1, 17, 3])
    elif what == "float64":
        base = base.double()
        x, A, B, *parts = (t.detach().double().requires_grad_() for t in (x, A, B, *gate[:3]))
        gate = TaskGate(*parts)
    elif what == "the gate's dtypes":
        gate = gate._replace(bias=gate.bias.detach().bfloat16())
    else:
        gate = gate._replace(bias=gate.bias.detach().as_subclass(Own))
    assert not cpu.serves_task_gate(gate)
    y = by_kernel(base, x, A, B, (gate, ids))
    if what in ("float64", "ranks"):
        assert y.grad_fn.backend is pytorch
    assert_close([y], [reference(base, x, A, B, (gate, ids))], 1e-4)


@st.composite
def cases(draw):
    return dict(
        gate=draw(st.sampled_from(GATES)),
        dtypes=draw(st.sampled_from(list(DTYPES))),
        shape=(4, draw(st.one_of(st.integers(1, 3), st.integers(20, 40))), draw(st.integers(1, 300))),
        d_out=draw(st.integers(1, 300)),
        r=draw(st.integers(1, 16)),
        seed=draw(st.integers(0, 2**20)),
        drop=draw(st.booleans()),
    )


@settings(max_examples=120, deadline=None, derandomize=True)
@given(cases())
def test_whatever_hypothesis_thinks_of(case):
    drop = case.pop("drop")
    base, x, A, B, gate = make(**case)
    dropped = (x.detach() * torch.randint(0, 2, x.shape)).to(A.dtype).requires_grad_() if drop else None
    assert_close(*both(base, x, A, B, gate, dropped), 5 * TOLERANCE[case["dtypes"]])
