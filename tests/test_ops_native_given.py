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
from rank_experts.ops import dispatch, native_given, rank_experts
from rank_experts.ops.native_build import find_compiler
from rank_experts.routing import TaskRouter, task_logits, task_routing

if find_compiler() is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

GATES = ["none", "one row", "rows", "task", "one task"]
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
    nan_in_new_buffers(monkeypatch, native_given)


def task_router(d_in, r, ranks, dtype=torch.float32, rank_scaling="task"):
    """A router whose tasks choose these ranks, unsurely."""
    router = TaskRouter(d_in, r, len(ranks), embedding_dim=24, rank_scaling=rank_scaling)
    with torch.no_grad():
        router.task_embedding[:, : len(ranks)] = torch.eye(len(ranks))
        for task, rank in enumerate(ranks):
            router.gate_weight[rank - 1, task] += 3
    return router.to(dtype)


def draw_for(dtypes):
    """Of one sign in 16 bits: the gates' gradients are sums over all tokens, whose rounding would outgrow them."""
    return torch.randn if dtypes == "float32" else torch.rand


def make(gate, dtypes="float32", shape=(4, 9, 150), d_out=141, r=8, seed=0):
    """A layer's tensors: base, x, A, B, gate, task ids."""
    torch.manual_seed(seed)
    dtype, adapter = DTYPES[dtypes]
    base = nn.Linear(shape[-1], d_out).to(dtype).requires_grad_(False)
    draw = draw_for(dtypes)
    A, B, x = draw(r, shape[-1]).to(adapter), draw(d_out, r).to(adapter), draw(shape).to(dtype)
    ids = {"task": IDS, "one task": torch.tensor([1])}.get(gate)
    gates = {"one row": torch.rand(1, r), "rows": torch.rand(4, r)}.get(gate)
    if ids is not None:
        gates = task_router(shape[-1], r, [1, min(3, r), max(r - 1, 1)], adapter)
    elif gates is not None:
        gates.requires_grad_()
    return base, x.requires_grad_(), A.requires_grad_(), B.requires_grad_(), gates, ids


def wanted_of(x, A, B, gate, dropped=None):
    """All that gets a gradient."""
    is_router = isinstance(gate, TaskRouter)
    of_gate = [gate.task_embedding, gate.gate_weight, gate.gate_bias] if is_router else [gate]
    return [t for t in (x, A, B, *of_gate, dropped) if t is not None and t.requires_grad]


def reference(base, x, A, B, gate, ids, scale=1.0, dropped=None):
    """The layer's output by the reference."""
    gates = gate(ids).gates if ids is not None else gate
    return dispatch._reference(base, x, A, B, gates, scale, dropped, None).y


def both(base, x, A, B, gate, ids, dropped=None, dy=None):
    """(output, gradients …) by the kernel and by the reference."""
    wanted, results = wanted_of(x, A, B, gate, dropped), []
    dropout = None if dropped is None else lambda x: dropped
    for y in (
        rank_experts(base, x, A, B, gate, task_ids=ids, scale=0.7, dropout=dropout).y,
        reference(base, x, A, B, gate, ids, 0.7, dropped),
    ):
        torch.manual_seed(1)
        seen = draw_for("float32" if x.dtype == A.dtype == torch.float32 else "narrow")(y.shape) if dy is None else dy
        grads = torch.autograd.grad(y, wanted, seen.to(y.dtype), retain_graph=True, materialize_grads=True)
        results.append([y, *grads])
    node = results[0][0].grad_fn
    assert type(node).__name__ == ("GivenGatesBackward" if ids is None else "TaskGatedBackward")
    assert ids is not None or node.kernels is native_given
    return results


