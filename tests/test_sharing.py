"""Layers that read one tensor compute their products with it together, and nobody can tell but by the clock."""

from __future__ import annotations

import copy
import gc
import logging
import weakref

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import models
from gates import GATES, batch, config
from helpers import assert_same_gradients, dense_config, gradients, token_config
from rank_experts import RankExpertConfig, inject_rank_experts, save_rank_experts, use_task
from rank_experts.model import adapted_layers
from rank_experts.ops import dispatch, native, native_given

D = 16


@pytest.fixture(autouse=True)
def projected(monkeypatch):
    """The number of matrices in each joint product; the native kernel, which shares nothing, is out of the way."""
    monkeypatch.setattr(native, "supports", lambda *args: False)
    monkeypatch.setattr(native_given, "supports", lambda *args: False)
    for name in ("_SHARED_TOKENS", "_SHARED_TOKENS_OTHERWISE"):
        monkeypatch.setattr(dispatch, name, 33)
    counts: list[int] = []

    def project(x, matrices, dtype):
        counts.append(len(matrices))
        return original(x, matrices, dtype)

    original = dispatch.project
    monkeypatch.setattr(dispatch, "project", project)
    return counts


class Block(nn.Module):
    """q, k and v read one tensor, o another; what happens between them is up to the test."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(D, D)
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.between = lambda x: x

    def body(self, x):
        h = self.first(x).tanh()
        q = self.q(h)
        h = self.between(h)
        return self.o(q * self.k(h) + self.v(h))

    def forward(self, x):
        return self.body(x)


def block(share=True, make=token_config, module=Block, **kwargs):
    torch.manual_seed(1)
    model = module()
    options = dict(target_modules=["q", "k", "v", "o"], r=8, share_inputs=share) | kwargs
    inject_rank_experts(model, make(**(options | ({"top_k": 3} if make is token_config else {}))))
    return model.train()


def step(model, x, **kwargs):
    """Outputs and gradients of the second of two steps; in the first, the model learns who reads what."""
    for _ in range(2):
        model.zero_grad()
        x = x.detach().requires_grad_()
        y = model(x, **kwargs)
        (y.float() * torch.arange(1.0, 1 + y.shape[-1])).sum().backward()
    return y.detach(), x.grad, gradients(model)


def assert_same_steps(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours[0], theirs[0], rtol=tolerance, atol=tolerance)
    scale = theirs[1].abs().max().item()
    torch.testing.assert_close(ours[1], theirs[1], rtol=tolerance, atol=tolerance * scale)
    assert ours[2].keys() == theirs[2].keys()
    for name, gradient in ours[2].items():
        scale = theirs[2][name].abs().max().item()
        torch.testing.assert_close(gradient, theirs[2][name], rtol=tolerance, atol=tolerance * scale)
        assert gradient.dtype == theirs[2][name].dtype


X = torch.randn(3, 20, D, generator=torch.Generator().manual_seed(5))


def live():
    """X with a gradient, so that what is computed from it has a graph."""
    return X.clone().requires_grad_()


@pytest.mark.parametrize("name", ["llama", "t5", "gpt2", "bert"])
@pytest.mark.parametrize("gate", GATES)
def test_a_model_learns_like_one_that_shares_nothing(gate, name, projected):
    found = []
    for share in (True, False):
        torch.manual_seed(0)
        model = models.MODELS[name]().train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        inject_rank_experts(model, config(gate, target_modules="all-linear", share_inputs=share))
        inputs = batch(gate, name, size=5, length=12)
        for _ in range(2):
            projected.clear()
            model.zero_grad()
            outputs = model(**inputs)
            outputs.loss.backward()
        assert bool(projected) == (share and name != "gpt2")  # GPT-2 packs q, k and v itself.
        found.append((outputs.logits, gradients(model)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    assert_same_gradients(found[0][1], found[1][1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"biased_gates": True}, {"score_function": "softmax"}, {"expert_rank": 2}, {"make": dense_config}],
    ids=["sigmoid", "biased", "softmax", "blocks", "dense"],
)
def test_every_gate_and_dtype(options, dtype, projected):
    runs = [step(block(share, **options).to(dtype), X.to(dtype)) for share in (True, False)]
    assert projected == [3 if "make" in options else 6]
    assert_same_steps(*runs, tolerance=3e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("make", [token_config, dense_config])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(make, base, projected):
    runs = []
    for share in (True, False):
        model = block(share, make=make)
        for _, layer in adapted_layers(model):
            layer.base_layer.to(base)
        with torch.autocast("cpu", torch.bfloat16):
            runs.append(step(model, X))
    assert len(projected) == 1
    assert_same_steps(*runs, tolerance=3e-2)


def test_who_reads_the_same_tensor_is_learnt_from_the_call_before(projected):
    model = block()
    model(live())
    assert projected == []
    model(live())
    assert projected == [6]
    layers = dict(adapted_layers(model))
    assert model.q.scope.groups == {layers["q"]: (layers["q"], layers["k"], layers["v"])}
    # From then on another tensor reaches k and v: q's product for them was in vain once.
    model.between = lambda h: h * 2
    model(live())
    projected.clear()
    model(live())
    assert projected == [4]
    assert model.q.scope.groups[layers["q"]] == (layers["q"],)
    assert model.q.scope.groups[layers["k"]] == (layers["k"], layers["v"])


def test_an_input_that_changes_between_its_readers(projected):
    def change(h):
        with torch.no_grad():
            h.mul_(2)
        return h

    runs = []
    for share in (True, False):
        model = block(share).eval()
        with torch.no_grad():
            model(X)
            model.between = change
            projected.clear()
            runs.append(model(X))
    assert not torch.equal(runs[0], block().eval()(X))
    torch.testing.assert_close(*runs)


def test_a_parameter_that_changes_between_the_readers():
    model, other = block().eval(), block(False).eval()

    def change(h, model):
        model.k.rank_expert_A["default"].mul_(1.5)
        return h

    with torch.no_grad():
        for each in (model, other):
            each(X)
            each.between = lambda h, each=each: change(h, each)
        torch.testing.assert_close(model(X), other(X))


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_nothing_outlives_the_call(grad, missing, monkeypatch):
    """Nor the graph; also where a reader that was expected did not come."""
    alive: list[weakref.ref] = []

    def share(x, readers):
        found = original(x, readers)
        alive.extend(weakref.ref(tensor) for each in found or () for tensor in each)
        return found

    original = dispatch.share
    monkeypatch.setattr("rank_experts.sharing.share", share)
    model = block()
    model(live())
    if missing:
        model.between = lambda h: h + 1
    with torch.set_grad_enabled(grad):
        y = model.train(grad)(live())
    assert alive
    if grad:
        y.sum().backward()
    del y
    gc.collect()
    assert not any(ref() is not None for ref in alive)


def test_shares_are_gone_before_the_call_ends(monkeypatch):
    seen = []
    model = block().eval()
    with torch.no_grad():
        model(X)
        model.o.register_forward_pre_hook(lambda *args: seen.append(len(model.q.scope.current().inputs._ready)))
        model(X)
    assert seen == [0]


class ByHand(Block):
    use_reentrant = False

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=self.use_reentrant)


class ReentrantByHand(ByHand):
    use_reentrant = True


@pytest.mark.parametrize("module", [ByHand, ReentrantByHand])
def test_a_block_that_is_checkpointed_by_hand_computes_twice_alike(module, projected):
    runs = [step(block(share, module=module), X) for share in (True, False)]
    assert projected == []
    assert_same_steps(*runs)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("gate", GATES)
def test_checkpointing(gate, use_reentrant, projected):
    found = []
    for share in (True, False):
        model = inject_rank_experts(
            models.llama(), config(gate, target_modules="all-linear", share_inputs=share)
        ).train()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        for _ in range(2):
            projected.clear()
            model.zero_grad()
            model(**batch(gate, size=5, length=12)).loss.backward()
        # q, k, v and gate, up, of two blocks, and once more when backward recomputes them.
        assert len(projected) == (2 * 2 * 2 if share else 0)
        found.append(gradients(model))
    assert_same_gradients(*found, rtol=1e-3, atol=1e-5)


def test_two_forwards_before_one_backward(projected):
    found = []
    for share in (True, False):
        model = block(share)
        model(live())
        projected.clear()
        (model(live()) * model(live().flip(0))).sum().backward()
        assert len(projected) == (2 if share else 0)
        found.append(gradients(model))
    assert_same_gradients(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [token_config, dense_config])
def test_the_second_derivative(make, projected):
    found = []
    for share in (True, False):
        model = block(share, make=make).double()
        model(live().double())
        x = X.double().requires_grad_()
        (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        dx.square().sum().backward()
        found.append(gradients(model))
    assert projected
    assert_same_gradients(*found, rtol=1e-8, atol=1e-8)


def test_a_part_of_the_graph(projected):
    """Backward through one reader alone: the others get no gradient, not zeros."""
    found = []
    for share in (True, False):
        model = block(share)
        model(live())
        seen = []
        model.k.register_forward_hook(lambda module, args, y, seen=seen: seen.append(y))
        model(live())
        seen[0].sum().backward()
        found.append(gradients(model))
    assert projected == [6]
    assert sorted(found[0]) == [
        "k.rank_expert_A.default",
        "k.rank_expert_B.default",
        "k.rank_expert_router.default.weight",
    ]
    assert_same_gradients(*found, rtol=1e-4, atol=1e-4)


def test_readers_of_a_leaf_may_be_differentiated_one_by_one(projected):
    class Heads(Block):
        def forward(self, x):
            return self.q(x), self.k(x)

    model = block(module=Heads)
    for _ in range(2):
        for y in model(X.clone().requires_grad_()):
            y.sum().backward()
    assert projected == []


def test_a_frozen_reader(projected):
    found = []
    for share in (True, False):
        model = block(share)
        model.k.requires_grad_(False)
        found.append(step(model, X))
    assert projected == [6]
    assert not any(name.startswith("k.") for name in found[0][2])
    assert_same_steps(*found)


def test_dropout_is_not_shared(projected):
    model = block(dropout=0.5)
    model(live())
    model(live())
    assert projected == []
    with torch.no_grad():
        model.eval()(live())
        model(live())
    assert projected == [6]


def test_a_reader_that_is_switched_off_or_merged(projected):
    for share in (True, False):
        model = block(share, make=dense_config)
        model(live())
        model.k.enable_adapters(False)
        model.v.merge()
        projected.clear()
        y = model(live())
        assert projected == []
        if share:
            expected = y
    torch.testing.assert_close(y, expected)


def test_several_adapters(projected):
    found = []
    for share in (True, False):
        torch.manual_seed(1)
        options = dict(target_modules=["q", "k", "v"], share_inputs=share)
        model = get_peft_model(Block(), token_config(**options))
        model.add_adapter("other", dense_config(**options))
        runs = []
        for names in ("default", "other", ["default", "other"]):
            model.base_model.set_adapter(names)
            model(live())
            projected.clear()
            runs.append(model(live()))
        found.append(runs)
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_hooks_on_a_reader_see_its_own_gradients(projected):
    """A full backward hook hands the module another tensor, so that it shares nothing."""
    found = []
    for share in (True, False):
        model, seen = block(share), []
        model.k.register_full_backward_hook(lambda module, dx, dy, seen=seen: seen.append(dx[0].clone()))
        step(model, X)
        found.append(seen[-1])
    torch.testing.assert_close(*found)


def test_few_tokens_are_left_alone(projected):
    model = block().eval()
    for num_tokens, expected in ((32, []), (33, [6])):
        x = torch.randn(num_tokens, D)
        with torch.no_grad():
            model(x)
            model(x)
        assert projected == expected


def test_inference_mode(projected):
    model = block().eval()
    with torch.inference_mode():
        model(X)
        model(X)
    assert projected == []


def test_prefill_shares_and_decoding_does_not(projected):
    model = inject_rank_experts(models.llama(), config("token", target_modules="all-linear")).eval()
    prompt = torch.randint(1, 60, (4, 16))
    for _ in range(2):
        projected.clear()
        model.generate(input_ids=prompt, max_new_tokens=4, do_sample=False)
    assert projected == [6, 4, 6, 4]


def test_a_task_named_for_a_block_of_calls(projected):
    model = inject_rank_experts(models.llama(), config("task", target_modules="all-linear")).eval()
    ids = torch.randint(1, 60, (4, 16))
    with torch.no_grad(), use_task(model, "mnli"):
        first = model(input_ids=ids).logits
        assert projected == []
        torch.testing.assert_close(model(input_ids=ids).logits, first, rtol=1e-4, atol=1e-5)
    assert projected == [3, 2, 3, 2]


def test_files_and_names_do_not_depend_on_it(tmp_path, projected):
    for share in (True, False):
        model = block(share)
        step(model, X)
        save_rank_experts(model, tmp_path / str(share))
    files = [load_file(tmp_path / str(share) / "adapter_model.safetensors") for share in (True, False)]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    assert [name for name, _ in block(True).named_modules()] == [name for name, _ in block(False).named_modules()]


def test_a_copy_learns_for_itself(projected):
    model = block()
    model(live())
    twin = copy.deepcopy(model)
    assert twin.q.scope.groups == {}
    twin(live())
    assert projected == []


def test_a_watched_router_computes_on_its_own(projected):
    from rank_experts.recording import record_routing

    model = inject_rank_experts(models.llama(), config("token", target_modules="all-linear")).eval()
    inputs = batch("token", size=5, length=12)
    with torch.no_grad():
        model(**inputs)
        with record_routing(model):
            model(**inputs)
    assert projected == []


def test_it_is_said_once(caplog):
    dispatch.announce.cache_clear()
    model = block()
    with caplog.at_level(logging.INFO, logger="rank_experts.ops"):
        for _ in range(3):
            model(live())
    messages = [record.message for record in caplog.records]
    assert (
        messages.count("rank_experts computes adapted layers with: one product for layers that read the same input")
        == 1
    )


def test_the_field():
    assert RankExpertConfig.smora().share_inputs is True
    with pytest.raises(TypeError, match="share_inputs=1: expected True or False, found int"):
        RankExpertConfig.smora(share_inputs=1)
