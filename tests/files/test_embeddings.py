"""Whole embeddings in an adapter's files, and models that have none. PEFT's LoRA is the control."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainingArguments

import models
from helpers import dense_config, task_config, token_config
from rank_experts import export_lora, inject_rank_experts, load_rank_experts, save_rank_experts
from rank_experts.files.loading import restore_rank_experts
from rank_experts.training.trainer import RankExpertTrainer

WEIGHTS = "adapter_model.safetensors"
HEAD = "base_model.model.lm_head.base_layer.weight"
TARGETS = {"target_modules": ["q_proj", "lm_head"]}
CONFIGS = {"token": token_config, "task": task_config, "dense": dense_config}


def logits(model):
    known = getattr(model, "peft_config", {})
    is_routed = any(getattr(config, "router", None) == "task" for config in known.values())
    ids = {"task_ids": torch.tensor([0, 1, 2, 0])} if is_routed else {}
    return model.eval()(**models.batch("llama", labels=False), **ids).logits


@pytest.mark.parametrize("gate", CONFIGS)
@pytest.mark.parametrize("saved_by", ["own", "peft", "regular expression"])
def test_the_frozen_weight_of_an_adapted_head_is_not_written(gate, saved_by, tmp_path):
    targets = {"target_modules": r".*\.q_proj|lm_head"} if saved_by == "regular expression" else TARGETS
    model = get_peft_model(models.llama(), CONFIGS[gate](**targets))
    if saved_by == "own":
        save_rank_experts(model, tmp_path)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert "base_model.model.lm_head.rank_experts.A" in tensors
    assert all(".rank_experts." in name for name in tensors)
    for loaded in (load_rank_experts(models.llama(), tmp_path), PeftModel.from_pretrained(models.llama(), tmp_path)):
        assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("saved_by", ["own", "peft"])
def test_embeddings_are_written_where_they_are_asked_for_and_read_where_they_lie(saved_by, tmp_path):
    model = get_peft_model(models.llama(), dense_config(**TARGETS))
    with torch.no_grad():
        model.base_model.model.lm_head.base_layer.weight.add_(1.0)
    if saved_by == "own":
        save_rank_experts(model, tmp_path, save_embedding_layers=True)
    else:
        model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert HEAD in load_file(tmp_path / WEIGHTS)
    for loaded in (load_rank_experts(models.llama(), tmp_path), PeftModel.from_pretrained(models.llama(), tmp_path)):
        assert torch.equal(logits(loaded), logits(model))
    # An old checkpoint has it too, and goes on.
    resumed = inject_rank_experts(models.llama(), dense_config(**TARGETS))
    restore_rank_experts(resumed, tmp_path)
    assert torch.equal(logits(resumed), logits(model))


def test_the_embeddings_of_a_resized_vocabulary_are_written(tmp_path):
    models.llama().save_pretrained(tmp_path / "base")
    for name, targets in {"plain": ["q_proj"], "head": ["q_proj", "lm_head"]}.items():
        base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        base.resize_token_embeddings(models.VOCAB + 3)
        model = get_peft_model(base, dense_config(target_modules=targets))
        save_rank_experts(model, tmp_path / "own")
        model.save_pretrained(tmp_path / "peft")
        names = {
            "plain": {"base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight"},
            "head": {HEAD},
        }[name]
        for way in ("own", "peft"):
            written = load_file(tmp_path / way / WEIGHTS)
            assert {key for key in written if ".rank_experts." not in key} == names
            assert all(written[key].shape[0] == models.VOCAB + 3 for key in names)


def test_every_export_leaves_the_frozen_head_out(tmp_path):
    model = inject_rank_experts(models.llama(), task_config(**TARGETS))
    for task in ("cola", "rte"):
        export_lora(model, tmp_path / task, task=task)
        assert {name.rpartition(".lora_")[1] for name in load_file(tmp_path / task / WEIGHTS)} == {".lora_"}
    exported = PeftModel.from_pretrained(models.llama(), tmp_path / "rte").eval()
    batch = models.batch("llama", labels=False)
    expected = model.eval()(**batch, task_ids=torch.full((4,), 2)).logits
    torch.testing.assert_close(exported(**batch).logits, expected)


def test_a_checkpoint_of_an_adapted_head_is_the_adapter_alone(tmp_path):
    rows = [{"input_ids": [3, 4, 5], "attention_mask": [1] * 3, "labels": [3, 4, 5]}] * 8
    model = inject_rank_experts(models.llama(), dense_config(**TARGETS))
    arguments = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = RankExpertTrainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model(str(tmp_path / "end"))
    assert all(".rank_experts." in name for name in load_file(tmp_path / "end" / WEIGHTS))


SMALL = {
    "ConvNextForImageClassification": dict(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2),
    "SegformerForImageClassification": dict(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], num_attention_heads=[1, 2],
        patch_sizes=[3, 3], strides=[2, 2], mlp_ratios=[2, 2], decoder_hidden_size=16,
    ),
    "RegNetForImageClassification": dict(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=8, layer_type="x"
    ),
    "CanineForSequenceClassification": dict(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_hash_functions=2,
        num_hash_buckets=32,
    ),
    "ResNetForImageClassification": dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    "CLIPForImageClassification": dict(
        vision_config=dict(
            hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=16,
            patch_size=8,
        ),
        text_config=dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2),
    ),
}  # fmt: skip


def vision(name):
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(**SMALL[name], num_labels=3)).eval()


@pytest.mark.parametrize("name", SMALL)
def test_models_that_have_no_embeddings_of_tokens(name, tmp_path):
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    if name.startswith("Canine"):
        inputs = {"input_ids": torch.randint(1, 200, (2, 32))}
    paths = [path for path, module in vision(name).named_modules() if isinstance(module, nn.Linear)]
    assert paths
    lora = get_peft_model(vision(name), LoraConfig(target_modules=paths))
    lora.save_pretrained(tmp_path / "lora")
    PeftModel.from_pretrained(vision(name), tmp_path / "lora")

    model = inject_rank_experts(vision(name), dense_config(target_modules=paths)).eval()
    save_rank_experts(model, tmp_path / "own")
    wrapped = get_peft_model(vision(name), dense_config(target_modules=paths)).eval()
    wrapped.save_pretrained(tmp_path / "peft")
    for folder, saved in (("own", model), ("peft", wrapped)):
        expected = saved(**inputs).logits
        for load in (load_rank_experts, PeftModel.from_pretrained):
            torch.testing.assert_close(load(vision(name), tmp_path / folder).eval()(**inputs).logits, expected)
    restore_rank_experts(model, tmp_path / "own")


def test_buffers_of_integers_in_modules_to_save_are_restored(tmp_path):
    def build():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        return inject_rank_experts(network, dense_config(target_modules=["0"], modules_to_save=["1"]))

    model = build().train()
    for _ in range(3):
        model(torch.randn(5, 4))
    save_rank_experts(model, tmp_path)
    assert load_file(tmp_path / WEIGHTS)["base_model.model.1.num_batches_tracked"] == 3
    resumed = build()
    restore_rank_experts(resumed, tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    # Still checked: an integer in place of a number is damage.
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["base_model.model.1.weight"] = tensors["base_model.model.1.weight"].long()
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"1\.weight"):
        restore_rank_experts(build(), tmp_path)
