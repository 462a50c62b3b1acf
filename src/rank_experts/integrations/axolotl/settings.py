"""The block `rank_experts:` of axolotl's YAML file, checked before anything is loaded. Imports nothing of axolotl."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from ...config.config import RankExpertConfig
from ...config.reading import DESCRIPTIVE
from ...messages import nearest

ADAPTER = "rank_experts"
"""What `adapter:` calls it, and the name of the block."""

TASKS_TYPE = "rank_experts.integrations.axolotl.tasks"
"""A dataset's `type:` where its rows name their tasks."""

PRESETS = ("smora", "more", "mixture", "lora")
_OWN = ("preset", "task_column", "prompt")
_FIXED = DESCRIPTIVE | {"router", "format_version"}
_FIELDS = {field.name for field in fields(RankExpertConfig)} - _FIXED

# What axolotl would do to a row or to a layer past the adapter's back.
_PACKING = ("sample_packing", "eval_sample_packing", "pretraining_dataset")
_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
_OF_LORA = (
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_linear", "lora_modules_to_save"),
    *("peft_use_dora", "peft_use_rslora", "loraplus_lr_ratio", "relora"),
)


class Settings(NamedTuple):
    """The block, read.

    Attributes:
        preset: One of `PRESETS`.
        values: Arguments of the preset, and fields of `RankExpertConfig`.
        task_column: The column of the data that names a row's task.
        prompt: axolotl's own dataset type that makes tokens of such a row.

    Example:
        >>> Settings("smora", {"r": 16, "top_k": 4}).config().num_experts
        16
    """

    preset: str
    values: dict[str, Any]
    task_column: str = "task"
    prompt: str = "completion"

    @property
    def tasks(self) -> list[str] | None:
        """The tasks' names, of a preset that has them."""
        return self.values.get("tasks")

    def config(self) -> RankExpertConfig:
        """Build the config."""
        defaults = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        return getattr(RankExpertConfig, self.preset)(**defaults | self.values)


def read_settings(block: Any) -> Settings:
    """Read the block.

    Raises:
        ValueError: No or an unknown preset, an unknown field, a value that the field does not take, or no tasks.

    Example:
        >>> read_settings({"preset": "more", "tasks": ["cola", "rte"]}).tasks
        ['cola', 'rte']
    """
    if not isinstance(block, Mapping):
        raise ValueError(
            f"{ADAPTER}: found {block!r}, expected a block with a preset, for instance "
            "{preset: smora, r: 64, top_k: 8, target_modules: all-linear}."
        )
    values = dict(block)
    own = {name: values.pop(name) for name in _OWN if name in values}
    if (preset := own.get("preset")) not in PRESETS:
        found = "is missing" if preset is None else f"is {preset!r}"
        hint = nearest(preset, PRESETS) if isinstance(preset, str) else ""
        raise ValueError(f"{ADAPTER}.preset {found}: expected one of {', '.join(PRESETS)}.{hint}")
    known = _FIELDS | set(inspect.signature(getattr(RankExpertConfig, preset)).parameters) - {"kwargs"}
    for name in values:
        if name not in known:
            raise ValueError(
                f"{ADAPTER}.{name} is no field of the preset {preset!r}.{nearest(name, known | set(_OWN))}"
            )
    for name in ("task_column", "prompt"):
        if name in own and not (isinstance(own[name], str) and own[name]):
            raise ValueError(f"{ADAPTER}.{name} is {own[name]!r}: expected a name.")
    if preset == "more" and not values.get("tasks"):
        raise ValueError(f"{ADAPTER}.tasks is missing: name the tasks, as the data's task_column does, [cola, rte].")
    settings = Settings(**own, values=values)
    try:
        settings.config()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{ADAPTER}: {error}") from error
    return settings


def check(cfg: Mapping[str, Any]) -> None:
    """Check axolotl's settings as far as they concern the adapter, before anything is loaded.

    Args:
        cfg: The YAML file's values.

    Raises:
        ValueError: A block without the adapter or the adapter without a block, bad settings, an option of LoRA's that
            would have no effect, packed rows or data without tasks for an adapter that routes by task.
    """
    if cfg.get("adapter") != ADAPTER:
        if cfg.get(ADAPTER) is not None:
            raise ValueError(
                f"{ADAPTER}: a block beside adapter: {cfg.get('adapter')}; write adapter: {ADAPTER}, or no block."
            )
        return
    settings = read_settings(cfg.get(ADAPTER))
    if cfg.get("merge_lora"):
        raise ValueError(
            "axolotl merge-lora merges LoRAs alone. Dense, task-routed adapters: rank-experts merge ADAPTER OUT, for "
            "one task with --task. A token gate has no static form: rank-experts export --calibration writes the LoRA "
            "that is nearest to it."
        )
    for name in (*_OF_LORA, *_KERNELS):
        if cfg.get(name):
            raise ValueError(f"{name} has no effect on rank experts; leave it out, or write the field in {ADAPTER}:.")
    if cfg.get("rl"):
        raise ValueError(f"rl: {cfg['rl']} with adapter: {ADAPTER}: not supported; train it with TRL's own trainers.")
    if settings.tasks is None:
        return
    for name in _PACKING:
        if cfg.get(name):
            raise ValueError(
                f"{name} with a preset that routes by task: a packed row holds examples of several tasks, and a row "
                "has one. Turn it off, or use a preset without tasks."
            )
    for kind in ("datasets", "test_datasets"):
        for dataset in cfg.get(kind) or []:
            if len(settings.tasks) > 1 and (found := dataset.get("type")) != TASKS_TYPE:
                raise ValueError(
                    f"{kind}: {dataset.get('path')} has type: {found}, which drops the column {settings.task_column!r} "
                    f"that names a row's task. Write type: {TASKS_TYPE}, and {ADAPTER}.prompt: {found or 'completion'}."
                )


def task_id(row: Mapping[str, Any], settings: Settings) -> int:
    """Return the id of the task that a row names.

    Raises:
        ValueError: The row has no such column, or names no task of the adapter.

    Example:
        >>> task_id({"text": "…", "task": "rte"}, read_settings({"preset": "more", "tasks": ["cola", "rte"]}))
        1
    """
    tasks, column = settings.tasks or [], settings.task_column
    listed = ", ".join(map(repr, tasks))
    if column not in row:
        raise ValueError(
            f"A row has the columns {sorted(row)} and no {column!r}, which names its task: expected one of {listed}. "
            f"{ADAPTER}.task_column says which column it is."
        )
    if (name := row[column]) not in tasks:
        hint = nearest(name, tasks) if isinstance(name, str) else ""
        raise ValueError(f"A row has {column}: {name!r}, which is no task: expected one of {listed}.{hint}")
    return tasks.index(name)
