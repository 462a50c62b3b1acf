"""From a recipe and its data to a model and a trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoTokenizer, TrainingArguments

from ..calls.use_task import routing_scopes
from ..config.config import RankExpertConfig
from ..files.heads import HEADS_CONFIG, HeadSpec, read_heads
from ..files.loading import load_rank_experts, read_config
from ..messages import nearest
from ..storage.pair import CONFIG_FILE
from ..training.heads import MultiTaskClassifier, load_classifier
from ..training.mixtures import TaskMixture
from ..training.trainer import RankExpertTrainer
from ..tuner.injection import inject_rank_experts
from .adapted import CLASSES
from .prepare import PreparedTask
from .recipe import OWN_TRAINING_KEYS, Recipe

_NAME = ("model", "name")


def load_tokenizer(recipe: Recipe) -> Any:
    """Load the model's tokenizer; one without a padding token pads with its end of text.

    Raises:
        RecipeError: The model, or a tokenizer in its folder, cannot be found.
    """
    section = recipe.model
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            section.name, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    except (OSError, ValueError) as error:
        what = "is a folder without a tokenizer" if Path(section.name).is_dir() else "cannot be loaded"
        raise recipe.error(_NAME, f"{section.name!r} {what}: {error}") from error
    if _is_made_up(tokenizer, Path(section.name)):
        raise recipe.error(
            _NAME,
            f"{section.name!r} is a folder without a tokenizer: expected one of {sorted(_tokenizer_files(tokenizer))} "
            "in it. Save the base model's with tokenizer.save_pretrained(folder).",
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _tokenizer_files(tokenizer: Any) -> set[str]:
    return {name for name in tokenizer.vocab_files_names.values() if isinstance(name, str)}


def _is_made_up(tokenizer: Any, folder: Path) -> bool:
    # transformers makes a tokenizer of the model's kind with special tokens alone, where a folder has none.
    files = _tokenizer_files(tokenizer)
    kinds = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece", "tekken")
    return (
        bool(files)
        and folder.is_dir()
        and not any(file.name in files or file.name.startswith(kinds) for file in folder.iterdir())
    )


def load_base(recipe: Recipe, *, meta: bool = False) -> Any:
    """Load the base model, or with `meta` its shape alone, which takes no memory.

    Raises:
        RecipeError: It cannot be found, or its folder lacks a file.
    """
    try:
        return _load_base(recipe, meta)
    except (OSError, ValueError) as error:
        raise recipe.error(_NAME, f"{recipe.model.name!r} cannot be loaded: {error}") from error


def _load_base(recipe: Recipe, meta: bool) -> Any:
    section = recipe.model
    options = {"revision": section.revision, "trust_remote_code": section.trust_remote_code}
    dtype = getattr(torch, section.dtype)
    if not meta:
        return CLASSES[section.kind].from_pretrained(section.name, dtype=dtype, **options)
    config = transformers.AutoConfig.from_pretrained(section.name, **options)
    with torch.device("meta"):
        return CLASSES[section.kind].from_config(config, dtype=dtype, trust_remote_code=section.trust_remote_code)


def adapter_config(recipe: Recipe, base: nn.Module, tasks: Sequence[str] | None = None) -> RankExpertConfig:
    """Return the adapter's config. A classifier's encoder pools by itself: its unused pooler is left out.

    Args:
        recipe: Checked.
        base: The model.
        tasks: In the order of their ids; None: the recipe's.
    """
    config = recipe.adapter.config(list(recipe.tasks) if tasks is None else tasks)
    has_pooler = any(name.rpartition(".")[2] == "pooler" for name, _ in base.named_modules())
    if recipe.model.kind == "classification" and has_pooler and config.exclude_modules is None:
        config.exclude_modules = r"(.*\.)?pooler(\..*)?"
    config.task_type = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}.get(recipe.model.kind, "FEATURE_EXTRACTION")
    config.base_model_name_or_path = recipe.model.name
    config.revision = recipe.model.revision
    return config


def build_model(
    recipe: Recipe, data: dict[str, PreparedTask], adapter: Path | None = None, checkpoint: Path | None = None
) -> Any:
    """Load the base model and give it a new adapter and heads, or those of a folder.

    Of a folder or a checkpoint the tasks and their order are the folder's: the recipe may name some of them, in any
    order.

    Args:
        recipe: Checked.
        data: From `prepare`.
        adapter: A folder to load from; None: a new adapter.
        checkpoint: Make the new adapter one that this folder's can be restored into.

    Raises:
        ValueError: The recipe names a task that the folder's adapter does not know, or numbers its classes otherwise.
    """
    if adapter is not None:
        _check_tasks(recipe, data, adapter)
        base = load_rank_experts(load_base(recipe), adapter)
        return load_classifier(base, adapter) if recipe.model.kind == "classification" else base
    heads = {name: task.head for name, task in data.items() if task.head is not None}
    tasks = list(recipe.tasks)
    if checkpoint is not None and (checkpoint / CONFIG_FILE).is_file():  # FSDP's holds the whole model instead.
        tasks, saved = _check_tasks(recipe, data, checkpoint)
        heads = {name: heads.get(name, spec) for name, spec in saved.items()}
    base = load_base(recipe)
    inject_rank_experts(base, adapter_config(recipe, base, tasks))
    if recipe.model.kind != "classification":
        return base
    return MultiTaskClassifier(base, heads, pooling=recipe.model.pooling)


def _check_tasks(recipe: Recipe, data: dict[str, PreparedTask], folder: Path) -> tuple[list[str], dict[str, HeadSpec]]:
    # The folder's tasks in the order of their ids, and its heads.
    config = read_config(folder)
    heads = read_heads(folder)[0] if (folder / HEADS_CONFIG).is_file() else {}
    tasks = list(config.tasks or heads or recipe.tasks)
    for name in recipe.tasks:
        if name not in tasks:
            raise ValueError(
                f"Task {name!r} is unknown to the adapter in {folder}, whose tasks are {tasks}.{nearest(name, tasks)} "
                "Leave it out of the recipe, or train a new adapter."
            )
        head = data[name].head
        known, found = heads[name].labels if name in heads else None, None if head is None else head.labels
        # Fewer classes are fine: an example's number means the same then.
        if name in heads and ((known is None) != (found is None) or (known or [])[: len(found or [])] != (found or [])):
            raise ValueError(
                f"Task {name!r}: the adapter in {folder} predicts {_described(known)}, the recipe's data has "
                f"{_described(found)}. Numbers would mean other classes: give the task the adapter's labels, in order."
            )
    return tasks, heads


def _described(labels: list[str] | None) -> str:
    return "numbers" if labels is None else f"the classes {labels}"


def _tasks_of(model: Any, recipe: Recipe) -> list[str]:
    # In the order of their ids.
    if isinstance(model, MultiTaskClassifier):
        return model.tasks
    routed = [tasks for scope in routing_scopes(model) for tasks in scope.tasks.values()]
    return list(routed[0]) if routed else list(recipe.tasks)


def training_arguments(recipe: Recipe, **changes: Any) -> TrainingArguments:
    """Build `TrainingArguments` with this library's defaults under the recipe's values.

    Raises:
        ValueError: A value that transformers refuses.
    """
    defaults: dict[str, Any] = {
        "metric_for_best_model": "mean",
        "logging_steps": 10,
        "report_to": ["tensorboard"],
        "save_total_limit": 2,
        "seed": 0,
    }
    own = {key: value for key, value in recipe.training.items() if key not in OWN_TRAINING_KEYS}
    values = defaults | own | changes
    try:
        return TrainingArguments(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"training: {error}") from error


def collator(recipe: Recipe, tokenizer: Any) -> Any:
    """Return what makes a padded batch of prepared examples; of text it pads the labels too, with −100."""
    if recipe.model.kind == "classification":
        return transformers.DataCollatorWithPadding(tokenizer)
    return transformers.DataCollatorForSeq2Seq(tokenizer)


def build_trainer(
    recipe: Recipe, model: Any, data: dict[str, PreparedTask], tokenizer: Any, args: TrainingArguments
) -> RankExpertTrainer:
    """Put model, data and arguments into a trainer."""
    tasks = _tasks_of(model, recipe)
    return RankExpertTrainer(
        model,
        args,
        train_dataset=TaskMixture({name: task.train for name, task in data.items()}, tasks),
        eval_dataset=TaskMixture({name: task.validation for name, task in data.items()}, tasks),
        data_collator=collator(recipe, tokenizer),
        processing_class=tokenizer,
        metrics={name: task.metrics(recipe.model.kind) for name, task in recipe.tasks.items()},
        sampling=recipe.data.sampling,
        temperature=recipe.data.temperature,
        mixed_batches=recipe.data.batches == "mixed",
        epoch_size=recipe.data.epoch_size,
        router_learning_rate=recipe.training.get("router_learning_rate"),
        head_learning_rate=recipe.training.get("head_learning_rate"),
    )
