"""The methods that the experiments compare: PEFT's own LoRA, and this library's adapters by their public interface.

Every setting is written out here, none is left to a default. A method's `unit` is the alpha at which an adapter's
update is multiplied by 1 (the rank of a LoRA and of MoRE, top_k of a token router), so that scales compare.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn

from rank_experts import RankExpertConfig, inject_rank_experts
from rank_experts.layers import adapted_layers


@dataclasses.dataclass(frozen=True)
class Method:
    """A method.

    Args:
        label: Its name on a page.
        kind: "lora", "token", "task" or "none" (nothing is adapted).
        unit: The alpha of scale 1.
        values: The config's.
        scales: What the development search of `languages` tries.
        per_task: Every task has an adapter of its own, trained on its own examples alone.
        router_factor: The router's learning rate relative to the experts'.
    """

    label: str
    kind: str
    unit: float = 1
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    scales: tuple[float, ...] = (1.0, 2.0)
    per_task: bool = False
    router_factor: float = 1.0

    @property
    def told(self) -> bool:
        """Whether the adapter is told the task of each example."""
        return self.kind == "task"

    def attach(self, model: nn.Module, targets: Sequence[str], alpha: float, tasks: Sequence[str]) -> nn.Module:
        """Adapt a model's linear layers, in place, and freeze the rest.

        Args:
            model: Any model.
            targets: Names of the layers.
            alpha: The scale's numerator.
            tasks: Names of the tasks; those whose adapters this model holds, where every task has one.

        Returns:
            What to call: the model itself, or PEFT's wrapper around it.
        """
        model.requires_grad_(False)
        if self.kind == "none":
            return model
        values: dict[str, Any] = self.values | {"target_modules": list(targets)}
        if self.kind == "lora":
            config = LoraConfig(lora_alpha=alpha, **values)
            first, *others = tasks if self.per_task else ["default"]
            adapted = get_peft_model(model, config, adapter_name=first)
            for name in others:
                adapted.add_adapter(name, config)
            return adapted
        values |= {"alpha": alpha, "dropout": 0.0}
        if self.told:
            values["tasks"] = list(tasks)
        return inject_rank_experts(model, RankExpertConfig(router=self.kind, **values))

    def switch(self, model: nn.Module, task: str) -> None:
        """Make a task's adapter the one that computes, where every task has one; all of them go on training."""
        model.set_adapter(task)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.requires_grad_(True)

    def groups(self, model: nn.Module, rate: float) -> list[dict[str, Any]]:
        """Return an optimiser's groups of parameters: those of the adapter's routers, and the rest."""
        # Where every task has an adapter, PEFT lets the one that is switched on alone train.
        trained = [p for name, p in model.named_parameters() if p.requires_grad or ".lora_" in name]
        adapters = [adapter for _, layer in adapted_layers(model) for adapter in layer.rank_experts.values()]
        routers = [parameter for adapter in adapters for parameter in adapter.gate_parameters()]
        known = set(map(id, routers))
        rest = [parameter for parameter in trained if id(parameter) not in known]
        groups = [{"params": rest, "lr": rate}, {"params": routers, "lr": rate * self.router_factor}]
        return [group for group in groups if group["params"]]


def lora(r: int, scales: tuple[float, ...] = (1.0, 0.5), per_task: bool = False) -> Method:
    """Return PEFT's LoRA of rank r."""
    label = f"LoRA r={r}" + (" a task" if per_task else "")
    return Method(label, "lora", r, {"r": r, "lora_dropout": 0.0, "bias": "none"}, scales, per_task)


def token(label: str, r: int, top_k: int, expert_rank: int = 1, router_factor: float = 1.0, **values: Any) -> Method:
    """Return an adapter with a token router: r ranks in experts of `expert_rank`, top_k of them a token."""
    settled = {"score_function": "sigmoid", "biased_gates": False, "load_balance": "bias", "balance_rate": 1e-3}
    settled |= {"balance_coef": 0.01, "r": r, "top_k": top_k, "expert_rank": expert_rank}
    return Method(label, "token", top_k, settled | values, router_factor=router_factor)


def more(label: str, r: int, scales: tuple[float, ...], **values: Any) -> Method:
    """Return an adapter with a task router over r nested ranks."""
    settled = {"r": r, "task_embedding_dim": None, "contrastive_temperature": 0.05, "pooling": "mean"}
    return Method(label, "task", r, settled | values, scales)


METHODS = {
    "lora_8": lora(8, (2.0, 4.0)),
    "lora_64": lora(64),
    "lora_96": lora(96),
    "lora_128": lora(128),
    "blocks_8x8_top1": token("blocks 8×8 top 1", 64, 1, 8),
    "blocks_8x8_top2": token("blocks 8×8 top 2", 64, 2, 8),
    "blocks_16x4_top2": token("blocks 16×4 top 2", 64, 2, 4),
    "blocks_32x2_top4": token("blocks 32×2 top 4", 64, 4, 2),
    "smora_64_8": token("SMoRA 64/8", 64, 8),
    "more_8": more("MoRE r=8", 8, (2.0, 4.0), rank_scaling="none", contrastive_coef=0.01),
    "more_8_paper": more("MoRE r=8, the paper's", 8, (4.0, 8.0), rank_scaling="linear", contrastive_coef=0.1),
    "lora_8_per_task": lora(8, (2.0, 4.0), per_task=True),
    "head": Method("head alone", "none", scales=(1.0,)),
}

COSTS = {
    **{f"smora_64_{k}": token(f"SMoRA 64/{k}", 64, k) for k in (1, 2, 4, 16, 32)},
    "smora_no_balancing": token("SMoRA 64/8, no balancing", 64, 8, load_balance="none"),
    "smora_fast_balancing": token("SMoRA 64/8, balance_rate 1e-2", 64, 8, balance_rate=1e-2),
    "smora_loss": token("SMoRA 64/8, balancing loss", 64, 8, load_balance="loss"),
    "smora_softmax": token("SMoRA 64/8, softmax", 64, 8, score_function="softmax"),
    "smora_router_slow": token("SMoRA 64/8, router's rate × 0.1", 64, 8, router_factor=0.1),
    "smora_router_fast": token("SMoRA 64/8, router's rate × 10", 64, 8, router_factor=10.0),
    "blocks_8x8_top4": token("blocks 8×8 top 4", 64, 4, 8),
}
"""What top_k, blocks, balancing and the router's rate cost, for `conflict`."""

ALL = METHODS | COSTS
