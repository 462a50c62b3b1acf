"""Trained tokens and tied embeddings beside an adapter: PEFT's own wrappers, as with LoRA."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import models
from gates import GATES, batch, config, logits
from rank_experts import (
    RankExpertConfig,
    export_lora,
    inject_rank_experts,
    load_rank_experts,
    merge_rank_experts,
    save_rank_experts,
)

CASES = {
    "tokens": {"trainable_token_indices": [3, 5]},
    "tokens of a layer": {"trainable_token_indices": {"embed_tokens": [3, 5, 7]}},
    "tokens, tied": {"trainable_token_indices": [3, 5], "ensure_weight_tying": True},
    "embeddings, tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "head, tied": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
}
ADAPTERS = [*GATES, "lora"]


def made(adapter: str, **kwargs):
    kwargs = {"target_modules": ["q_proj"], **kwargs}
    return LoraConfig(r=4, init_lora_weights=False, **kwargs) if adapter == "lora" else config(adapter, **kwargs)


def inputs(adapter: str):
    given = batch("dense" if adapter == "lora" else adapter)
    given["input_ids"][0, :3] = torch.tensor([3, 5, 7])
    return given


def extra(names, marks=("lora_", ".rank_experts.")) -> set[str]:
    """What is trained or saved beside the adapters' own tensors."""
    return {name for name in names if not any(mark in name for mark in marks)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_as_with_lora(adapter, case, tied, tmp_path):
    """The same parameters are trained and saved; a saved model comes back; what is tied stays the same."""
    lora = get_peft_model(models.llama(tie_word_embeddings=tied), made("lora", **CASES[case]))
    lora.save_pretrained(tmp_path / "lora")
    model = get_peft_model(models.llama(tie_word_embeddings=tied), made(adapter, **CASES[case]))
    trained = [{name for name, p in one.named_parameters() if p.requires_grad} for one in (model, lora)]
    assert extra(trained[0]) == extra(trained[1])
    assert extra(trained[0])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**inputs(adapter)).loss.backward()
    optimiser.step()
    assert all(not torch.equal(model.get_parameter(name), before[name]) for name in extra(trained[0]))
    if tied:
        whole = model.get_base_model()
        assert torch.equal(whole.get_input_embeddings().weight, whole.get_output_embeddings().weight) == (
            "tied" in case or "tokens" in case
        )
    expected = logits(model, inputs(adapter))
    model.save_pretrained(tmp_path / "own")
    saved = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("own", "lora")]
    assert extra(saved[0]) == extra(saved[1])
    loads = [PeftModel.from_pretrained] if adapter == "lora" else [PeftModel.from_pretrained, load_rank_experts]
    for load in loads:
        loaded = load(models.llama(tie_word_embeddings=tied), tmp_path / "own")
        torch.testing.assert_close(logits(loaded, inputs(adapter)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("gate", GATES)
def test_trained_tokens_of_an_injected_model(gate, tmp_path):
    model = inject_rank_experts(models.llama(), made(gate, trainable_token_indices=[3, 5]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "trainable_tokens_delta" in name:
                p.add_(1.0)
    expected = logits(model, inputs(gate))
    save_rank_experts(model, tmp_path)
    loaded = load_rank_experts(models.llama(), tmp_path)
    assert torch.equal(logits(loaded, inputs(gate)), expected)
    if gate == "dense":
        merge_rank_experts(loaded, unload=True)
        torch.testing.assert_close(logits(loaded, inputs(gate)), expected, rtol=1e-4, atol=1e-5)
        export_lora(model, tmp_path / "lora")
        lora = PeftModel.from_pretrained(models.llama(), tmp_path / "lora")
        torch.testing.assert_close(logits(lora, inputs(gate)), expected, rtol=1e-4, atol=1e-5)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = next(name for name in tensors if "trainable_tokens_delta" in name)
    assert tensors[key].shape == (2, 32)


@pytest.mark.parametrize("value", [[], [-1], ["a"], [True], {"embed_tokens": []}, 3])
def test_indices_that_are_none_are_refused(value):
    with pytest.raises(TypeError, match="trainable_token_indices"):
        RankExpertConfig(trainable_token_indices=value)


def test_a_target_that_is_tied_is_refused_with_ensure_weight_tying():
    tied = models.llama(tie_word_embeddings=True)
    with pytest.raises(ValueError, match="ensure_weight_tying: target_modules names a layer that shares its weight"):
        inject_rank_experts(tied, config("dense", target_modules=["lm_head"], ensure_weight_tying=True))
