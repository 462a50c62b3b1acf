"""From a recipe and its data to a model and a trainer, and from an adapter's folder back to its model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, TrainingArguments

from .config import RankExpertConfig
from .files import load_rank_experts, read_config
from .heads import HEADS_CONFIG, MultiTaskClassifier, load_classifier
from .inject import inject_rank_experts
from .prepare import PreparedTask
from .recipe import OWN_TRAINING_KEYS, Recipe
from .tasks import TaskMixture
from .trainer import RankExpertTrainer

CLASSES = {"classification": AutoModel, "causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM}


def load_tokenizer(recipe: Recipe) -> Any:
    """Load the model's tokenizer; one without a padding token pads with its end of text."""
    section = recipe.model
    tokenizer = AutoTokenizer.from_pretrained(
        section.name, revision=section.revision, trust_remote_code=section.trust_remote_code
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(recipe: Recipe, *, meta: bool = False) -> Any:
    """Load the base model, or with `meta` its shape alone, which takes no memory."""
    section = recipe.model
    options = {"revision": section.revision, "trust_remote_code": section.trust_remote_code}
    dtype = getattr(torch, section.dtype)
    if not meta:
        return CLASSES[section.kind].from_pretrained(section.name, dtype=dtype, **options)
    config = transformers.AutoConfig.from_pretrained(section.name, **options)
    with torch.device("meta"):
        return CLASSES[section.kind].from_config(config, dtype=dtype, trust_remote_code=section.trust_remote_code)


def adapter_config(recipe: Recipe, base: nn.Module) -> RankExpertConfig:
    """Return the adapter's config. A classifier's encoder pools by itself: its unused pooler is left out."""
    config = recipe.adapter.config(list(recipe.tasks))
    has_pooler = any(name.rpartition(".")[2] == "pooler" for name, _ in base.named_modules())
    if recipe.model.kind == "classification" and has_pooler and config.exclude_modules is None:
        config.exclude_modules = r"(.*\.)?pooler(\..*)?"
    config.task_type = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}.get(recipe.model.kind, "FEATURE_EXTRACTION")
    config.base_model_name_or_path = recipe.model.name
    config.revision = recipe.model.revision
    return config


def build_model(recipe: Recipe, data: dict[str, PreparedTask], adapter: Path | None = None) -> Any:
    """Load the base model and give it a new adapter and heads, or those of a folder.

    Args:
        recipe: Checked.
        data: From `prepare`.
        adapter: A folder to load from; None: a new adapter.
    """
    base = load_base(recipe)
    if adapter is not None:
        load_rank_experts(base, adapter)
        return load_classifier(base, adapter) if recipe.model.kind == "classification" else base
    inject_rank_experts(base, adapter_config(recipe, base))
    if recipe.model.kind != "classification":
        return base
    heads = {name: task.head for name, task in data.items() if task.head is not None}
    return MultiTaskClassifier(base, heads, pooling=recipe.model.pooling)


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


def build_trainer(
    recipe: Recipe, model: Any, data: dict[str, PreparedTask], tokenizer: Any, args: TrainingArguments
) -> RankExpertTrainer:
    """Put model, data and arguments into a trainer."""
    pad = transformers.DataCollatorWithPadding(tokenizer)
    if recipe.model.kind != "classification":
        # Pads labels too, with −100.
        pad = transformers.DataCollatorForSeq2Seq(tokenizer)  # type: ignore[assignment]
    tasks = list(recipe.tasks)
    return RankExpertTrainer(
        model,
        args,
        train_dataset=TaskMixture({name: task.train for name, task in data.items()}, tasks),
        eval_dataset=TaskMixture({name: task.validation for name, task in data.items()}, tasks),
        data_collator=pad,
        processing_class=tokenizer,
        metrics={name: task.metrics(recipe.model.kind) for name, task in recipe.tasks.items()},
        sampling=recipe.data.sampling,
        temperature=recipe.data.temperature,
        mixed_batches=recipe.data.batches == "mixed",
        epoch_size=recipe.data.epoch_size,
        router_learning_rate=recipe.training.get("router_learning_rate"),
        head_learning_rate=recipe.training.get("head_learning_rate"),
    )


def load_adapted(adapter: Path, base: str | None = None) -> Any:
    """Load an adapter's base model with the adapter in it, from the adapter's folder alone.

    Args:
        adapter: The folder.
        base: The base model, where it moved since.

    Raises:
        FileNotFoundError: The folder holds no adapter.
        ValueError: The folder does not name its base model, or the adapter does not fit it.
    """
    config = read_config(adapter)
    name = base or config.base_model_name_or_path
    if not name:
        raise ValueError(f"{adapter} does not name its base model. Pass --base NAME.")
    kinds = {"CAUSAL_LM": "causal", "SEQ_2_SEQ_LM": "seq2seq", "FEATURE_EXTRACTION": "classification"}
    task_type = getattr(config.task_type, "value", config.task_type)
    if (adapter / HEADS_CONFIG).is_file():
        kind = "classification"
    elif task_type in kinds:
        kind = kinds[task_type]
    else:
        kind = None
    options: dict[str, Any] = {"dtype": "auto", "revision": config.revision if base is None else None}
    if kind is None:
        # The class that the checkpoint was made with.
        architecture = (
            transformers.AutoConfig.from_pretrained(name, revision=options["revision"]).architectures or [""]
        )[0]
        model_class = getattr(transformers, architecture, AutoModel)
    else:
        model_class = CLASSES[kind]
    return load_rank_experts(model_class.from_pretrained(name, **options), adapter)
