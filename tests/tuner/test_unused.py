"""Linear layers that are not called as such: an adapter of one would do nothing, without a word."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

import models
from gates import GATES, batch, config
from helpers import assert_unchanged, fingerprint
from rank_experts import inject_rank_experts
from rank_experts.layers import adapted_layers
from rank_experts.layers.adaptable import _READ_BY

SIZES = dict(vocab_size=models.VOCAB, hidden_size=32, num_hidden_layers=1, pad_token_id=0)
ATTENTION = dict(num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, head_dim=8)
STATE_SPACE = {
    "mamba": dict(**SIZES, state_size=4, time_step_rank=4),
    "falcon_mamba": dict(**SIZES, state_size=4, time_step_rank=4),
    "mamba2": dict(**SIZES, num_heads=4, head_dim=16, state_size=4, n_groups=1),
    "falcon_h1": dict(
        **SIZES, **ATTENTION, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=1
    ),
    "nemotron_h": dict(
        **SIZES | {"num_hidden_layers": 2},
        **ATTENTION,
        hybrid_override_pattern="M*",
        mamba_num_heads=4,
        mamba_head_dim=8,
        ssm_state_size=4,
        n_groups=1,
    ),
}


def tiny(model_type: str):
    torch.manual_seed(0)
    made = transformers.AutoConfig.for_model(model_type, **STATE_SPACE[model_type])
    return transformers.AutoModelForCausalLM.from_config(made)


@pytest.mark.parametrize("model_type", STATE_SPACE)
def test_what_peft_refuses_for_lora_in_state_space_models_is_refused(model_type):
    model = tiny(model_type)
    before = fingerprint(model)
    with pytest.raises(ValueError, match="incompatible with Mamba-based models"):
        get_peft_model(tiny(model_type), LoraConfig(target_modules=["out_proj"]))
    for add in (inject_rank_experts, get_peft_model):
        with pytest.raises(TypeError, match=r"out_proj is a Linear, and .*Mixer reads its weight and never calls it"):
            add(model, config("token", target_modules=["in_proj", "out_proj"]))
    assert_unchanged(model, before)


@pytest.mark.parametrize("add", [inject_rank_experts, get_peft_model])
@pytest.mark.parametrize("model_type", STATE_SPACE)
def test_all_linear_leaves_them_out_with_a_warning(model_type, add):
    with pytest.warns(UserWarning, match=r'"all-linear" leaves out .*out_proj.*reads its weight and never calls it'):
        model = add(tiny(model_type), config("dense"))
    adapted = {path.rpartition(".")[2] for path, _ in adapted_layers(model)}
    assert "in_proj" in adapted
    assert "out_proj" not in adapted
    model.train()
    model(**batch("dense")).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_mixers_are_called_so_in_transformers():
    """A mixer that is renamed would be adapted in silence again."""
    import importlib

    found = {}
    for room in [*STATE_SPACE, "jamba", "bamba", "zamba2", "granitemoehybrid", "wavlm"]:
        module = importlib.import_module(f"transformers.models.{room}.modeling_{room}")
        found |= {name: getattr(module, name) for name in _READ_BY if hasattr(module, name)}
    assert found.keys() == _READ_BY.keys()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        return self.proj(self.attention(x, x, x)[0])


def test_torchs_attention():
    model = Attention()
    before = fingerprint(model)
    with pytest.raises(TypeError, match=r"attention.out_proj .*MultiheadAttention reads its weight"):
        inject_rank_experts(model, config("dense", target_modules=["out_proj"]))
    assert_unchanged(model, before)
    with pytest.warns(UserWarning, match=r"leaves out .*attention\.out_proj"):
        model = inject_rank_experts(model, config("dense"))
    assert [path for path, _ in adapted_layers(model)] == ["proj"]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("targets", [["linear1"], ["linear2"], ["linear1", "linear2"]])
def test_torchs_encoder_layer_uses_its_adapters_in_evaluation(gate, targets):
    """There it reads its weights, if it may: PEFT's LoRA has no effect then."""
    torch.manual_seed(0)

    def encoder():
        torch.manual_seed(1)
        layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    x = torch.randn(3, 5, 8)
    ids = {"task_ids": torch.tensor([0, 1, 2])} if gate == "task" else {}
    lora = get_peft_model(encoder(), LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()
    plain = encoder().eval()
    model = inject_rank_experts(encoder(), config(gate, target_modules=targets))
    trained = model(x, **ids).detach()
    with torch.no_grad():
        assert torch.equal(lora(x), plain(x))
        found = model.eval()(x, **ids)
    torch.testing.assert_close(found, trained)
    assert (found - plain(x)).abs().max() > 1e-3


@pytest.mark.parametrize("gate", GATES)
def test_torchs_encoder_makes_nested_tensors_of_padded_batches(gate):
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.0, batch_first=True)
    model = inject_rank_experts(nn.TransformerEncoder(layer, 2), config(gate, target_modules=["linear1"]))
    x, padding = torch.randn(3, 5, 8), torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    inputs = {"src_key_padding_mask": padding} | ({"task_ids": torch.tensor([0, 1, 2])} if gate == "task" else {})
    expected = model(x, **inputs)
    model.eval()
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"linear1: its input is a nested tensor.*use_nested_tensor = False"):
            model(x, **inputs)
        model.use_nested_tensor = False
        found = model(x, **inputs)
    torch.testing.assert_close(found[~padding], expected[~padding])


class Router(nn.Linear):
    """As Llama 4's and PhiMoE's: scores and logits."""

    def forward(self, x):
        logits = super().forward(x)
        return logits.sigmoid(), logits


class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = Router(8, 4)
        self.proj = nn.Linear(8, 8)

    def forward(self, x):
        scores, _ = self.router(x)
        return self.proj(x) * scores.sum(-1, keepdim=True)


@pytest.mark.parametrize("add", [inject_rank_experts, get_peft_model])
def test_a_layer_that_returns_several_values(add):
    x = torch.randn(3, 8)
    with pytest.raises(AttributeError):  # deep within LoRA's forward
        get_peft_model(Routed(), LoraConfig(target_modules="all-linear"))(x)
    with pytest.raises(TypeError, match="router is a Router, and Router returns several values"):
        add(Routed(), config("token", target_modules=["router"]))
    with pytest.warns(UserWarning, match=r'"all-linear" leaves out .*router: Router returns several values'):
        model = add(Routed(), config("token", target_modules="all-linear"))
    assert [path.rpartition(".")[2] for path, _ in adapted_layers(model)] == ["proj"]
    model(x).sum().backward()


def test_the_routers_of_transformers_that_return_several_values():
    from transformers.models.llama4.modeling_llama4 import Llama4Router
    from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter

    from rank_experts.layers.adaptable import why_unusable

    for kind in (Llama4Router, PhimoeTopKRouter):
        with torch.device("meta"):
            router = nn.Linear(8, 4)
        router.__class__ = kind
        assert why_unusable(router, "router", nn.Module()) == f"{kind.__name__} returns several values"
