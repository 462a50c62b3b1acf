"""ms-swift's trainer and its arguments, with what rank experts need. Imports ms-swift.

The arguments are checked before the model is loaded. The trainer moves the balancing bias, adds auxiliary losses where
ms-swift computes a loss of its own, and hands on each row's task. For other tuners both do what ms-swift's own do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from swift.trainers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerFactory
from torch import nn

from ...config.config import RankExpertConfig
from ...training.trainer import RankExpertTrainerMixin
from . import TUNER
from .channels import channel_ids, check_dataset
from .settings import check_arguments, check_rows, read_settings
from .tuner import adapter_tasks

KIND = "causal_lm"
"""ms-swift's name for the kind of training that `swift sft` and `swift pt` are."""


@dataclass
class RankExpertArguments(Seq2SeqTrainingArguments):
    """ms-swift's training arguments, and those of its others that must be known to check them.

    ms-swift fills in each field that has the name of an option.
    """

    model_kwargs: dict[str, Any] | None = None
    adapters: list[str] = field(default_factory=list)
    packing: bool = False
    padding_free: bool = False
    lora_rank: int = 8
    lora_alpha: float = 32.0
    lora_dropout: float = 0.05
    lora_bias: str = "none"
    lora_dtype: str | None = None
    lorap_lr_ratio: float | None = None
    use_rslora: bool = False
    use_dora: bool = False
    init_weights: Any = True

    def __post_init__(self) -> None:
        check_arguments(self)
        super().__post_init__()


class RankExpertSwiftTrainer(RankExpertTrainerMixin, Seq2SeqTrainer):
    """ms-swift's trainer for causal language models, with rank experts' losses, balancing and tasks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tasks = adapter_tasks(self.accelerator.unwrap_model(self.model))
        if self.args.tuner_type == TUNER:
            self._check_adapter()
        for dataset in (self.train_dataset, self.eval_dataset) if self.tasks else ():
            check_dataset(dataset, self.tasks)

    def _check_adapter(self) -> None:
        # An adapter from a checkpoint need not be what the arguments describe.
        config = self.accelerator.unwrap_model(self.model).peft_config["default"]
        where = self.args.resume_from_checkpoint or next(iter(self.args.adapters), None)
        if not isinstance(config, RankExpertConfig):
            raise ValueError(
                f"--tuner_type {TUNER}, and the adapter of {where} is of peft_type {config.peft_type}: expected "
                "RANK_EXPERTS."
            )
        check_rows(self.args, config.tasks)
        if (settings := read_settings(self.args.model_kwargs)) is not None:
            settings.check_same(config, where or "the model")

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss, each row for the task that its channel names."""
        if self.tasks:
            ids = channel_ids(inputs.get("channel"), self.tasks, len(inputs["labels"]))
            inputs["task_ids"] = torch.tensor(ids, device=inputs["labels"].device)
        return super().compute_loss(model, inputs, *args, **kwargs)


def register() -> None:
    """Put the trainer and its arguments where ms-swift looks for those of its own.

    ms-swift takes both from the kind of training alone: a tuner cannot name a trainer, callbacks are named by the user,
    and only a trainer sees a row's channel.

    Raises:
        RuntimeError: Another plugin has done so before.
    """
    for mapping, base, own in (
        (TrainerFactory.TRAINER_MAPPING, Seq2SeqTrainer, RankExpertSwiftTrainer),
        (TrainerFactory.TRAINING_ARGS_MAPPING, Seq2SeqTrainingArguments, RankExpertArguments),
    ):
        path = f"{own.__module__}.{own.__qualname__}"
        if (found := mapping[KIND]) not in (f"swift.trainers.{base.__name__}", path):
            raise RuntimeError(
                f"Another plugin trains {KIND!r} with {found}: expected ms-swift's own {base.__name__}. Name one of "
                "the two in --external_plugins."
            )
        mapping[KIND] = path
