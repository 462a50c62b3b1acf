"""Small things that several test files need."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.tuners_utils import BaseTuner

from rank_experts import RankExpertConfig

TASKS = ["cola", "mnli", "rte"]

OLD_PEFT = not hasattr(BaseTuner, "_get_learnable_bias_state_dict")
needs_trained_biases = pytest.mark.skipif(OLD_PEFT, reason="this PEFT does not save trained biases, and is refused")


def token_config(**kwargs) -> RankExpertConfig:
    """A SMoRA config for tiny models, with random B so that the adapter does something."""
    defaults = dict(r=16, top_k=4, alpha=8, target_modules="all-linear", init_weights=False)
    return RankExpertConfig.smora(**(defaults | kwargs))


def task_config(**kwargs) -> RankExpertConfig:
    """A MoRE config for tiny models, likewise, with the paper's scaling and contrastive loss."""
    defaults = dict(tasks=TASKS, r=4, alpha=4, target_modules="all-linear", init_weights=False)
    defaults |= dict(rank_scaling="linear", contrastive_coef=0.1)
    return RankExpertConfig.more(**(defaults | kwargs))


def dense_config(**kwargs) -> RankExpertConfig:
    """A LoRA config for tiny models, likewise."""
    return RankExpertConfig.lora(**(dict(r=4, alpha=8, target_modules="all-linear", init_weights=False) | kwargs))


CONFIGS = {
    "token": token_config,
    "blocks": lambda **kw: token_config(**(dict(expert_rank=4, top_k=2) | kw)),
    "task": task_config,
    "dense": dense_config,
}


def fingerprint(model: torch.nn.Module) -> dict:
    """Everything of a model that must not change when something is refused."""
    return {
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "trained": [(name, p.requires_grad, p.dtype) for name, p in model.named_parameters()],
        "forwards": [name for name, module in model.named_modules() if "forward" in module.__dict__],
        "adapters": sorted(getattr(model, "peft_config", None) or {}),
        "attributes": sorted(model.__dict__),
    }


def assert_unchanged(model: torch.nn.Module, before: dict) -> None:
    """Compare a model with its fingerprint."""
    after = fingerprint(model)
    for key in ("modules", "trained", "forwards", "adapters", "attributes"):
        assert after[key] == before[key], key
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, tensor in after["tensors"].items():
        assert torch.equal(tensor, before["tensors"][name]), name


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Gradients by parameter name; parameters without one are left out."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(first: dict, second: dict, **tolerance) -> None:
    """Compare two sets of gradients, names included."""
    assert first.keys() == second.keys()
    assert first
    for name in first:
        torch.testing.assert_close(
            first[name], second[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


def nan_in_new_buffers(monkeypatch: pytest.MonkeyPatch, module) -> None:
    """What a module's kernels forget to write of its new tensors shows as NaN, or as an index that does not exist."""

    def filled(make):
        def build(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

        return build

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(module.torch, name, filled(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))
