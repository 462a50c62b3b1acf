"""The native CPU kernel against the reference: outputs, every gradient, the choice, and where it steps aside."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers import nan_in_new_buffers
from rank_experts.context import Call, RoutingScope
from rank_experts.layer import AdapterSettings, RankExpertLinear
from rank_experts.ops import dispatch, load_of_output, native, rank_experts
from rank_experts.ops.native_build import find_compiler, library
from rank_experts.routing import TokenRouter, select_experts

if find_compiler() is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

GATES = {
    "token": dict(num_experts=64, top_k=8),
    "all": dict(num_experts=5, top_k=5),
    "one": dict(num_experts=7, top_k=1),
    "softmax": dict(num_experts=12, top_k=3, score_function="softmax"),
    "biased": dict(num_experts=12, top_k=3, biased_gates=True),
    "biased softmax": dict(num_experts=12, top_k=3, score_function="softmax", biased_gates=True),
    "blocks": dict(num_experts=4, top_k=2, expert_rank=3),
    "biased blocks": dict(num_experts=5, top_k=2, expert_rank=7, biased_gates=True),
    "many": dict(num_experts=256, top_k=4),
    "more than a byte": dict(num_experts=300, top_k=4),
}
# Of base layer and input, and of the adapter.
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.bfloat16, torch.float32),
    "wide": (torch.float32, torch.bfloat16),
}
NARROW = {"float32": 2e-5, "mixed": 1e-2, "bfloat16": 4e-2, "wide": 4e-2}


@pytest.fixture(autouse=True)
def _native_wherever_it_can(monkeypatch):
    monkeypatch.setattr(native, "pays", lambda top_k, num_experts: True)
    assert library() is not None


@pytest.fixture
def _nan_in_new_buffers(monkeypatch):
    nan_in_new_buffers(monkeypatch, native)


def make(gate, dtypes="float32", shape=(37, 150), d_out=141, seed=0):
    """A layer's tensors, with whole numbers for x and W_g, so that every path computes the same logits."""
    torch.manual_seed(seed)
    dtype, adapter = DTYPES[dtypes]
    router = TokenRouter(shape[-1], **(GATES[gate] if isinstance(gate, str) else gate)).to(adapter)
    r = router.num_experts * router.expert_rank
    with torch.no_grad():
        router.weight.copy_(torch.randint(-4, 5, router.weight.shape) / 32)
        router.balance_bias.copy_(torch.randint(0, 5, router.balance_bias.shape) / 64 + 0.25)
    base = nn.Linear(shape[-1], d_out).to(dtype).requires_grad_(False)
    A, B = torch.randn(r, shape[-1]).to(adapter), torch.randn(d_out, r).to(adapter)
    x = (torch.randint(-8, 9, shape) / 4).to(dtype)
    return base, x.requires_grad_(), A.requires_grad_(), B.requires_grad_(), router


def both(base, x, A, B, router, dropped=None, dy=None):
    """(output, indices, gradients …) by the kernel and by the reference."""
    wanted = [t for t in (x, A, B, router.weight, dropped) if t is not None and t.requires_grad]
    dropout = None if dropped is None else lambda x: dropped
    results = []
    for adapted in (
        rank_experts(base, x, A, B, router, scale=0.7, dropout=dropout),
        dispatch._reference(base, x, A, B, router, 0.7, dropped, None),
    ):
        torch.manual_seed(1)
        seen = torch.randn(adapted.y.shape) if dy is None else dy
        grads = torch.autograd.grad(adapted.y, wanted, seen.to(adapted.y.dtype), retain_graph=True)
        results.append([adapted.y, adapted.indices, *grads])
    ours, theirs = results
    node = ours[0].grad_fn
    assert type(node).__name__ == "TokenGatedBackward"
    assert node.kernels is native
    return ours, theirs


def assert_close(ours, theirs, tolerance):
    assert torch.equal(ours[1], theirs[1])
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == their.dtype
        assert our.shape == their.shape
        if our.is_floating_point():
            size = max(their.abs().max().item(), 0.05) if their.numel() else 1.0
            torch.testing.assert_close(our, their, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.usefixtures("_nan_in_new_buffers")
def test_equals_the_reference(gate, dtypes):
    assert_close(*both(*make(gate, dtypes)), NARROW[dtypes])


@pytest.mark.parametrize("gate", ["token", "blocks"])
@pytest.mark.parametrize("shape", [(0, 10), (1, 10), (3, 5, 10), (2, 50, 128), (1, 1, 1), (40, 129)], ids=str)
@pytest.mark.parametrize("d_out", [1, 16, 257])
@pytest.mark.usefixtures("_nan_in_new_buffers")
def test_shapes(gate, shape, d_out):
    assert_close(*both(*make(gate, shape=shape, d_out=d_out)), 2e-5)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.usefixtures("_nan_in_new_buffers")
def test_dropout_reaches_a_alone(dtypes):
    base, x, A, B, router = make("blocks", dtypes)
    dropped = (x.detach() * torch.randint(0, 2, x.shape)).to(A.dtype).requires_grad_()
    assert_close(*both(base, x, A, B, router, dropped), NARROW[dtypes])


@pytest.mark.parametrize("frozen", ["x", "A", "B", "weight", "all but B", "all but x"])
@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.usefixtures("_nan_in_new_buffers")
def test_only_the_gradients_that_are_needed(frozen, drop):
    base, x, A, B, router = make("token")
    tensors = dict(x=x, A=A, B=B, weight=router.weight)
    kept = [frozen.removeprefix("all but ")] if "but" in frozen else [name for name in tensors if name != frozen]
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in kept)
    dropped = x.detach().mul(2).requires_grad_(x.requires_grad) if drop else None
    assert_close(*both(base, x, A, B, router, dropped), 2e-5)


