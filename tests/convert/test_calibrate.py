"""The calibrated export of token gates: the least-squares static LoRA, its ranks, its report."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel

from models import MODELS, VOCAB, batch
from rank_experts import RankExpertConfig, export_lora, inject_rank_experts, load_rank_experts, save_rank_experts
from rank_experts.convert.calibrate import METHODS, Moments, calibrate
from rank_experts.layers import adapted_layers

TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "t5": ["q", "wo"],
    "bert": ["query", "output.dense"],
    "gpt2": ["c_attn", "c_fc"],
}


def smora(name, **kwargs):
    options = {"r": 6, "top_k": 2, "alpha": 48, "target_modules": TARGETS[name], "init_weights": False}
    return RankExpertConfig.smora(**(options | kwargs))


def adapted(name, dtype=torch.float32, **kwargs):
    base = MODELS[name]().to(dtype).eval()
    return copy.deepcopy(base), inject_rank_experts(base, smora(name, **kwargs), autocast_adapter_dtype=False).eval()


def batches(name, count=4, size=16, length=7):
    """Enough random tokens for the widest layer (d_in = 48)."""
    made = []
    for seed in range(count):
        one = batch(name, size, length)
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, VOCAB, one["input_ids"].shape, generator=generator)
        one["input_ids"] = ids * one["attention_mask"]
        if name == "t5":
            one["labels"] = torch.randint(1, VOCAB, (size, 5), generator=generator)
        if name in ("llama", "gpt2"):
            one["labels"] = one["input_ids"].masked_fill(one["attention_mask"] == 0, -100)
        made.append(one)
    return made


def count_hooks(model):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def run(model, loader, **kwargs):
    return calibrate(model, loader, progress=False, **kwargs)


def decoder_side(path):
    return path.startswith("decoder")


@torch.no_grad()
def collect(model, loader):
    """What every layer saw and what its adapter added, by hooks of our own and from the layer's own forward."""
    seen = {path: ([], [], []) for path, _ in adapted_layers(model)}
    current = {}

    def hook(path, layer):
        def keep(module, args, output):
            x = args[0]
            mask = current["mask"]
            if x.dim() == 3 and mask.shape != x.shape[:2]:
                mask = torch.ones(x.shape[:2], dtype=torch.bool)
            added = output - layer.base_layer(x)
            mask = mask.reshape(-1).bool()
            x, added = x.reshape(-1, x.shape[-1])[mask], added.reshape(-1, added.shape[-1])[mask]
            score = torch.sigmoid(x @ layer.rank_experts["default"].router_weight.T)
            chosen = score.topk(2, dim=-1).indices
            picked = torch.zeros_like(score).scatter(-1, chosen, score.gather(-1, chosen))
            gates = 2 * picked / picked.sum(-1, keepdim=True)
            u = gates * (x @ layer.rank_experts["default"].A.T)
            for kept, value in zip(seen[path], (x, u, added), strict=True):
                kept.append(value.double())

        return layer.register_forward_hook(keep)

    handles = [hook(path, layer) for path, layer in adapted_layers(model)]
    for one in loader:
        current["mask"] = one["attention_mask"]
        model(**one)
    for handle in handles:
        handle.remove()
    return {path: tuple(torch.cat(kept) for kept in values) for path, values in seen.items()}


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_it_is_the_least_squares_solution(name):
    _, model = adapted(name, torch.float64)
    loader = batches(name)
    factors, report = run(model, loader)
    for fit, (path, (x, u, added)) in zip(report.layers, collect(model, loader).items(), strict=True):
        # Ridge regression as plain least squares with d_in more rows; the ridge is 1e-6 of the inputs' mean energy.
        ridge = (1e-6 * x.square().mean() * len(x)).sqrt() * torch.eye(x.shape[1], dtype=x.dtype)
        expected = torch.linalg.lstsq(torch.cat([x, ridge]), torch.cat([u, torch.zeros(x.shape[1], 6)])).solution.T
        torch.testing.assert_close(factors[path].A, expected, rtol=1e-6, atol=1e-8)
        static = x @ factors[path].A.T @ factors[path].B.T
        assert fit.path == path
        assert fit.tokens == len(x)
        assert fit.energy == pytest.approx(float(added.square().sum(1).mean()), rel=1e-9)
        assert fit.residual == pytest.approx(float((added - static).square().sum(1).mean()), rel=1e-9)
        assert 0 < fit.explained < 1
    energy = sum(fit.energy for fit in report.layers)
    assert report.explained == pytest.approx(sum(fit.explained * fit.energy for fit in report.layers) / energy)