def assert_close(ours, theirs, tolerance):
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == their.dtype
        assert our.shape == their.shape
        size = max(their.abs().max().item(), 0.05) if their.numel() else 1.0
        torch.testing.assert_close(our, their, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.usefixtures("_nan_in_new_buffers")
def test_equals_the_reference(gate, dtypes):
    assert_close(*both(*make(gate, dtypes)), TOLERANCE[dtypes])


@pytest.mark.parametrize("gate", ["none", "rows", "task"])
@pytest.mark.parametrize("shape", [(4, 1, 10), (4, 5, 129), (4, 50, 128), (4, 1), (100, 7)], ids=str)
@pytest.mark.parametrize("d_out", [1, 16, 257])
@pytest.mark.parametrize("r", [1, 5, 16])
@pytest.mark.usefixtures("_nan_in_new_buffers")
def test_shapes(gate, shape, d_out, r):
    assert_close(*both(*make(gate, shape=shape, d_out=d_out, r=r)), TOLERANCE["float32"])


@pytest.mark.parametrize("gate", ["none", "one row", "one task"])
@pytest.mark.usefixtures("_nan_in_new_buffers")
def test_no_tokens(gate):
    assert_close(*both(*make(gate, shape=(0, 10))), 0)


@pytest.mark.usefixtures("_nan_in_new_buffers")
def test_no_examples():
    base, x, A, B, router, _ = make("task", shape=(0, 3, 10))
    y = rank_experts(base, x, A, B, router, task_ids=IDS[:0]).y
    grads = torch.autograd.grad(y, wanted_of(x, A, B, router), torch.zeros_like(y))
    assert y.shape == (0, 3, 141)
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("scaling", ["none", "task", "rank"])
@pytest.mark.usefixtures("_nan_in_new_buffers")
def test_rank_scaling(scaling):
    base, x, A, B, _, ids = make("task")
    assert_close(*both(base, x, A, B, task_router(150, 8, [2, 8, 5], rank_scaling=scaling), ids), TOLERANCE["float32"])


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.usefixtures("_nan_in_new_buffers")
def test_dropout_reaches_a_alone(gate, dtypes):
    base, x, A, B, gate, ids = make(gate, dtypes)
    dropped = (x.detach() * torch.randint(0, 2, x.shape)).to(A.dtype).requires_grad_()
    assert_close(*both(base, x, A, B, gate, ids, dropped), TOLERANCE[dtypes])


@pytest.mark.parametrize("frozen", ["x", "A", "B", "gate", "all but B", "all but x", "all but gate"])
@pytest.mark.parametrize("gate", ["rows", "task"])
@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.usefixtures("_nan_in_new_buffers")
def test_only_the_gradients_that_are_needed(gate, frozen, drop):
    base, x, A, B, gate, ids = make(gate)
    tensors = dict(x=x, A=A, B=B, gate=gate)
    kept = [frozen.removeprefix("all but ")] if "but" in frozen else [name for name in tensors if name != frozen]
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in kept)
    dropped = x.detach().mul(2).requires_grad_(x.requires_grad) if drop else None
    assert_close(*both(base, x, A, B, gate, ids, dropped), TOLERANCE["float32"])


@pytest.mark.parametrize("name", ["task_embedding", "gate_weight", "gate_bias"])
def test_a_part_of_the_router_may_be_frozen(name):
    base, x, A, B, router, ids = make("task")
    getattr(router, name).requires_grad_(False)
    assert_close(*both(base, x, A, B, router, ids), TOLERANCE["float32"])


@pytest.mark.parametrize("gate", ["rows", "task"])
def test_strided_tensors(gate):
    base, _, _, _, gate, ids = make(gate, shape=(4, 6, 40), d_out=30)
    x = torch.randn(6, 4, 80)[..., ::2].transpose(0, 1).requires_grad_()
    A, B = torch.randn(40, 8).t().requires_grad_(), torch.randn(8, 30).t().requires_grad_()
    if isinstance(gate, TaskRouter):
        for name in ("task_embedding", "gate_weight"):
            setattr(gate, name, nn.Parameter(getattr(gate, name).data.t().contiguous().t()))
    else:
        gate = torch.rand(8, 4).t().requires_grad_()
    dy = torch.randn(30, 6, 4).permute(2, 1, 0)
    assert_close(*both(base, x, A, B, gate, ids, dy=dy), TOLERANCE["float32"])


@pytest.mark.parametrize("gate", GATES)
def test_an_output_that_must_not_be_overwritten(gate):
    base, *rest = make(gate)
    seen = []
    base.register_forward_hook(lambda module, args, output: seen.append((output, output.clone())))
    assert_close(*both(base, *rest), TOLERANCE["float32"])
    assert torch.equal(*seen[0])


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_the_output_may_be_changed_in_place(gate, apart):
    base, x, A, B, gate, ids = make(gate)
    base.bias.requires_grad_(apart)  # A base layer that is trained is applied apart.
    found = []
    for y in (rank_experts(base, x, A, B, gate, task_ids=ids).y, reference(base, x, A, B, gate, ids)):
        y.mul_(2).sum().backward(inputs=[x])
        found.append(x.grad)
        x.grad = None
    assert_close(*([grad] for grad in found), TOLERANCE["float32"])


@pytest.mark.parametrize("shape", [(3, 8), (0, 8), (10, 3), (10, 9)], ids=str)
def test_gates_that_do_not_fit_are_refused(shape):
    base, x, A, B, _, _ = make("none", shape=(10, 150))
    with pytest.raises(ValueError, match=r"expected \(G, 8\)"):
        rank_experts(base, x, A, B, torch.rand(shape))


@pytest.mark.parametrize("gate", GATES)
def test_without_gradients(gate):
    tensors = make(gate, "mixed")
    with torch.no_grad():
        ours = rank_experts(*tensors[:5], task_ids=tensors[5], scale=0.7).y
        assert_close([ours], [reference(*tensors, scale=0.7)], 1e-2)


@pytest.mark.parametrize("gate", ["rows", "task"])
def test_a_second_derivative(gate):
    base, x, A, B, gate, ids = make(gate, shape=(4, 2, 20))
    found = []
    for y in (rank_experts(base, x, A, B, gate, task_ids=ids).y, reference(base, x, A, B, gate, ids)):
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), wanted_of(x, A, B, gate)))
    assert_close(*found, 1e-4)


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16"])
def test_autocast(dtypes):
    base, x, A, B, router, ids = make("task", dtypes)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(*both(base, x, A, B, router, ids), 4e-2)


