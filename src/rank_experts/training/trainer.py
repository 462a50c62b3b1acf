"""What `transformers.Trainer` needs to train rank experts on several tasks.

`RankExpertTrainer` is `Trainer` with `RankExpertTrainerMixin` before it. The mixin fits any subclass of `Trainer`:

    class Trainer(RankExpertTrainerMixin, trl.SFTTrainer): ...

It draws batches by a sampling law (`tasks.py`), evaluates by task, writes loads and auxiliary losses into the logs,
moves the balancing bias, sets learning rates for routers and heads, and saves the adapter instead of the model.
`RankExpertCallback` (`callbacks.py`) alone moves the bias under any other trainer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from ..calls.scope import RoutingScope
from ..calls.use_task import routing_scopes
from ..files.loading import restore_rank_experts
from ..files.saving import gather_adapter, write_adapter
from ..layers.linear import adapted_layers
from ..messages import nearest, warn_once
from .callbacks import RankExpertCallback
from .checkpoints import active_adapter, check_configs, owner_of_all_that_trains, write_configs
from .groups import roles, split_groups
from .heads import MultiTaskClassifier
from .metrics import Metric, as_array, find_metric
from .mixtures import TASK_COLUMN, TaskCollator, TaskMixture, TaskPart, TaskSampler
from .ranks import chosen_ranks

if TYPE_CHECKING:
    from transformers import EvalPrediction

_Base: Any = object  # To a type checker: whatever Trainer the mixin stands before.


class RankExpertTrainerMixin(_Base):
    """Training on several tasks, for a subclass of `Trainer`; see `RankExpertTrainer` for the arguments."""

    compute_metrics: Any
    data_collator: Any
    preprocess_logits_for_metrics: Any
    _signature_columns: Any

    def __init__(
        self,
        *args: Any,
        metrics: Mapping[str, str | Metric | Sequence[str | Metric]] | None = None,
        sampling: str | None = None,
        temperature: float = 2.0,
        mixed_batches: bool = True,
        epoch_size: int | None = None,
        router_learning_rate: float | None = None,
        head_learning_rate: float | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(mixture := kwargs.get("eval_dataset"), TaskMixture):
            kwargs["eval_dataset"] = dict(mixture.parts)
        super().__init__(*args, **kwargs)
        self.sampling = sampling or "balanced"
        self.temperature = temperature
        self.mixed_batches = mixed_batches
        self.epoch_size = epoch_size
        self.router_learning_rate = router_learning_rate
        self.head_learning_rate = head_learning_rate
        self._task_metrics = self._checked_metrics(metrics)
        streams = isinstance(self.train_dataset, IterableDataset)
        if streams and (sampling is not None or not mixed_batches or epoch_size is not None):
            raise ValueError(
                f"sampling={sampling!r}, mixed_batches={mixed_batches}, epoch_size={epoch_size} with a streaming "
                f"train_dataset, a {type(self.train_dataset).__name__}, whose order is its own. Leave them out and mix "
                "the streams (datasets.interleave_datasets), or load the data into memory."
            )
        if _knows_tasks(self.train_dataset) or self._task_metrics:
            self.data_collator = TaskCollator(self.data_collator)
        elif sampling is not None:
            raise ValueError(
                f"sampling={sampling!r} with a train_dataset that does not say which task an example is of. Build it "
                f"with TaskMixture, or give it a column {TASK_COLUMN!r}."
            )
        if self._task_metrics and self.preprocess_logits_for_metrics is None:
            self.preprocess_logits_for_metrics = self._next_tokens
        if self.compute_loss_func is not None:
            warn_once(
                "compute_loss_func replaces the loss that holds the auxiliary loss of rank experts: add "
                "outputs.rank_expert_loss, where outputs has it, to what the function returns."
            )
        callbacks = [cb for cb in self.callback_handler.callbacks if isinstance(cb, RankExpertCallback)]
        self._balance = callbacks[0] if callbacks else RankExpertCallback()
        if not callbacks:
            self.add_callback(self._balance)
        self.add_callback(_EpochOfSampler(self))
        self._sampler: TaskSampler | None = None
        self._heard: tuple[Any, list[RoutingScope]] = (None, [])
        self._auxiliary: list[tuple[Tensor, Tensor | None]] = []
        self._auxiliary_sum: Any = 0.0
        self._auxiliary_count = 0

    # Data

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if (ids := _task_ids(dataset)) is None:
            return super()._get_train_sampler(train_dataset)
        lengths = None
        if self.args.train_sampling_strategy == "group_by_length":
            lengths = [len(dataset[i]["input_ids"]) for i in range(len(dataset))]
        self._sampler = TaskSampler(
            ids,
            self._train_batch_size,
            self.sampling,
            self.temperature,
            mixed=self.mixed_batches,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            epoch_size=self.epoch_size,
            lengths=lengths,
            # accelerate deals the batches out; the sampler needs the number only to end on a full round.
            num_replicas=self.accelerator.num_processes,
        )
        return self._sampler

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if TASK_COLUMN not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, TASK_COLUMN]

    # Loss

    def _keep_auxiliary(self, outputs: Any) -> None:
        # With the model's own loss, which holds it, where there is one.
        if torch.is_grad_enabled() and (loss := getattr(outputs, "rank_expert_loss", None)) is not None:
            self._auxiliary.append((loss, getattr(outputs, "loss", None)))

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss as the trainer does, and add the auxiliary loss where that bypasses `outputs.loss`."""
        may_bypass = self._may_bypass_model_loss(inputs)
        self._auxiliary.clear()
        if self._heard[0] is not self.model:  # Walking through a large model takes long.
            self._heard = self.model, routing_scopes(self.model)
        scopes = self._heard[1]
        for scope in scopes:
            scope.listeners.append(self._keep_auxiliary)
        try:
            result = super().compute_loss(model, inputs, *args, **kwargs)
            found = list(self._auxiliary)
        finally:
            for scope in scopes:
                scope.listeners.remove(self._keep_auxiliary)
            self._auxiliary.clear()
        if not found:
            return result
        auxiliary = _sum([loss for loss, _ in found])
        self._auxiliary_sum = self._auxiliary_sum + auxiliary.detach()
        self._auxiliary_count += 1
        if not may_bypass:
            return result
        total = result[0] if isinstance(result, tuple) else result
        missing = [loss for loss, models_loss in found if not _depends(total, loss, models_loss)]
        if not missing:
            return result
        auxiliary = _sum(missing)
        num_items = kwargs.get("num_items_in_batch", args[1] if len(args) > 1 else None)
        # An attribute of newer trainers.
        is_scaled = getattr(self, "loss_is_scaled_for_ga", None) is not False
        if self.model_accepts_loss_kwargs and num_items is not None and is_scaled:
            # The forwards of a step add up then, and each adds a mean.
            auxiliary = auxiliary / self.current_gradient_accumulation_steps
        if isinstance(result, tuple):
            return (result[0] + auxiliary, *result[1:])
        return result + auxiliary

    def _may_bypass_model_loss(self, inputs: dict[str, Any]) -> bool:
        if self.compute_loss_func is not None:
            return False
        after = type(self).__mro__[type(self).__mro__.index(RankExpertTrainerMixin) + 1 :]
        owner = next(cls for cls in after if "compute_loss" in cls.__dict__)
        # A subclass may look at outputs.loss, or compute its own, as TRL's from log-probabilities: see _depends.
        return owner is not Trainer or (self.label_smoother is not None and "labels" in inputs)

    # Optimiser

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Leave task embeddings out of weight decay: those of tasks that are not being trained must not shrink."""
        kept = {
            id(adapter.task_embedding)
            for _, layer in adapted_layers(model)
            for adapter in layer.rank_experts.values()
            if adapter.settings.router == "task"
        }
        parameters = dict(model.named_parameters())
        return [name for name in super().get_decay_parameter_names(model) if id(parameters.get(name)) not in kept]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create the optimiser as `Trainer` does, with groups of their own for routers and heads where asked."""
        created = self.optimizer is None
        optimizer = super().create_optimizer(*(() if model is None else (model,)))
        if created:
            rates = {"router": self.router_learning_rate, "head": self.head_learning_rate}
            known = roles(self.model if model is None else model)
            optimizer.param_groups[:] = split_groups(optimizer.param_groups, known, rates)
        return optimizer

    # Evaluation

    def _checked_metrics(self, metrics: Mapping[str, Any] | None) -> dict[str, dict[str, Metric]]:
        if not metrics:
            return {}
        tasks = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        if unknown := [name for name in metrics if name not in tasks]:
            raise ValueError(f"metrics for {unknown}, which eval_dataset lacks.{nearest(unknown[0], tasks)}")
        if missing := [name for name in tasks if name not in metrics]:
            raise ValueError(f"metrics lacks the tasks {missing} of eval_dataset: each needs one for the mean.")
        checked = {}
        for name, wanted in metrics.items():
            listed = [wanted] if isinstance(wanted, str) or callable(wanted) else list(wanted)
            checked[name] = dict(find_metric(metric) for metric in listed)
        return checked

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate; with `metrics`, task by task, each by its own metrics, and add `eval_mean`, the tasks' mean.

        A task with several metrics counts with their mean, as in GLUE.
        """
        given = eval_dataset
        eval_dataset = self.eval_dataset if given is None else given
        if isinstance(eval_dataset, TaskMixture):
            eval_dataset = given = dict(eval_dataset.parts)
        if not self._task_metrics or not isinstance(eval_dataset, dict):
            return super().evaluate(given, ignore_keys, metric_key_prefix)
        results: dict[str, float] = {}
        scores = []
        own = self.compute_metrics
        try:
            for name, dataset in eval_dataset.items():
                self.compute_metrics = lambda prediction, name=name: self._score(name, prediction)
                prefix = f"{metric_key_prefix}_{name}"
                results |= super().evaluate(name if given is None else dataset, ignore_keys, prefix)
                values = [results[f"{prefix}_{metric}"] for metric in self._task_metrics[name]]
                scores.append(sum(values) / len(values))
        finally:
            self.compute_metrics = own
        mean = {f"{metric_key_prefix}_mean": sum(scores) / len(scores)}
        self.log(dict(mean))
        return results | mean

    def _score(self, task: str, prediction: EvalPrediction) -> dict[str, float]:
        values, labels = as_array(prediction.predictions), as_array(prediction.label_ids)
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, MultiTaskClassifier):
            values = model.predictions(values, task)
        elif values.ndim == 2 and labels.ndim == 1:
            values = values[:, 0] if values.shape[1] == 1 else values.argmax(-1)
        return {name: metric(values, labels) for name, metric in self._task_metrics[task].items()}

    def _next_tokens(self, logits: Any, labels: Tensor) -> Tensor:
        # Token ids in place of (B, L, vocabulary) logits, which would not fit into memory; aligned with the labels.
        logits = logits[0] if isinstance(logits, (tuple, list)) else logits
        if logits.dim() != 3:
            return logits
        tokens = logits.argmax(-1)
        if self.model.config.is_encoder_decoder:
            return tokens
        return torch.cat([labels[:, :1], tokens[:, :-1]], 1)

    # Logs

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the auxiliary loss, the loads and the tasks' ranks beside the training loss."""
        if "loss" in logs:
            if self._auxiliary_count:
                logs["auxiliary_loss"] = round(float(self._auxiliary_sum) / self._auxiliary_count, 6)
            self._auxiliary_sum, self._auxiliary_count = 0.0, 0
            logs.update(self._balance.take_statistics())
            logs.update(chosen_ranks(self.model))
        super().log(logs, *args, **kwargs)

    # Checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer` does.

        Raises:
            ValueError: The checkpoint to go on from is of adapters that compute something else.
        """
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        if isinstance(folder, (str, os.PathLike)):
            check_configs(self.accelerator.unwrap_model(self.model), Path(folder))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Save as `Trainer` does, and beside a whole model's tensors what its adapters compute with them."""
        super().save_model(output_dir, *args, **kwargs)
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        if self.args.should_save and folder.is_dir():
            write_configs(self.accelerator.unwrap_model(self.model), folder)

    def _adapter_only(self) -> nn.Module | None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return None
        return owner_of_all_that_trains(self.accelerator.unwrap_model(self.model))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if (owner := self._adapter_only()) is None:
            super()._save(output_dir, state_dict)
            return
        if not self.args.should_save:
            return
        folder = self.args.output_dir if output_dir is None else output_dir
        os.makedirs(folder, exist_ok=True)
        # Whoever should save is asked, the first process of each node with save_on_each_node for instance.
        write_adapter(Path(folder), *gather_adapter(owner, folder, active_adapter(owner)))
        if isinstance(model := self.accelerator.unwrap_model(self.model), MultiTaskClassifier):
            model.save_heads(folder)
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    def _restore(self, owner: nn.Module, folder: str) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if isinstance(model, MultiTaskClassifier):
            model.check_heads(folder)  # Both or neither.
        restore_rank_experts(owner, folder, active_adapter(owner))
        if isinstance(model, MultiTaskClassifier):
            model.load_heads(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if (owner := self._adapter_only()) is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._restore(owner, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if (owner := self._adapter_only()) is None:
            super()._load_best_model()
        else:
            self._restore(owner, self.state.best_model_checkpoint)


class RankExpertTrainer(RankExpertTrainerMixin, Trainer):
    """`Trainer` for rank experts on several tasks.

    Takes what `Trainer` takes. `train_dataset` may be a `TaskMixture`, or a dataset with a column "task_ids" (any
    other is sampled as `Trainer` does), and `eval_dataset` a `TaskMixture`, or a dict of task name to dataset.

    Args:
        metrics: Task name to a metric's name (`metrics.METRICS`), a function (predictions, labels) → score, or
            several. Then `eval_<task>_<metric>` and `eval_mean` are reported; `metric_for_best_model="mean"` works.
        sampling: The sampling law, "balanced" where left out; see `tasks.sampling_weights`.
        temperature: For sampling="temperature".
        mixed_batches: False: every batch of a process is of one task.
        epoch_size: Examples an epoch; None: as many as there are. See `TaskSampler`.
        router_learning_rate: For routers; None: the same as for the experts.
        head_learning_rate: For a `MultiTaskClassifier`'s heads; None: the same.

    An adapter that was injected with `inject_rank_experts` is saved alone (with a classifier's heads), unless more
    than the adapter is trained. With a `PeftModel` `Trainer` does the same by itself.

    Example:
        >>> trainer = RankExpertTrainer(  # doctest: +SKIP
        ...     model, args, train_dataset=TaskMixture(train), eval_dataset=TaskMixture(validation),
        ...     metrics={"cola": "matthews", "rte": "accuracy"}, data_collator=DataCollatorWithPadding(tokenizer),
        ... )
    """


class _EpochOfSampler(TrainerCallback):
    # accelerate's skip_first_batches hides the sampler from Trainer's own set_epoch where there are several ranks.
    def __init__(self, trainer: RankExpertTrainerMixin) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.trainer._sampler is not None:
            self.trainer._sampler.set_epoch(int(state.epoch or 0))


def _sum(losses: Sequence[Tensor]) -> Tensor:
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()


def _depends(total: Tensor, *parts: Tensor | None) -> bool:
    # Whether a loss was computed from one of these. Autograd walks the graph and runs what lies between, an addition.
    known = tuple(part for part in parts if part is not None and part.requires_grad)
    if any(part is total for part in known):
        return True
    if not known or not total.requires_grad:
        return False
    grads = torch.autograd.grad(total, known, torch.ones_like(total), retain_graph=True, allow_unused=True)
    return any(grad is not None for grad in grads)


def _task_ids(dataset: Any) -> Any:
    if isinstance(dataset, TaskMixture):
        return dataset.task_ids
    if isinstance(dataset, TaskPart):
        return [dataset.task_id] * len(dataset)
    if _knows_tasks(dataset) and not isinstance(dataset, IterableDataset):
        return list(dataset[TASK_COLUMN])
    return None


def _knows_tasks(dataset: Any) -> bool:
    # Without reading it: a stream may have no end.
    named = TASK_COLUMN in (getattr(dataset, "column_names", None) or ())
    return named or isinstance(dataset, (TaskMixture, TaskPart))
