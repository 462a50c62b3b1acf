"""Mixture-of-experts bases: an adapter for every expert of the base, tokens as the base routes them."""

from __future__ import annotations

import pytest
import torch

import models
import oracle
import rank_experts.messages
from gates import GATES, batch, config, logits, randomise
from helpers import TASKS, assert_same_gradients, assert_unchanged, fingerprint, gradients
from mixtures import BASES, EXPERTS, adapted, the_experts
from rank_experts import (
    inject_rank_experts,
    load_rank_experts,
    save_rank_experts,
    update_router_bias,
    use_task,
)
from rank_experts.layers import adapted_layers
from rank_experts.layers.experts import dispatch
from rank_experts.reports.recording import record_routing
from rank_experts.routing import pool_examples, pool_gathered
from rank_experts.training.lifecycle import add_task, identify_task


@pytest.fixture(params=BASES)
def make(request):
    return BASES[request.param]


class Routed:
    """What the base sent to the experts in a forward: module's name to (tokens (N, d), chosen (N, K), weights)."""

    def __init__(self, model):
        self.inputs: dict[str, tuple[torch.Tensor, ...]] = {}
        for name, module in the_experts(model).items():
            module.register_forward_pre_hook(lambda _, args, name=name: self.inputs.update({name: args}))


@pytest.mark.parametrize("gate", GATES)
def test_the_linear_layers_of_a_mixture(make, gate, tmp_path):
    rank_experts.messages.warn_once.cache_clear()
    with pytest.warns(UserWarning, match=r'all-linear" leaves out the \d mixtures of experts.*mlp\.experts.*3-D'):
        model = inject_rank_experts(make(), config(gate))
    paths = [path for path, _ in adapted_layers(model)]
    assert len([path for path in paths if "self_attn" in path]) == 8
    assert not any("experts" in path for path in paths)
    base = make()
    assert (logits(model, batch(gate)) - logits(base, models.batch("llama"))).abs().max() > 1e-3
    model.train()
    # The base's own balancing loss comes beside ours.
    outputs = model(**batch(gate), output_router_logits=True)
    outputs.loss.backward()
    assert outputs.aux_loss is not None
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    save_rank_experts(model, tmp_path)
    loaded = load_rank_experts(make(), tmp_path)
    assert torch.equal(logits(loaded, batch(gate)), logits(model, batch(gate)))


@pytest.mark.parametrize("gate", GATES)
def test_a_new_adapter_changes_nothing(make, gate):
    """Bit for bit against transformers' "eager" implementation, nearly so against the fast ones."""
    base, model = make(), adapted(gate, make, init_weights=True)
    for implementation, tolerance in (("eager", 0.0), ("grouped_mm", 1e-6)):
        base.set_experts_implementation(implementation)
        assert base.config._experts_implementation == implementation
        expected = logits(base, models.batch("llama"))
        torch.testing.assert_close(logits(model, batch(gate)), expected, rtol=tolerance, atol=tolerance)


def oracle_gate(gate, layer, x, task_ids):
    router = layer.rank_experts["default"]
    if gate == "token":
        return oracle.token_gate(x, router.router_weight, router.balance_bias, router.settings.top_k)
    if gate == "task":
        return oracle.task_gate(router.task_embedding, router.gate_weight, router.gate_bias, task_ids)
    return torch.ones(len(x), len(layer.rank_experts["default"].A), dtype=x.dtype)


def oracle_projection(gate, layers, weight, bias, expert, x, task_id):
    """One expert's projection of one token (d,)."""
    layer, x = layers[expert], x[None]
    A, B = layer.rank_experts["default"].A, layer.rank_experts["default"].B
    scale = 16 / (2 if gate == "token" else 4)
    y = torch.stack([(row * x[0]).sum() for row in weight[expert]])[None] + bias[expert]
    return oracle.update(y, x, A, B, oracle_gate(gate, layer, x, torch.tensor([task_id])), scale)[0]