@pytest.mark.parametrize("num_tokens", [16, 37])
def test_bfloat16_is_rounded_to_nearest(num_tokens):
    base, x, A, B, router = make("token", "mixed", (num_tokens, 150))
    with torch.no_grad():
        ours = rank_experts(base, x, A, B, router).y
        theirs = dispatch._reference(base, x, A, B, router, 1.0, None, None).y
    assert (ours == theirs).float().mean() > 0.95


def test_strided_tensors():
    base, _, A, _, router = make("token", shape=(1, 40), d_out=30)
    x = (torch.randint(-8, 9, (7, 6, 80)) / 4)[..., ::2].transpose(0, 1).requires_grad_()
    A = torch.randn(40, len(A)).t().requires_grad_()
    B = torch.randn(len(A), 30).t().requires_grad_()
    assert_close(*both(base, x, A, B, router, dy=torch.randn(30, 6, 7).permute(1, 2, 0)), 2e-5)


def test_an_output_that_must_not_be_overwritten():
    base, x, A, B, router = make("token")
    seen = []
    base.register_forward_hook(lambda module, args, output: seen.append((output, output.clone())))
    assert_close(*both(base, x, A, B, router), 2e-5)
    assert torch.equal(*seen[0])


@pytest.mark.parametrize("apart", [False, True])
def test_the_output_may_be_changed_in_place(apart):
    base, x, A, B, router = make("token", shape=(4, 9, 150))
    base.bias.requires_grad_(apart)  # A base layer that is trained is applied apart.
    found = []
    for adapted in (
        rank_experts(base, x, A, B, router),
        dispatch._reference(base, x, A, B, router, 1.0, None, None),
    ):
        adapted.y.mul_(2).sum().backward(inputs=[x])
        found.append([adapted.y, adapted.indices, x.grad])
        x.grad = None
    assert_close(*found, 2e-5)


def test_a_second_derivative():
    base, x, A, B, router = make("token", shape=(9, 20))
    found = []
    for adapted in (
        rank_experts(base, x, A, B, router, scale=0.7),
        dispatch._reference(base, x, A, B, router, 0.7, None, None),
    ):
        (dx,) = torch.autograd.grad(adapted.y.square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), (x, A, B, router.weight)))
    for our, their in zip(*found, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-4 * their.abs().max().item())


@pytest.mark.parametrize("num_experts", [2, 9, 64, 256, 300])
def test_ties_and_signs_are_bit_for_bit_the_routers_choice(num_experts, monkeypatch):
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45])
    keys = special[torch.randint(0, len(special), (200, num_experts))]
    negative_nan = torch.tensor([-4194304], dtype=torch.int32).view(torch.float32)
    keys = torch.where(keys.isnan() & (torch.rand(keys.shape) < 0.5), negative_nan, keys)
    monkeypatch.setattr(native, "selection_keys", lambda *args: keys)
    for top_k in {1, num_experts // 2, num_experts}:
        tensors = make(dict(num_experts=num_experts, top_k=top_k), shape=(200, 8), d_out=8)
        assert torch.equal(rank_experts(*tensors).indices, select_experts(keys, top_k))


@pytest.mark.parametrize("num_tokens", [3, 100])
def test_nans(num_tokens):
    base, x, A, B, router = make(dict(num_experts=20, top_k=6, score_function="softmax"), shape=(num_tokens, 20))
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, -torch.nan])
    with torch.no_grad():
        router.weight.copy_(torch.eye(20))
        router.balance_bias.zero_()
        x.copy_(torch.randint(-1, 2, x.shape))
        x[1::2, 7] = special[torch.randint(6, 8, x[1::2, 7].shape)]
    ours = rank_experts(base, x, A, B, router)
    theirs = dispatch._reference(base, x, A, B, router, 1.0, None, None)
    assert torch.equal(ours.indices, theirs.indices)
    assert torch.equal(ours.y.isnan(), theirs.y.isnan())
    assert ours.y[1::2].isnan().all()
    assert ours.y[::2].isfinite().all()


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [-300.0, 300.0])
def test_a_saturated_router_gives_finite_gates(value, dtypes):
    base, x, A, B, router = make("token", dtypes)
    with torch.no_grad():
        router.weight.fill_(value)
        router.balance_bias.zero_()
        x.copy_(x.abs() + 1)
    ours, theirs = both(base, x, A, B, router)
    assert all(result.isfinite().all() for result in ours)
    assert_close(ours[:2], theirs[:2], 5 * NARROW[dtypes])


