"""Reading an `adapter_config.json`: whose it is, its version, its fields, and whether it is what was saved."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from peft import PeftConfig

from ..messages import nearest
from ..storage.pair import parse_json
from .method import PEFT_TYPE

FORMAT_VERSION = 1
"""The version of the files on disk. A reader refuses a higher one."""

DESCRIPTIVE = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
}
"""What a config says of itself; no adapter computes otherwise for it, so anyone may edit it on disk."""


def read_fields(
    config_class: type[PeftConfig], file: Path, config: bytes, saved_config: bytes | None = None
) -> dict[str, Any]:
    """Parse an `adapter_config.json` and check what can be checked before its values are.

    Args:
        config_class: `RankExpertConfig`, which says what fields there are and checks their values.
        file: Where it came from, for messages.
        config: Its bytes.
        saved_config: What was saved with the weights, where that is not `config`.

    Returns:
        Field to value. Fields that this version does not know are left out where they hold nothing: null, false, or an
        empty list, object or text, the defaults of what newer versions of PEFT add.

    Raises:
        ValueError: Not JSON, another method's, a newer format, an unknown field that holds something, or an edited one.
    """
    values = parse_json(file, config)
    if (found := values.get("peft_type")) != PEFT_TYPE:
        raise ValueError(
            f"{file} is of peft_type {found!r}: expected {PEFT_TYPE!r}. "
            "Load other methods' adapters with peft.PeftModel.from_pretrained."
        )
    version = values.get("format_version", FORMAT_VERSION)
    if isinstance(version, bool) or not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"{file} has format_version {version!r}; this version of rank-experts reads up to {FORMAT_VERSION}. "
            "Upgrade rank-experts."
        )
    known = {field.name for field in fields(config_class)}
    values = _without_unset(values, known)
    if unknown := sorted(set(values) - known):
        raise ValueError(
            f"{file} has unknown fields {unknown}.{nearest(unknown[0], known)} "
            "It may come from a newer rank-experts or peft; upgrade them."
        )
    parsed = _build(config_class, file, values)
    if saved_config is not None:
        saved = _build(config_class, file, _without_unset(parse_json(file, saved_config), known))
        for name in sorted(known - DESCRIPTIVE):
            if (found := getattr(parsed, name)) != (expected := getattr(saved, name)):
                raise ValueError(
                    f"{file} says {name}={found!r}, the weights beside it were saved with {name}={expected!r}. Restore "
                    "the file, or the weights that belong to it; to change a value, load the adapter, change it in "
                    "model.peft_config and save it again."
                )
    return values


def _without_unset(values: dict[str, Any], known: set[str]) -> dict[str, Any]:
    # A newer PEFT writes its new fields for every method, and nothing, where they were not used, as their value.
    def is_unset(value: Any) -> bool:
        return value is None or value is False or value in ([], {}, "")

    return {name: value for name, value in values.items() if name in known or not is_unset(value)}


def _build(config_class: type[PeftConfig], file: Path, values: dict[str, Any]) -> PeftConfig:
    try:
        return config_class(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
