"""ms-swift's tuner: a model with an adapter, new or from a checkpoint. Imports ms-swift."""

from __future__ import annotations

import functools
import os
from typing import Any

from peft import PeftModel, get_peft_model
from swift.pipelines.train.tuner import get_modules_to_save, get_target_modules
from swift.tuner_plugin import PeftTuner, tuners_map
from torch import nn

from ...config.config import RankExpertConfig
from . import TUNER
from .channels import DEFAULT, default_task, generate_by_channel
from .settings import read_settings


class RankExpertTuner(PeftTuner):
    """What `--tuner_type rank_experts` names; saving is PEFT's."""

    @staticmethod
    def prepare_model(args: Any, model: nn.Module) -> nn.Module:
        """Add a new adapter, by the settings in `--model_kwargs` and ms-swift's options for targets.

        Raises:
            ValueError: The training is of a kind that has no trainer for rank experts, or has no settings.
        """
        kind = getattr(args, "rlhf_type", None) or args.task_type
        settings = read_settings(args.model_kwargs)
        if kind != "causal_lm" or settings is None:
            raise ValueError(
                f"--tuner_type {TUNER} for {kind!r}: expected `swift sft` or `swift pt` of a causal language model. "
                "For other trainings use the library's own trainer, or TRL's."
            )
        config = settings.config(
            task_type="CAUSAL_LM",
            target_modules=_targets(args, model),
            target_parameters=args.target_parameters,
            modules_to_save=get_modules_to_save(args, model) or None,
        )
        return _with_tasks(get_peft_model(model, config))

    @staticmethod
    def from_pretrained(model: nn.Module, model_id: str, **kwargs: Any) -> nn.Module:
        """Load an adapter, to train on or for inference.

        Raises:
            ValueError: `RANK_EXPERTS_TASK` names no task of the adapter's.
        """
        return _with_tasks(PeftModel.from_pretrained(model, model_id, **kwargs))


def _targets(args: Any, model: Any) -> str | list[str]:
    # The library's own "all-linear" leaves out layers that nobody calls; ms-swift's knows a multimodal model's parts.
    if args.target_modules == ["all-linear"] and not model.model_meta.is_multimodal:
        return "all-linear"
    return get_target_modules(args, model)


def adapter_tasks(model: nn.Module) -> list[str]:
    """Return the tasks of a model's adapter; empty where it does not route by task, or is none of ours."""
    config = getattr(model, "peft_config", {}).get("default")
    return (config.tasks or []) if isinstance(config, RankExpertConfig) else []


def _with_tasks(model: Any) -> nn.Module:
    tasks = adapter_tasks(model)
    task = default_task(os.environ.get(DEFAULT, ""), tasks)
    model.generate = generate_by_channel(model.generate, tasks, task)
    if task is not None:
        # ms-swift's merging knows no tasks; without one, the library says that it needs one.
        model.merge_and_unload = functools.partial(model.base_model.merge_and_unload, task=task)
    return model


def register() -> None:
    """Register the tuner under its name."""
    tuners_map[TUNER] = RankExpertTuner
