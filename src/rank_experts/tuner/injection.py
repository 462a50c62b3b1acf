"""Putting adapters into a model in place, without a wrapper around it."""

from __future__ import annotations

import copy

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..config.config import RankExpertConfig
from ..layers.linear import adapted_layers
from .names import check_adapter_name
from .targets import find_targets
from .tuner import RankExpertModel

# What PeftModel's classes by task type train and save in full.
_HEADS: dict[str | None, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def inject_rank_experts(
    model: nn.Module,
    config: RankExpertConfig,
    adapter_name: str = "default",
    *,
    autocast_adapter_dtype: bool = True,
    low_cpu_mem_usage: bool = False,
) -> nn.Module:
    """Put rank-expert adapters into a model, in place, and freeze the rest.

    Args:
        model: Any model with linear layers; it keeps its class and its methods.
        config: What to inject and where. A task_type whose head is new to the model (SEQ_CLS, TOKEN_CLS,
            QUESTION_ANS) adds that head to modules_to_save, as `get_peft_model` does.
        adapter_name: A name that the model does not have yet. The new adapter becomes the active one.
        autocast_adapter_dtype: Keep the adapter in float32 where the base is float16 or bfloat16, as PEFT does.
        low_cpu_mem_usage: Create the adapter on the meta device, to be filled by loading.

    Returns:
        The same model.

    Raises:
        ValueError: Nothing matches the config's target_modules, the ranks do not divide into experts, or the name
            exists or cannot be used (see docs/works-with.md). The model is untouched then.
        TypeError: A matched module is not a linear layer, or `config` is not a `RankExpertConfig`.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
        >>> config = RankExpertConfig.smora(r=16, top_k=4, target_modules=["query", "value"])
        >>> model = inject_rank_experts(model, config)
    """
    if not isinstance(config, RankExpertConfig):
        raise TypeError(f"config is a {type(config).__name__}: expected a RankExpertConfig, for instance .smora().")
    if isinstance(model, PeftModel):
        raise TypeError("model is a PeftModel already: add an adapter with model.add_adapter(name, config).")
    for path, layer in adapted_layers(model):
        if adapter_name in layer.rank_experts:
            raise ValueError(
                f"{path} has an adapter {adapter_name!r} already. Choose another adapter_name, or delete the old one "
                "first."
            )
    check_adapter_name(model, adapter_name)
    config = copy.deepcopy(config)  # PEFT writes what "all-linear" stands for into the config that it is given.
    if heads := _HEADS.get(config.task_type):
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or ()), *heads]))
    find_targets(model, config)
    if config.base_model_name_or_path is None and isinstance(model, PreTrainedModel):
        config.base_model_name_or_path = model.name_or_path or None
    tuner = RankExpertModel(model, config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
    tuner._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
    return model