@pytest.mark.parametrize("logit", [-80.0, -9.0, -0.625, -0.375, 0.0, 0.375, 3.0, 12.0])
def test_the_routers_gradient_is_exact_for_sure_and_unsure_scores(logit):
    base, x, A, B, router = make("token")
    with torch.no_grad():
        x[:, 0] = 1.0
        router.weight[:, 1:] /= 256
        router.weight[:, 0] = logit
        router.balance_bias.fill_(0.0)
    ours, theirs = both(base, x, A, B, router)
    assert torch.equal(ours[1], theirs[1])
    torch.testing.assert_close(ours[-1], theirs[-1], rtol=1e-3, atol=1e-4 * theirs[-1].abs().max().item())


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("num_tokens", [1, 3, 6, 16])
def test_a_few_tokens_without_gradients(gate, num_tokens, dtypes):
    base, x, A, B, router = make(gate, dtypes, (num_tokens, 67), 45)
    with torch.no_grad():
        router.balance_bias.fill_(0.25)  # The same for all: the kernel's own sigmoid may differ in the last bit.
        assert native.decode(base, x, A, B, router, 0.7) is not None
        ours = rank_experts(base, x, A, B, router, scale=0.7)
        theirs = dispatch._reference(base, x, A, B, router, 0.7, None, None)
    assert_close(ours[:2], theirs[:2], NARROW[dtypes])


@pytest.mark.parametrize("strided", ["x", "A", "B", "weight"])
def test_a_few_strided_tokens_without_gradients(strided):
    base, x, A, B, router = make("token", shape=(6, 40), d_out=40)
    tensors = {name: tensor.detach() for name, tensor in dict(x=x, A=A, B=B, weight=router.weight).items()}
    tensors[strided] = tensors[strided].t().contiguous().t()
    router.weight = nn.Parameter(tensors.pop("weight"))
    with torch.no_grad():
        ours = rank_experts(base, **tensors, gate=router)
        theirs = dispatch._reference(base, *tensors.values(), router, 1.0, None, None)
    assert_close(ours[:2], theirs[:2], 2e-5)


def test_a_few_tokens_of_a_subclass_are_left_to_it():
    class Own(torch.Tensor):
        pass

    base, x, A, B, router = make("token", shape=(6, 40))
    with torch.no_grad():
        assert native.decode(base, x.detach(), A, B, router, 0.7) is not None
        assert native.decode(base, x.detach().as_subclass(Own), A, B, router, 0.7) is None


def layer_with_two_adapters():
    torch.manual_seed(0)
    layer = RankExpertLinear(nn.Linear(40, 33), path="proj", scope=RoutingScope())
    for name, alpha in (("default", 3.0), ("other", 5.0)):
        router = TokenRouter(40, 8, top_k=2)
        layer.add_adapter(name, 8, AdapterSettings(alpha=alpha), router, dropout=0.5, init_weights=False)
    layer.set_adapter(["default"])
    return layer.eval().requires_grad_(False)


