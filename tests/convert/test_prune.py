"""Pruning: exact where nothing used what is dropped, measured where something did."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from helpers import TASKS, assert_unchanged, dense_config, fingerprint, task_config, token_config
from models import MODELS, batch
from rank_experts import (
    inject_rank_experts,
    load_rank_experts,
    merge_rank_experts,
    prune_rank_experts,
    save_rank_experts,
    update_router_bias,
    use_task,
)
from rank_experts.layers import adapted_layers
from rank_experts.reports.recording import record_routing

SHAPES = ("llama", "t5", "bert")
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
IDLE = (0, 3, 4)


def idle(model, experts=IDLE):
    """Keep some experts from ever being chosen."""
    for _, layer in adapted_layers(model):
        layer.rank_experts["default"].balance_bias[list(experts)] = -10
    return model


def routed(name, dtype=torch.float32, **kwargs):
    config = token_config(**({"r": 8, "top_k": 2} | kwargs))
    return inject_rank_experts(MODELS[name]().to(dtype), config).eval()


@torch.no_grad()
def logits(model, name):
    return model(**batch(name)).logits.float()


def close(actual, expected, dtype=torch.float32):
    return float((actual - expected).norm()) <= TOLERANCE[dtype] * float(expected.norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("blocks", [1, 2])
def test_idle_experts_go_and_nothing_changes(tmp_path, name, dtype, blocks):
    model = idle(routed(name, dtype, r=8 * blocks, expert_rank=blocks))
    data = [batch(name, 16), batch(name, 8, 9)]
    expected = logits(model, name)
    report = prune_rank_experts(model, data, progress=False)
    assert close(logits(model, name), expected, dtype)
    assert report.exact
    assert report.loss_after == pytest.approx(report.loss_before, rel=1e-6 if dtype == torch.float32 else 1e-2)
    for layer, (path, adapted) in zip(report.layers, adapted_layers(model), strict=True):
        assert (layer.path, layer.of, layer.load_dropped) == (path, 8, 0)
        assert layer.kept <= 5
        assert adapted.rank_experts["default"].A.shape[0] == layer.kept * blocks
        assert adapted.rank_experts["default"].B.shape[1] == layer.kept * blocks
        assert adapted.rank_experts["default"].num_experts == layer.kept
    save_rank_experts(model, tmp_path / "small")
    again = load_rank_experts(MODELS[name]().to(dtype), tmp_path / "small").eval()
    assert torch.equal(logits(again, name), logits(model, name))


def test_the_smaller_adapter_trains_on():
    model = idle(routed("bert"))
    prune_rank_experts(model, [batch("bert", 16)], progress=False)
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert parameters
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    before = [parameter.detach().clone() for parameter in parameters]
    biases = [layer.rank_experts["default"].balance_bias.clone() for _, layer in adapted_layers(model)]
    model(**batch("bert", 16)).loss.backward()
    optimizer.step()
    update_router_bias(model)
    assert all(not torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
    moved = [layer.rank_experts["default"].balance_bias for _, layer in adapted_layers(model)]
    assert any(not torch.equal(a, b) for a, b in zip(biases, moved, strict=True))


def test_layers_keep_different_numbers_and_the_config_says_which(tmp_path):
    model = routed("bert", target_modules=["query", "value"])
    layers = dict(adapted_layers(model))
    for number, layer in enumerate(layers.values()):
        layer.rank_experts["default"].balance_bias[: number + 1] = -10
    report = prune_rank_experts(model, [batch("bert", 32, 30)], progress=False)
    config = model.peft_config["default"]
    kept = {layer.path: layer.kept for layer in report.layers}
    assert len(set(kept.values())) > 2
    assert len(config.rank_pattern) == sum(number != config.r for number in kept.values())
    save_rank_experts(model, tmp_path / "small")
    again = load_rank_experts(MODELS["bert"](), tmp_path / "small")
    assert {path: len(layer.rank_experts["default"].A) for path, layer in adapted_layers(again)} == kept


def test_keeping_fewer_is_measured():
    model = routed("llama", alpha=64)
    data = DataLoader([{k: v[i] for k, v in batch("llama", 16).items()} for i in range(16)], batch_size=8)
    loads = {}

    def count(layer, args, output):
        x = args[0].reshape(-1, args[0].shape[-1])[mask.reshape(-1)]
        score = torch.sigmoid(x @ layer.rank_experts["default"].router_weight.T)
        chosen = score.sort(dim=-1, descending=True, stable=True).indices[:, :2]
        loads[layer.path] = loads.get(layer.path, 0) + chosen.reshape(-1).bincount(minlength=8)

    handles = [layer.register_forward_hook(count) for _, layer in adapted_layers(model)]
    losses = []
    with torch.no_grad():
        for one in data:
            mask = one["attention_mask"].bool()
            losses.append(float(model(**one).loss))
    for handle in handles:
        handle.remove()
    report = prune_rank_experts(model, data, keep_experts=3, progress=False)
    assert not report.exact
    assert report.loss_before == pytest.approx(sum(losses) / 2, abs=1e-5)
    with torch.no_grad():
        after = sum(float(model(**one).loss) for one in data) / 2
    assert report.loss_after == pytest.approx(after, abs=1e-5)
    assert abs(after - report.loss_before) > 1e-4
    for layer in report.layers:
        load = loads[layer.path]
        assert layer.kept == 3
        assert layer.load_dropped == pytest.approx(float(1 - load.topk(3).values.sum() / load.sum()), abs=1e-6)
    assert "3 of 8" in str(report)
    assert "loss:" in str(report)


def test_a_share_of_the_load_from_given_counts():
    model = routed("bert", target_modules=["query"])
    load = torch.tensor([5.0, 50, 0, 20, 10, 0, 15, 0])
    A = {path: layer.rank_experts["default"].A.detach().clone() for path, layer in adapted_layers(model)}
    report = prune_rank_experts(model, dict.fromkeys(A, load), keep_load=0.8)
    for layer, (path, adapted) in zip(report.layers, adapted_layers(model), strict=True):
        assert layer.load_dropped == pytest.approx(0.15)
        assert torch.equal(adapted.rank_experts["default"].A, A[path][[1, 3, 6]])
    assert report.loss_before is None


def test_a_recording_is_as_good_as_batches():
    first, second = idle(routed("bert")), idle(routed("bert"))
    with record_routing(first) as stats, torch.no_grad():
        first(**batch("bert", 16))
    assert prune_rank_experts(first, stats).layers == prune_rank_experts(second, [batch("bert", 16)]).layers
    assert first.peft_config["default"].r < 8


def test_never_fewer_than_top_k():
    model = routed("bert", target_modules=["query"], top_k=4)
    load = torch.tensor([0.0, 0, 9, 0, 0, 0, 0, 1])
    prune_rank_experts(model, {path: load for path, _ in adapted_layers(model)})
    assert model.peft_config["default"].r == 4
    logits(model, "bert")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("scaling", ["linear", "quadratic", "none"])
@pytest.mark.parametrize("name", SHAPES)
def test_ranks_above_every_task_go_and_nothing_changes(tmp_path, name, scaling, dtype):
    model = inject_rank_experts(MODELS[name]().to(dtype), task_config(r=9, rank_scaling=scaling)).eval()
    with torch.no_grad():
        for number, (_, layer) in enumerate(adapted_layers(model)):
            layer.rank_experts["default"].gate_bias[4 + number % 3 :] = -30
    expected = {}
    for task in TASKS:
        with use_task(model, task):
            expected[task] = logits(model, name)
    report = prune_rank_experts(model)
    assert report.exact
    assert all(layer.kept < layer.of == 9 for layer in report.layers)
    save_rank_experts(model, tmp_path / "small")
    again = load_rank_experts(MODELS[name]().to(dtype), tmp_path / "small").eval()
    for task in TASKS:
        for one in (model, again):
            with use_task(one, task):
                assert close(logits(one, name), expected[task], dtype)


def test_fewer_ranks_than_a_task_uses_are_measured():
    model = inject_rank_experts(MODELS["bert"](), task_config(r=9, alpha=90, target_modules=["query", "dense"])).eval()
    ranks = {
        path: layer.rank_experts["default"].task_gate().route(torch.arange(3)).indices
        for path, layer in adapted_layers(model)
    }
    data = [batch("bert") | {"task_ids": torch.tensor([0, 1, 2, 0])}]
    report = prune_rank_experts(model, data, keep_experts=2, progress=False)
    assert not report.exact
    for layer in report.layers:
        lost = (ranks[layer.path] - 2).clamp(min=0).sum() / ranks[layer.path].sum()
        assert layer.load_dropped == pytest.approx(float(lost))
    assert report.loss_after == pytest.approx(float(model(**data[0]).loss), abs=1e-6)
    assert report.loss_before != pytest.approx(report.loss_after, abs=1e-6)


def test_bad_input_prunes_nothing():
    token = routed("bert")
    padding = batch("bert")
    padding["attention_mask"] = torch.zeros_like(padding["attention_mask"])
    load = {path: torch.ones(8) for path, _ in adapted_layers(token)}
    cases = [
        ({}, ValueError, "routes by token.*Give batches"),
        ({"data": []}, ValueError, "no batch"),
        ({"data": [padding]}, ValueError, "saw no token that is not padding"),
        ({"data": iter([batch("bert")])}, TypeError, "read only once"),
        ({"data": {"elsewhere": torch.ones(8)}}, ValueError, "has no load"),
        ({"data": {path: torch.ones(7) for path in load}}, ValueError, "expected 8 counts"),
        ({"data": {path: torch.zeros(8) for path in load}}, ValueError, "expected 8 counts"),
        ({"data": load, "keep_experts": 1}, ValueError, r"keep_experts=1: expected at least 2 \(top_k\)"),
        ({"data": load, "keep_experts": 0}, ValueError, "keep_experts=0: expected at least 1"),
        ({"data": load, "keep_experts": 3.0}, TypeError, "keep_experts=3.0: expected a whole number"),
        ({"data": load, "keep_experts": True}, TypeError, "keep_experts=True: expected a whole number"),
        (
            {"data": load, "keep_load": 1.0},
            ValueError,
            "keep_load=1.0: expected a number from 0 up to, not including, 1",
        ),
        ({"data": load, "keep_load": 0.0}, ValueError, "keep_load=0: expected a share"),
        ({"data": load, "keep_load": "0.5"}, TypeError, "keep_load='0.5'"),
        ({"data": load, "keep_experts": 3, "keep_load": 0.5}, ValueError, "keep_experts=3 and keep_load=0.5 both"),
        ({"data": load, "adapter_name": "other"}, ValueError, "no rank-expert adapter 'other'"),
    ]
    before = fingerprint(token)
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            prune_rank_experts(token, progress=False, **arguments)
        assert_unchanged(token, before)
    with pytest.raises(ValueError, match="is dense"):
        prune_rank_experts(inject_rank_experts(MODELS["bert"](), dense_config()))
    task = inject_rank_experts(MODELS["bert"](), task_config())
    with pytest.raises(ValueError, match=r"keep_load=0.5: adapter 'default' routes by task.*a number of ranks"):
        prune_rank_experts(task, keep_load=0.5)
    merge_rank_experts(task, task="rte")
    with pytest.raises(ValueError, match="is merged"):
        prune_rank_experts(task)