def test_an_encoder_decoder_counts_the_tokens_of_each_half():
    _, model = adapted("t5")
    loader = batches("t5")
    _, report = run(model, loader)
    source = sum(int(one["attention_mask"].sum()) for one in loader)
    target = sum(int((one["labels"] != -100).sum()) for one in loader)
    assert source != target
    for fit in report.layers:
        assert fit.tokens == (target if decoder_side(fit.path) else source), fit.path


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_padding_does_not_count(name):
    _, model = adapted(name, torch.float64)
    padded = [{key: one[key] for key in ("input_ids", "attention_mask")} for one in batches(name, 2, 4)]
    alone = []
    for one in padded:
        for ids, mask in zip(one["input_ids"], one["attention_mask"], strict=True):
            alone.append({"input_ids": ids[None, mask.bool()], "attention_mask": mask[None, mask.bool()]})
    first, report = run(model, padded)
    second, _ = run(model, alone)
    assert report.loss_before is None
    assert report.loss_after is None
    for path, own in first.items():
        torch.testing.assert_close(own.A, second[path].A, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_where_every_expert_is_always_on_the_static_form_is_exact(tmp_path, name, dtype):
    base, model = adapted(name, dtype, top_k=6)
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            layer.rank_experts["default"].router_weight.zero_()
    report = export_lora(model, tmp_path / "lora", calibration=batches(name), progress=False)
    assert report.explained == pytest.approx(1, abs=1e-6)
    loaded = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    one = batch(name)
    with torch.no_grad():
        expected, actual = model(**one).logits.float(), loaded(**one).logits.float()
        without = loaded.unload()(**one).logits.float()
    scale = expected.abs().max()
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    assert (actual - expected).abs().max() <= tolerance * scale
    assert (without - expected).abs().max() > 2 * tolerance * scale


@pytest.mark.parametrize("name", ["llama", "t5", "bert", "gpt2"])
def test_the_exported_lora_has_the_loss_that_the_report_says(tmp_path, name):
    base, model = adapted(name)
    loader = batches(name, 3)
    report = export_lora(model, tmp_path / "lora", calibration=loader, progress=False)
    loaded = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    with torch.no_grad():
        before = torch.stack([model(**one).loss for one in loader]).mean()
        after = torch.stack([loaded(**one).loss for one in loader]).mean()
    assert report.loss_before == pytest.approx(float(before), abs=1e-5)
    assert report.loss_after == pytest.approx(float(after), abs=1e-5)
    assert report.loss_after != pytest.approx(report.loss_before, abs=1e-5)
    assert report.r == 6


def test_least_squares_explains_more_than_the_naive_ways():
    _, model = adapted("llama")
    loader = batches("llama")
    explained = {method: run(model, loader, method=method)[1] for method in METHODS}
    for best, *naive in zip(*(explained[method].layers for method in METHODS), strict=True):
        assert all(best.explained > other.explained for other in naive), best.path
    # Without its gate the adapter is k-of-E times too loud: worse than leaving it out.
    assert explained["mean-gate"].explained > 0 > explained["no-gate"].explained


def test_fewer_ranks_are_cut_in_the_metric_of_the_inputs():
    _, model = adapted("llama", torch.float64)
    loader = batches("llama")
    full, whole = run(model, loader)
    seen = collect(model, loader)
    for r in (1, 3, 5):
        cut, report = run(model, loader, r=r)
        assert report.r == r
        for fit, complete in zip(report.layers, whole.layers, strict=True):
            x, _, added = seen[fit.path]
            assert cut[fit.path].A.shape[0] == cut[fit.path].B.shape[1] == r
            # Eckart-Young for the outputs: what is lost are the smallest singular values of the fitted outputs.
            fitted = x @ full[fit.path].A.T @ full[fit.path].B.T
            lost = torch.linalg.svdvals(fitted)[r:].square().sum() / len(x)
            assert fit.residual == pytest.approx(complete.residual + float(lost), rel=1e-4)
            plain = torch.linalg.svd(full[fit.path].B @ full[fit.path].A, full_matrices=False)
            blind = (plain.U[:, :r] * plain.S[:r]) @ plain.Vh[:r]
            assert fit.residual < float((added - x @ blind.T).square().sum(1).mean())


def test_layers_of_different_ranks_share_one(tmp_path):
    import json

    base, model = adapted("bert", rank_pattern={"query": 4})
    report = export_lora(model, tmp_path / "lora", calibration=batches("bert"), progress=False)
    assert report.r == json.loads((tmp_path / "lora/adapter_config.json").read_text())["r"] == 6
    PeftModel.from_pretrained(base, tmp_path / "lora")
    report = export_lora(model, tmp_path / "wide", calibration=batches("bert"), r=9, progress=False)
    assert report.r == json.loads((tmp_path / "wide/adapter_config.json").read_text())["r"] == 9
    PeftModel.from_pretrained(base, tmp_path / "wide")


def test_bounded_memory_takes_the_layers_in_groups():
    _, model = adapted("bert")
    loader = batches("bert")
    passes = []

    class Counted(list):
        def __iter__(self):
            passes.append(1)
            return super().__iter__()

    whole, report = run(model, Counted(loader))
    assert len(passes) == 2, "one to calibrate, one for the loss"
    passes.clear()
    grouped, again = run(model, Counted(loader), max_memory_gb=3e-5)
    assert len(passes) > 3
    assert report == again
    for path, own in whole.items():
        assert torch.equal(own.A, grouped[path].A)


def test_the_model_is_left_as_it_is():
    _, model = adapted("bert", modules_to_save=["classifier"])
    model.train()
    model.bert.encoder.layer[0].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    hooks = count_hooks(model)
    run(model, batches("bert", 2))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert count_hooks(model) == hooks
    assert not any(layer.disable_adapters for _, layer in adapted_layers(model))
    with pytest.raises(IndexError):
        run(model, [{"input_ids": torch.full((1, 3), VOCAB * 9)}])
    assert count_hooks(model) == hooks
    assert [module.training for module in model.modules()] == modes


def test_an_untrained_adapter_has_nothing_to_explain():
    _, model = adapted("bert", init_weights=True)
    _, report = run(model, batches("bert", 2))
    assert report.explained == 1
    assert report.loss_after == pytest.approx(report.loss_before, abs=1e-6)


def test_the_report_refuses_to_claim_exactness():
    _, model = adapted("bert")
    text = str(run(model, batches("bert"))[1])
    assert "not exact" in text.splitlines()[0]
    assert "explained" in text
    assert "loss on the calibration set" in text
    assert "too good" not in text
    assert "too good" in str(run(model, batches("bert", 1, 4))[1])


def test_a_saved_adapter_calibrates_alike(tmp_path):
    base, model = adapted("bert")
    save_rank_experts(model, tmp_path / "ours")
    again = load_rank_experts(base, tmp_path / "ours")
    first, second = (run(one, batches("bert", 3))[1] for one in (model, again))
    assert first == second


def test_a_PeftModel_is_calibrated_too(tmp_path):
    from peft import get_peft_model

    base = MODELS["bert"]().eval()
    model = get_peft_model(copy.deepcopy(base), smora("bert"))
    report = export_lora(model, tmp_path / "lora", calibration=batches("bert", 3), progress=False)
    loaded = PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    with torch.no_grad():
        losses = [float(loaded(**one).loss) for one in batches("bert", 3)]
    assert report.loss_after == pytest.approx(sum(losses) / 3, abs=1e-5)


def test_many_tokens_at_once_are_added_in_parts(monkeypatch):
    _, model = adapted("bert", torch.float64)
    whole, _ = run(model, batches("bert", 2))
    monkeypatch.setattr("rank_experts.convert.calibrate._ROWS", 25)
    parts, _ = run(model, batches("bert", 2))
    for path, own in whole.items():
        torch.testing.assert_close(own.A, parts[path].A, rtol=1e-6, atol=1e-9)


class TestBadInput:
    def refused(self, tmp_path, model, error, match, **kwargs):
        hooks = count_hooks(model)
        with pytest.raises(error, match=match):
            export_lora(model, tmp_path / "lora", progress=False, **kwargs)
        assert list(tmp_path.iterdir()) == []
        assert count_hooks(model) == hooks

    def test_calibration_sets(self, tmp_path):
        _, model = adapted("bert")
        padding = batch("bert")
        padding["attention_mask"] = torch.zeros_like(padding["attention_mask"])
        self.refused(tmp_path, model, ValueError, "no batch", calibration=[])
        self.refused(tmp_path, model, ValueError, "no token that is not padding", calibration=[padding])
        self.refused(tmp_path, model, TypeError, "read only once", calibration=iter([batch("bert")]))
        self.refused(tmp_path, model, TypeError, "expected a DataLoader", calibration=batch("bert"))
        self.refused(tmp_path, model, TypeError, "Batch 0 is a tuple", calibration=[(1, 2)])
        self.refused(tmp_path, model, ValueError, "method='best'", calibration=[batch("bert")], method="best")
        self.refused(tmp_path, model, ValueError, "r=0", calibration=[batch("bert")], r=0)

    def test_non_finite_activations_name_the_layer(self, tmp_path):
        _, model = adapted("bert")
        with torch.no_grad():
            model.bert.embeddings.word_embeddings.weight[5] = float("inf")
        bad = batch("bert")
        bad["input_ids"][0, 0] = 5
        self.refused(tmp_path, model, ValueError, r"layer.0.*not finite", calibration=[bad])

    def test_models(self, tmp_path):
        _, model = adapted("bert")
        inject_rank_experts(model, smora("bert"), "second")
        self.refused(tmp_path, model, ValueError, r"with \['second'\] active", calibration=[batch("bert")])
        with pytest.raises(ValueError, match="no rank-expert adapter 'third'"):
            calibrate(model, [batch("bert")], "third")
        dense = inject_rank_experts(MODELS["bert"](), RankExpertConfig.lora(r=2, target_modules=["query"]))
        with pytest.raises(ValueError, match=r"query: adapter 'default' does not route by token"):
            calibrate(dense, [batch("bert")])


def test_moments_hold_nothing_of_the_tokens():
    _, model = adapted("bert")
    path, layer = next(adapted_layers(model))
    moments = Moments(path, layer, "default")
    sizes = {key: value.numel() for key, value in vars(moments).items() if isinstance(value, torch.Tensor)}
    for _ in range(3):
        moments.add(torch.randn(100, 32), torch.ones(100, 6))
    assert sizes == {key: value.numel() for key, value in vars(moments).items() if isinstance(value, torch.Tensor)}
    assert moments.tokens == 300
