"""What an adapter's files say of it."""

from __future__ import annotations

import json

import pytest
import torch

from helpers import dense_config, task_config, token_config
from models import llama
from rank_experts import RankExpertConfig, inject_rank_experts, save_rank_experts
from rank_experts.inspection import format_report, inspect_adapter
from rank_experts.model import adapted_layers


def saved(folder, config):
    model = inject_rank_experts(llama(), config)
    model.peft_config["default"].base_model_name_or_path = "some/llama"
    return model, folder


def test_a_task_router_shows_ranks_and_similarity(tmp_path):
    model, folder = saved(tmp_path, task_config())
    save_rank_experts(model, folder)
    report = json.loads(json.dumps(inspect_adapter(folder)))
    layers = dict(adapted_layers(model))
    assert report["tasks"] == ["cola", "mnli", "rte"]
    assert report["layers"] == len(layers)
    assert report["parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    cosines = []
    for path, layer in layers.items():
        router = layer.rank_expert_router["default"]
        ranks = router(torch.arange(3)).indices.tolist()
        assert [report["chosen_ranks"][task][path] for task in report["tasks"]] == ranks
        e = router.task_embedding
        cosines.append(torch.cosine_similarity(e[:, None], e[None], dim=-1))
    expected = torch.stack(cosines).mean(0)
    torch.testing.assert_close(torch.tensor(report["task_similarity"]), expected, atol=1e-4, rtol=0)
    text = format_report(report)
    assert "some/llama" in text
    assert "MoRE" in text
    assert "mnli" in text


def test_a_token_router_shows_its_balance(tmp_path):
    model, folder = saved(tmp_path, token_config())
    for _, layer in adapted_layers(model):
        layer.rank_expert_router["default"].balance_bias[:2] = torch.tensor([0.5, -0.25])
    save_rank_experts(model, folder)
    report = inspect_adapter(folder)
    bias = next(iter(report["balance_bias"].values()))
    assert bias == pytest.approx({"mean_abs": 0.75 / 16, "min": -0.25, "max": 0.5}, abs=1e-6)
    assert report["method"] == "SMoRA, 4 of 16 ranks a token"
    assert "from -0.2500 to 0.5000" in format_report(report)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        (dense_config(), "LoRA, rank 4"),
        (RankExpertConfig.mixture(4, 2, 1, target_modules="all-linear"), "mixture of LoRAs, 1 of 4 experts of rank 2"),
    ],
)
def test_other_methods_are_named(tmp_path, config, method):
    model, folder = saved(tmp_path, config)
    save_rank_experts(model, folder)
    assert format_report(inspect_adapter(folder)).startswith(method)


def test_files_that_are_no_adapters(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        inspect_adapter(tmp_path / "none")
    model, folder = saved(tmp_path, dense_config())
    save_rank_experts(model, folder)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="damaged"):
        inspect_adapter(folder)
