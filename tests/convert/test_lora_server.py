"""Exported LoRAs under a LoRA server's rules: our own reader of vLLM's, and a forward by them alone.

The rules are those of vLLM's `PEFTHelper`, `LoRAModel.from_local_checkpoint` and `parse_fine_tuned_lora_name`: one `r`
and one `lora_alpha` for all layers, no DoRA, no bias, no modules to save, tensors named
`base_model.model.<module>.lora_A.weight` and `.lora_B.weight`, modules that the server's model knows, and a rank of at
most `max_lora_rank`. `rank_pattern` and `alpha_pattern` are not read.
"""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from safetensors import safe_open

from helpers import TASKS, dense_config, task_config, token_config
from models import MODELS, batch
from rank_experts import export_lora, export_loras, inject_rank_experts, use_task

# What vLLM adapts in each architecture, by the last component of a module's name.
KNOWN = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head", "embed_tokens"},
    "qwen3": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head", "embed_tokens"},
}


def read_as_a_server(folder, known, max_lora_rank):
    """Module name to (A, B, scale), or an exception where a LoRA server would refuse the folder."""
    config = json.loads((folder / "adapter_config.json").read_text())
    r, alpha = config["r"], config["lora_alpha"]
    assert config["target_modules"], "a required field"
    if config.get("modules_to_save") or config.get("use_dora") or config.get("bias", "none") != "none":
        raise ValueError("vLLM supports neither modules_to_save nor DoRA nor bias")
    if r > max_lora_rank:
        raise ValueError(f"LoRA rank {r} is greater than max_lora_rank {max_lora_rank}")
    scale = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    factors = {}
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            parts = name.split(".")
            if parts[:2] != ["base_model", "model"] or parts[-1] != "weight" or parts[-2] not in ("lora_A", "lora_B"):
                raise ValueError(f"{name} is unsupported LoRA weight")
            if parts[-3] not in known:
                raise ValueError(f"expected target modules in {known} but received {parts[-3]}")
            factors.setdefault(".".join(parts[2:-2]), {})[parts[-2]] = file.get_tensor(name)
    # The server keeps one buffer of r ranks for all layers.
    assert all(own["lora_A"].shape[0] == own["lora_B"].shape[1] == r for own in factors.values())
    return {name: (own["lora_A"], own["lora_B"], scale) for name, own in factors.items()}


@torch.no_grad()
def serve(base, factors, name):
    """The base model with y + scale · B (A x) beside each named layer, and nothing else."""
    model = copy.deepcopy(base)
    for path, (A, B, scale) in factors.items():
        model.get_submodule(path).register_forward_hook(
            lambda _, args, output, A=A, B=B, scale=scale: output + args[0] @ A.T @ B.T * scale
        )
    return model(**batch(name)).logits


def close(actual, expected):
    # Relative to the largest logit; a server adds up in another order than PEFT.
    return (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", KNOWN)
def test_every_tasks_lora_is_served(tmp_path, name):
    base = MODELS[name]().eval()
    model = inject_rank_experts(copy.deepcopy(base), task_config(r=6, rank_pattern={"q_proj": 9}, alpha=12)).eval()
    export_loras(model, tmp_path / "loras")
    for task in TASKS:
        factors = read_as_a_server(tmp_path / "loras" / task, KNOWN[name], max_lora_rank=16)
        with use_task(model, task), torch.no_grad():
            expected = model(**batch(name)).logits
        assert not close(base(**batch(name)).logits, expected)
        assert close(serve(base, factors, name), expected)


def test_patterns_that_a_server_does_not_read_are_folded_in(tmp_path):
    base = MODELS["llama"]().eval()
    config = dense_config(rank_pattern={"q_proj": 9}, alpha_pattern={"q_proj": 2, "up_proj": 30})
    model = inject_rank_experts(copy.deepcopy(base), config).eval()
    export_lora(model, tmp_path / "lora")
    factors = read_as_a_server(tmp_path / "lora", KNOWN["llama"], max_lora_rank=16)
    with torch.no_grad():
        assert close(serve(base, factors, "llama"), model(**batch("llama")).logits)


def test_a_calibrated_lora_is_served_at_the_rank_asked_for(tmp_path):
    model = inject_rank_experts(MODELS["llama"](), token_config()).eval()
    report = export_lora(model, tmp_path / "lora", calibration=[batch("llama", 32)], r=8, progress=False)
    read_as_a_server(tmp_path / "lora", KNOWN["llama"], max_lora_rank=8)
    assert report.r == 8


def test_the_reader_refuses_what_a_server_refuses(tmp_path):
    model = inject_rank_experts(MODELS["llama"](), dense_config(r=9)).eval()
    export_lora(model, tmp_path / "lora")
    with pytest.raises(ValueError, match="greater than max_lora_rank 8"):
        read_as_a_server(tmp_path / "lora", KNOWN["llama"], max_lora_rank=8)
    with pytest.raises(ValueError, match="received"):
        read_as_a_server(tmp_path / "lora", {"q_proj"}, max_lora_rank=16)
    bert = inject_rank_experts(MODELS["bert"](), dense_config(target_modules=["query"], modules_to_save=["classifier"]))
    export_lora(bert, tmp_path / "bert")
    with pytest.raises(ValueError, match="modules_to_save"):
        read_as_a_server(tmp_path / "bert", {"query"}, max_lora_rank=16)