@pytest.mark.parametrize("scaling", ["none", "task", "rank"])
@pytest.mark.parametrize("num_ranks", [1, 2, 9, 16])
def test_the_choice_is_the_routers(num_ranks, scaling):
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 1.0, 3.0])
    bias = special[torch.randint(0, len(special), (num_ranks,))]
    gate = torch.randint(-2, 3, (50, 7)) / 4, torch.randint(-2, 3, (num_ranks, 7)) / 4, bias
    ids = torch.randint(0, 50, (90,))
    gates, used, probabilities, best = native_given.task_gates(gate, ids, scaling)
    expected = task_routing(task_logits(*gate, ids), 50, scaling)
    assert torch.equal(best + 1, expected.indices)
    assert used == expected.indices.max()
    torch.testing.assert_close(gates, expected.gates)
    torch.testing.assert_close(probabilities, expected.probabilities)


def test_a_nan_in_the_router_is_not_hidden():
    base, x, A, B, router, ids = make("task")
    with torch.no_grad():
        router.gate_bias[3] = torch.nan
    ours = rank_experts(base, x, A, B, router, task_ids=ids).y
    assert ours.isnan().all()
    assert reference(base, x, A, B, router, ids).isnan().all()


def test_a_task_that_does_not_exist():
    base, x, A, B, router, _ = make("task")
    for wrong in (3, -1):
        with pytest.raises(IndexError, match=r"expected 0…2"):
            rank_experts(base, x, A, B, router, task_ids=torch.tensor([0, wrong]))


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

sys.path.insert(0, {tests!r})
torch.set_num_threads(3)
from rank_experts.ops import native, native_build, rank_experts
if {openmp!r} == "no":
    native_build._openmp = lambda: None
import test_ops_native as token
import test_ops_native_given as given

# With fewer threads than it asks for, PyTorch's own products of bfloat16 are wrong.
for dtypes in ("float32", "bfloat16") if {openmp!r} == "no" else ("float32",):
    token.assert_close(*token.both(*token.make("token", dtypes, (300, 160))), token.NARROW[dtypes])
    base, x, A, B, router = token.make("token", dtypes, (8, 1600))
    with torch.no_grad():
        assert native.decode(base, x, A, B, router, 0.7) is not None
        ours = rank_experts(base, x, A, B, router, scale=0.7)
        token.assert_close(ours[:2], token.dispatch._reference(base, x, A, B, router, 0.7, None, None)[:2], 4e-2)
    for gate in ("none", "task"):
        given.assert_close(*given.both(*given.make(gate, dtypes, (4, 90, 150))), 10 * given.TOLERANCE[dtypes])
"""


@pytest.mark.parametrize(
    ("env", "openmp"),
    [({"OMP_THREAD_LIMIT": "1"}, "yes"), ({"OMP_DYNAMIC": "true"}, "yes"), ({}, "no")],
    ids=["limited", "dynamic", "compiled without OpenMP"],
)
def test_fewer_threads_than_asked_for_do_all_of_the_work(env, openmp, tmp_path):
    cache = {"XDG_CACHE_HOME": str(tmp_path)} if openmp == "no" else {}
    script = FEWER_THREADS.format(tests=str(Path(__file__).parent), openmp=openmp)
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | env | cache, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def nodes_of(tensors):
    return type(rank_experts(*tensors[:5], task_ids=tensors[5]).y.grad_fn).__name__


def test_a_router_that_somebody_watches_is_called():
    base, x, A, B, router, ids = make("task")
    seen = []
    router.register_forward_hook(lambda module, args, routing: seen.append(routing))
    assert nodes_of((base, x, A, B, router, ids)) == "GivenGatesBackward"
    assert len(seen) == 1


@pytest.mark.parametrize("what", ["float64", "ranks", "the router's dtypes", "a subclass of the router"])
def test_what_is_left_to_pytorch(what):
    class Own(TaskRouter):
        def forward(self, task_ids):
            return super().forward(task_ids)

    base, x, A, B, router, ids = make("task", r=17 if what == "ranks" else 8)
    if what == "float64":
        base, router = base.double(), router.double()
        x, A, B = (t.detach().double().requires_grad_() for t in (x, A, B))
    elif what == "the router's dtypes":
        router.gate_bias.data = router.gate_bias.data.bfloat16()
    elif what == "a subclass of the router":
        router.__class__ = Own
    assert nodes_of((base, x, A, B, router, ids)) == "GivenGatesBackward"
    assert_close([rank_experts(base, x, A, B, router, task_ids=ids).y], [reference(base, x, A, B, router, ids)], 1e-4)


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
    base, x, A, B, gate, ids = make(**case)
    dropped = (x.detach() * torch.randint(0, 2, x.shape)).to(A.dtype).requires_grad_() if drop else None
    assert_close(*both(base, x, A, B, gate, ids, dropped), 5 * TOLERANCE[case["dtypes"]])