@pytest.mark.parametrize("gate", GATES)
def test_the_formula(make, gate):
    """Against loops over tokens, the base's choices and ranks: outputs and the gradients of all tensors."""
    model = adapted(gate, make).double()
    randomise(model)
    experts = next(iter(the_experts(model).values()))
    base = experts.base_layer
    x = torch.randn(6, 32, dtype=torch.float64, requires_grad=True)
    chosen = torch.tensor([[0, 1], [1, 3], [3, 0], [0, 3], [1, 0], [3, 1]])  # nothing for expert 2
    weights = torch.rand(6, 2, dtype=torch.float64)
    task_ids = torch.tensor([2, 0, 1])
    model.eval()
    with use_task(model, task_ids.repeat_interleave(2)) if gate == "task" else torch.enable_grad():
        y = experts(x, chosen, weights)
    transposed = base.is_transposed
    up = base.gate_up_proj.transpose(1, 2) if transposed else base.gate_up_proj
    down = base.down_proj.transpose(1, 2) if transposed else base.down_proj
    up_bias, down_bias = (base.gate_up_proj_bias, base.down_proj_bias) if base.has_bias else ([0.0] * 4, [0.0] * 4)
    rows = []
    for n in range(6):
        row, task = torch.zeros(32, dtype=torch.float64), int(task_ids[n // 2])
        for k in range(2):
            m = int(chosen[n, k])
            both = oracle_projection(gate, experts.gate_up_proj, up, up_bias, m, x[n], task)
            if transposed:  # gpt-oss
                left, right = both[::2].clamp(max=base.limit), both[1::2].clamp(-base.limit, base.limit)
                h = (right + 1) * left / (1 + torch.exp(-left * base.alpha))
            else:
                left, right = both[: len(both) // 2], both[len(both) // 2 :]
                h = right * left / (1 + torch.exp(-left))
            row = row + weights[n, k] * oracle_projection(gate, experts.down_proj, down, down_bias, m, h, task)
        rows.append(row)
    expected = torch.stack(rows)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    tensors = {"x": x} | {name: p for name, p in experts.named_parameters() if p.requires_grad}
    out = torch.randn_like(y)
    ours = torch.autograd.grad((y * out).sum(), tensors.values(), allow_unused=True)
    theirs = torch.autograd.grad((expected * out).sum(), tensors.values(), allow_unused=True)
    for name, one, other in zip(tensors, ours, theirs):
        zero = torch.zeros_like(tensors[name])
        other = zero if other is None else other
        torch.testing.assert_close(zero if one is None else one, other, rtol=1e-8, atol=1e-8, msg=name)


def test_dispatch_has_the_order_of_the_eager_implementation():
    index = torch.randint(0, 5, (7, 2), generator=torch.Generator().manual_seed(0))
    index[3] = 5  # sent to another device
    found = {m: (tokens.tolist(), slots.tolist()) for m, tokens, slots in dispatch(index, 5)}
    mask = torch.nn.functional.one_hot(index, 6).permute(2, 1, 0)
    for m in range(5):
        slots, tokens = torch.where(mask[m])
        assert found[m] == (tokens.tolist(), slots.tolist())


@pytest.mark.parametrize("gate", GATES)
def test_training_reaches_every_tensor_and_lowers_the_loss(make, gate):
    model = adapted(gate, make, init_weights=True).train()
    inputs = batch(gate)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(12):
        outputs = model(**inputs)
        outputs.loss.backward()
        losses.append(float(outputs.loss.detach()))
        if step == 1:  # B is zero in the first step
            parameters = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
            assert all(grad is not None for grad in parameters.values())
            for kind in (".A", ".B", *{"dense": (), "token": (".router_weight",), "task": (".gate_weight",)}[gate]):
                assert any(bool(grad.any()) for name, grad in parameters.items() if name.endswith(kind))
        optimizer.step()
        optimizer.zero_grad()
        update_router_bias(model)
    assert losses[-1] < 0.96 * losses[0]
    assert all(".rank_experts." in name for name, p in model.named_parameters() if p.requires_grad)


def test_experts_without_tokens_have_gradients_of_zero():
    """Else DistributedDataParallel would wait for them."""
    model = adapted("token").train()
    experts = the_experts(model)["model.layers.0.mlp.experts"]
    x = torch.randn(3, 32, requires_grad=True)
    experts(x, torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)).sum().backward()
    for m, layer in enumerate(experts.gate_up_proj):
        assert bool(layer.rank_experts["default"].A.grad.any()) == (m == 0)


def test_the_load_counts_the_real_tokens_that_the_base_sent_to_an_expert(make):
    model = adapted("token", make).train()
    routed, inputs = Routed(model), batch("token")
    model(**inputs).loss.backward()
    real = inputs["attention_mask"].flatten().bool()
    biases = {path: layer.rank_experts["default"].balance_bias.clone() for path, layer in adapted_layers(model)}
    for (path, _), load in update_router_bias(model).items():
        name, _, _ = path.rpartition(".")
        name, _, _ = name.rpartition(".")
        expert = int(path.rpartition(".")[2])
        x, chosen, _ = routed.inputs[name]
        mine = (chosen == expert).any(1) & real
        assert float(load.sum()) == 2 * int(mine.sum())  # top_k of the adapter
        layer = model.get_submodule(path)
        if "gate_up_proj" in path:
            layer.rank_experts["default"].balance_bias.copy_(biases[path])
            choices = layer.rank_experts["default"].token_gate().route(x[mine].detach()).indices
            assert torch.equal(load, torch.bincount(choices.flatten(), minlength=4).float())
    assert sum(bool(bias.any()) for bias in biases.values()) == 0


def test_the_balancing_loss_is_the_mean_over_the_experts_that_had_tokens(make):
    model = adapted("token", make, load_balance="loss", target_parameters=EXPERTS[:1]).train()
    routed, inputs = Routed(model), batch("token")
    outputs = model(**inputs)
    real = inputs["attention_mask"].flatten().bool()
    losses = []
    for name, experts in the_experts(model).items():
        x, chosen, _ = routed.inputs[name]
        for m, layer in enumerate(experts.gate_up_proj):
            here = (chosen == m).any(1)
            mine = here & real
            if not here.any():
                continue
            routing = layer.rank_experts["default"].token_gate().route(x[mine])
            share = torch.bincount(routing.indices.flatten(), minlength=4) / max(routing.indices.numel(), 1)
            losses.append(4 * (share * routing.probabilities.sum(0) / max(int(mine.sum()), 1)).sum())
    torch.testing.assert_close(outputs.rank_expert_loss, 0.01 * torch.stack(losses).mean())
    bare = outputs.loss - outputs.rank_expert_loss
    torch.testing.assert_close(bare, logits_loss(model, inputs))


def logits_loss(model, inputs):
    plain = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    return torch.nn.functional.cross_entropy(
        plain[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), ignore_index=-100
    )


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_the_contrastive_loss_pools_an_examples_tokens_at_an_expert(make, pooling):
    model = adapted("task", make, pooling=pooling, target_parameters=EXPERTS[:1]).train()
    routed, inputs = Routed(model), batch("task")
    outputs = model(**inputs)
    ids, mask = inputs["task_ids"], inputs["attention_mask"].bool()
    losses = []
    for name, experts in the_experts(model).items():
        x, chosen, _ = routed.inputs[name]
        x = x.view(4, 7, 32)
        for m, layer in enumerate(experts.gate_up_proj):
            if not (chosen == m).any():
                continue
            mine = (chosen == m).any(1).view(4, 7) & mask
            pooled, present = [], []
            for i in range(4):
                own = x[i][mine[i]]
                if len(own):
                    pooled.append({"mean": own.mean(0), "first": own[0], "last": own[-1]}[pooling])
                    present.append(i)
            embedding = layer.rank_experts["default"].task_embedding
            losses.append(oracle.contrastive(pooled, embedding, ids[present], 0.05) if present else x.new_zeros(()))
    torch.testing.assert_close(outputs.rank_expert_loss, 0.1 * torch.stack(losses).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_pooling_gathered_tokens_is_pooling_examples(pooling):
    x, here = torch.randn(3, 5, 4), torch.rand(3, 5) < 0.6
    here[1] = False
    mask = torch.rand(3, 5) < 0.7
    positions = here.flatten().nonzero().flatten()
    positions = positions[torch.randperm(len(positions))]
    pooled, present = pool_gathered(
        x.flatten(0, 1)[positions], positions // 5, positions, 3, mask.flatten()[positions], pooling
    )
    torch.testing.assert_close(pooled, pool_examples(x, here & mask, pooling))
    assert torch.equal(present, (here & mask).any(1))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(gate, reentrant):
    def train(model):
        model.train()
        outputs = model(**batch(gate))
        outputs.loss.backward()
        return outputs.loss.detach(), gradients(model), update_router_bias(model)

    kwargs = {"load_balance": "bias"} if gate == "token" else {}
    model, plain = adapted(gate, **kwargs), adapted(gate, **kwargs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    plain.enable_input_require_grads()
    (loss, grads, loads), (expected_loss, expected_grads, expected_loads) = train(model), train(plain)
    torch.testing.assert_close(loss, expected_loss)
    assert_same_gradients(grads, expected_grads)
    assert loads.keys() == expected_loads.keys()
    assert all(torch.equal(loads[key], expected_loads[key]) for key in loads)


def test_tasks_reach_the_tokens_behind_the_bases_dispatch(make):
    model = adapted("task", make)
    randomise(model)
    inputs = models.batch("llama", labels=False)
    ids = torch.tensor([2, 0, 1, 2])
    mixed = logits(model, inputs | {"task_ids": ids})
    assert torch.equal(mixed, logits(model, inputs | {"task_ids": [TASKS[i] for i in ids]}))
    for i, task in enumerate(ids.tolist()):
        with use_task(model, TASKS[task]):
            alone = logits(model, {name: value[i : i + 1] for name, value in inputs.items()})
        torch.testing.assert_close(mixed[i : i + 1], alone, rtol=1e-5, atol=1e-5)
    with use_task(model, "cola"):
        other = logits(model, inputs)
    assert (mixed - other).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj\.\d.*was not told which"):
        logits(model, inputs)
    with pytest.raises(ValueError, match=r"3 task ids for 4 rows"):
        logits(model, inputs | {"task_ids": ids[:3]})


def test_generating(make):
    model = adapted("task", make)
    randomise(model)
    model.eval()
    prompt = torch.randint(1, models.VOCAB, (3, 4))
    ids = torch.tensor([0, 1, 2])
    options = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    mask = torch.ones_like(prompt)
    together = model.generate(prompt, attention_mask=mask, task_ids=ids, **options)
    for i in range(3):
        with use_task(model, TASKS[i]):
            alone = model.generate(prompt[i : i + 1], attention_mask=mask[i : i + 1], **options)
        assert torch.equal(together[i : i + 1], alone)


@pytest.mark.parametrize("gate", ["task", "dense"])
def test_merging_and_unmerging(make, gate):
    model = adapted(gate, make)
    randomise(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    task = "mnli" if gate == "task" else None
    inputs = models.batch("llama") | ({"task_ids": ["mnli"] * 4} if gate == "task" else {})
    expected = logits(model, inputs)
    rank_experts.merge_rank_experts(model, task=task, safe_merge=True)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-4)
    name = "model.layers.1.mlp.experts.base_layer.gate_up_proj"
    assert (model.state_dict()[name] - before[name]).abs().amax((1, 2)).min() > 1e-3  # each expert
    if gate == "task":
        with pytest.raises(ValueError, match=r"experts\.gate_up_proj\.\d.*merged for task 'mnli'.*'cola'"):
            logits(model, models.batch("llama") | {"task_ids": ["cola"] * 4})
    rank_experts.unmerge_rank_experts(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    rank_experts.merge_rank_experts(model, task=task, unload=True)
    assert type(model) is type(make())
    assert model.state_dict().keys() == make().state_dict().keys()
    assert not the_experts(model)
    torch.testing.assert_close(logits(model, models.batch("llama")), expected, rtol=1e-4, atol=1e-4)


def test_a_token_gate_is_not_merged():
    model = adapted("token")
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj\.0: adapter 'default' routes by token"):
        rank_experts.merge_rank_experts(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("gate", GATES)
def test_saving_and_loading(make, gate, tmp_path):
    model = adapted(gate, make)
    randomise(model)
    save_rank_experts(model, tmp_path)
    loaded = load_rank_experts(make(), tmp_path)
    assert torch.equal(logits(loaded, batch(gate)), logits(model, batch(gate)))
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("gate", ["token", "task"])
def test_recording(gate):
    model = adapted(gate).eval()
    inputs = batch(gate)
    routed = Routed(model)
    with record_routing(model) as stats, torch.no_grad():
        model(**inputs)
    real = inputs["attention_mask"].flatten().bool()
    examples = torch.arange(4).repeat_interleave(7)
    for layer in stats.layers():
        path, _, expert = layer.path.rpartition(".")
        _, chosen, _ = routed.inputs[path.rpartition(".")[0]]
        mine = (chosen == int(expert)).any(1) & real
        assert layer.counts is None or int(layer.counts.tokens.sum()) == int(mine.sum())
        if gate == "task" and layer.counts is not None:
            tasks = inputs["task_ids"][examples[mine]]
            assert layer.counts.tokens[1:].tolist() == torch.bincount(tasks, minlength=3).tolist()


def test_a_new_task_and_unknown_tasks():
    model = adapted("task", target_modules=["q_proj"])
    add_task(model, "snli", like="rte")
    inputs = models.batch("llama")
    assert torch.equal(
        logits(model, inputs | {"task_ids": ["snli"] * 4}), logits(model, inputs | {"task_ids": ["rte"] * 4})
    )
    # Of the experts' inputs alone nobody knows which example they are: the other layers tell.
    assert identify_task(model, inputs).scores.shape == (4, 4)
    with pytest.raises(ValueError, match=r"adapts a mixture's experts alone.*target_modules"):
        identify_task(adapted("task"), inputs)


@pytest.mark.parametrize("gate", ["token", "task"])
def test_compiling_leaves_the_model_uncompiled_and_says_so(gate):
    def train(model, forward):
        model.train()
        loss = forward(**batch(gate)).loss
        loss.backward()
        return loss.detach(), gradients(model), update_router_bias(model)

    kwargs = dict(target_modules=["q_proj"])
    model, plain = adapted(gate, **kwargs), adapted(gate, **kwargs)
    with pytest.warns(UserWarning, match="adapters on a mixture's experts.*run uncompiled"):
        loss, grads, loads = train(model, torch.compile(model, backend="eager"))
    expected_loss, expected_grads, expected_loads = train(plain, plain)
    assert torch.equal(loss, expected_loss)
    assert_same_gradients(grads, expected_grads, rtol=0, atol=0)
    assert all(torch.equal(load, expected_loads[key]) for key, load in loads.items())
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"mixture's experts \(target_parameters\) run uncompiled"):
        torch.compile(model, backend="eager", fullgraph=True)(**batch(gate))