CHANGES = {
    "A in place": lambda layer: layer.rank_expert_A["default"].mul_(2),
    "A's data": lambda layer: setattr(layer.rank_expert_A["default"], "data", torch.randn(8, 40)),
    "another B": lambda layer: layer.rank_expert_B.update({"default": torch.randn(33, 8)}),
    "the router": lambda layer: layer.rank_expert_router["default"].weight.neg_(),
    "the bias": lambda layer: layer.rank_expert_router["default"].balance_bias.copy_(torch.arange(8.0)),
    "the base layer": lambda layer: setattr(layer, "base_layer", nn.Linear(40, 33)),
    "another adapter": lambda layer: layer.set_adapter(["other"]),
    "two adapters": lambda layer: layer.set_adapter(["default", "other"]),
    "adapters off": lambda layer: layer.enable_adapters(False),
    "bfloat16": lambda layer: setattr(
        layer.rank_expert_B["default"], "data", layer.rank_expert_B["default"].bfloat16()
    ),
    "base hook": lambda layer: layer.base_layer.register_forward_hook(lambda module, args, y: y + 1),
    "base pre-hook": lambda layer: layer.base_layer.register_forward_pre_hook(lambda module, args: args[0] * 2),
    "base forward": lambda layer: setattr(layer.base_layer, "forward", lambda x: torch.ones(*x.shape[:-1], 33)),
    "every module's hook": lambda layer: nn.modules.module.register_module_forward_hook(
        lambda module, args, y: y * 2 if isinstance(module, nn.Linear) else None
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_few_tokens_see_every_change(change, monkeypatch):
    layer, x = layer_with_two_adapters(), torch.randn(2, 3, 40)
    with torch.no_grad():
        before = layer(x)
        handle = CHANGES[change](layer)
        try:
            ours = layer(x)
            monkeypatch.setattr(native, "supports", lambda *args: False)
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
        layer.rank_expert_dropout.train()
        assert not torch.allclose(layer(x), plain)
        traced = torch.jit.trace(layer.eval(), x)
        torch.testing.assert_close(traced(x[:2]), plain[:2])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_load_of_tokens_that_count(dtype, masked):
    y, indices = torch.randn(6, 10, 7, dtype=dtype), torch.stack([torch.randperm(9)[:4] for _ in range(60)])
    y[1, 3:6] = torch.nan
    mask = torch.rand(60) < 0.5 if masked else None
    counts = ~y.flatten(0, 1)[:, 0].isnan() & (mask if masked else torch.tensor(True))
    expected = torch.bincount(indices[counts].flatten(), minlength=9).float()
    assert (native.count_load(y, indices, 9, mask) is None) == (dtype == torch.float64)
    for strided in (y, y.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(load_of_output(strided, indices, 9, mask), expected)
    assert not load_of_output(y[:0], indices[:0], 9).any()


@pytest.mark.parametrize("num_tokens", [5, 300])
def test_two_runs_agree_in_every_bit_and_threads_in_most(num_tokens):
    tensors = make("token", shape=(num_tokens, 700), d_out=300)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 1, 3, 3):
            torch.set_num_threads(threads)
            runs.append(both(*tensors)[0])
            with torch.no_grad():
                runs[-1].append(rank_experts(*tensors).y)
    finally:
        torch.set_num_threads(before)
    for first, second in ((runs[0], runs[1]), (runs[2], runs[3])):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert_close(runs[0], runs[2], 2e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_dtypes_are_left_to_pytorch(dtype):
    base, x, A, B, router = make("token")
    tensors = [t.detach().to(dtype).requires_grad_() for t in (x, A, B)]
    y = rank_experts(base.to(dtype), *tensors, router.to(dtype)).y
    assert y.grad_fn.kernels is not native


def test_many_active_experts_are_left_to_pytorch(monkeypatch):
    monkeypatch.undo()
    base, x, A, B, router = make(dict(num_experts=8, top_k=4))
    assert rank_experts(base, x, A, B, router).y.grad_fn.kernels is not native


@st.composite
def layers(draw):
    num_experts = draw(st.integers(1, 40))
    return dict(
        num_tokens=draw(st.one_of(st.integers(0, 3), st.integers(30, 70))),
        d_in=draw(st.integers(1, 300)),
        d_out=draw(st.integers(1, 300)),
        gate=dict(
            num_experts=num_experts,
            expert_rank=draw(st.integers(1, 4)),
            top_k=draw(st.integers(1, num_experts)),
            score_function=draw(st.sampled_from(["sigmoid", "softmax"])),
            biased_gates=draw(st.booleans()),
        ),
        dtypes=draw(st.sampled_from(list(DTYPES))),
        drop=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )


@settings(max_examples=120, deadline=None, derandomize=True)
@given(layers())
def test_whatever_hypothesis_thinks_of(case):
    shape = (case["num_tokens"], case["d_in"])
    base, x, A, B, router = make(case["gate"], case["dtypes"], shape, case["d_out"], case["seed"])
    dropped = (x.detach() * torch.randint(0, 2, x.shape)).to(A.dtype).requires_grad_() if case["drop"] else None
    before = native.pays
    native.pays = lambda *_: True
    try:
        assert_close(*both(base, x, A, B, router, dropped), 5 * NARROW[case["dtypes"]])
    finally:
        native.pays = before


@pytest.mark.parametrize("shape", [(1, 32, 1), (37, 64, 5), (96, 160, 64), (33, 96, 300), (20, 33, 7)], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_the_routers_product_of_bfloat16(shape, threads):
    num_tokens, d, num_experts = shape
    x, weight = torch.randn(num_tokens, d).bfloat16(), torch.randn(num_experts, d).bfloat16()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        ours = native.router_logits(x, weight)
        product = x @ weight.t()  # PyTorch's own use of the processor's matrix unit, in between and after
        assert torch.equal(ours, native.router_logits(x, weight))
        assert torch.equal(product, x @ weight.t())
    finally:
        torch.set_num_threads(before)
    exact = x.double() @ weight.double().t()
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())
