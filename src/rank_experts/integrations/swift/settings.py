"""What a user of ms-swift says of an adapter, checked before the model is loaded. Imports nothing of ms-swift.

ms-swift's arguments are one fixed dataclass, to which a plugin cannot add. `--model_kwargs`, a JSON object that may be
a mapping in a YAML config too, is its place for what it does not know; it keeps it in a checkpoint's args.json.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from ...config.config import RankExpertConfig
from ...config.reading import DESCRIPTIVE
from ...messages import nearest
from . import TUNER

KEY = "rank_experts"
"""The key of `--model_kwargs` that holds the settings."""

PRESETS = ("smora", "more", "mixture", "lora")

_WHERE = f"--model_kwargs, {KEY!r}"
_OPTIONS = ("target_modules", "target_parameters", "modules_to_save")
_FIXED = DESCRIPTIVE | {"router", "format_version"}
_FIELDS = {field.name for field in fields(RankExpertConfig)} - _FIXED - set(_OPTIONS)

# ms-swift's options of a LoRA, with its defaults: in use, they would be expected to do something.
_OF_LORA = {
    "lora_rank": (8, "r"),
    "lora_alpha": (32.0, "alpha"),
    "lora_dropout": (0.05, "dropout"),
    "lora_bias": ("none", "bias"),
    "lora_dtype": (None, None),
    "lorap_lr_ratio": (None, None),
    "use_rslora": (False, None),
    "use_dora": (False, None),
    "init_weights": (True, "init_weights"),
}


class Settings(NamedTuple):
    """A preset and the fields that differ from it.

    Attributes:
        preset: One of `PRESETS`.
        values: Field to value; checked.

    Example:
        >>> Settings("smora", {"r": 16, "top_k": 4}).config(target_modules="all-linear").num_experts
        16
    """

    preset: str
    values: dict[str, Any]

    def config(self, **others: Any) -> RankExpertConfig:
        """Build the config, with what ms-swift's own options say."""
        return getattr(RankExpertConfig, self.preset)(**self.values, **others)

    def check_same(self, found: RankExpertConfig, where: str) -> None:
        """Check that an adapter that was loaded is what the settings describe.

        Raises:
            ValueError: A field differs; the message names it.
        """
        wanted = self.config()
        given = [name for name in self.values if name in _FIELDS]
        for name in ["router", "expert_rank", "r", *given]:
            if (own := getattr(wanted, name)) != (theirs := getattr(found, name)):
                raise ValueError(
                    f"{_WHERE} says {name}={own!r}, and the adapter of {where} has {name}={theirs!r}, which training "
                    f"goes on with. Leave {KEY!r} out, or write what the adapter has."
                )


def read_settings(model_kwargs: Mapping[str, Any] | None) -> Settings | None:
    """Read what `--model_kwargs` says; None where it says nothing of rank experts.

    Raises:
        ValueError: No or an unknown preset, an unknown field, or a value that the field does not take.

    Example:
        >>> read_settings({"rank_experts": {"preset": "more", "tasks": ["cola", "rte"]}}).preset
        'more'
    """
    if KEY not in (model_kwargs or {}):
        return None
    given = (model_kwargs or {})[KEY]
    example = '{"rank_experts": {"preset": "smora", "r": 16}}'
    if not isinstance(given, Mapping):
        raise ValueError(f"{_WHERE} is {given!r}: expected an object, as in --model_kwargs '{example}'.")
    values = dict(given)
    if (preset := values.pop("preset", None)) not in PRESETS:
        hint = nearest(preset, PRESETS) if isinstance(preset, str) else ""
        found = "has no preset" if preset is None else f"has preset={preset!r}"
        raise ValueError(f"{_WHERE} {found}: expected one of {', '.join(map(repr, PRESETS))}.{hint}")
    for name in values:
        _check_name(preset, name)
    if preset == "more" and "tasks" not in values:
        raise ValueError(f'{_WHERE} lacks tasks, the channels of the rows: "tasks": ["cola", "rte"], for instance.')
    settings = Settings(preset, values)
    try:
        settings.config()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{_WHERE}: {error}") from error
    return settings


def _check_name(preset: str, name: str) -> None:
    if name in _OPTIONS:
        raise ValueError(f"{_WHERE} has {name}: ms-swift has an option of that name; write --{name}.")
    if name in _FIXED:
        raise ValueError(
            f"{_WHERE} has {name}, which is not for users to set: the preset and ms-swift do. Leave it out."
        )
    known = _FIELDS | set(inspect.signature(getattr(RankExpertConfig, preset)).parameters) - {"kwargs"}
    if preset == "mixture":
        known -= {"r"}  # num_experts * expert_rank
    if name not in known:
        raise ValueError(
            f"{_WHERE} has {name}, which is no field of the preset {preset!r}.{nearest(name, known)} The fields are "
            "those of RankExpertConfig."
        )


def check_arguments(args: Any) -> None:
    """Check the arguments of a training, before a model is loaded.

    Args:
        args: ms-swift's training arguments, with the fields of `trainer.RankExpertArguments`.

    Raises:
        ValueError: Settings without the tuner or the tuner without settings, bad settings, an option of LoRA's that
            would have no effect, or rows that hold several tasks.
    """
    if args.tuner_type != TUNER:
        if KEY in (args.model_kwargs or {}):
            raise ValueError(
                f"{_WHERE} with --tuner_type {args.tuner_type}: expected --tuner_type {TUNER}, or no {KEY!r} in "
                "--model_kwargs."
            )
        return
    for option, (default, field) in _OF_LORA.items():
        if (value := getattr(args, option)) != default:
            instead = f"write {field!r} in {_WHERE}" if field else "leave it out"
            raise ValueError(f"--{option} {value}: has no effect on rank experts; {instead}.")
    settings = read_settings(args.model_kwargs)
    if settings is None and not (args.resume_from_checkpoint or args.adapters):
        raise ValueError(
            f"--tuner_type {TUNER} without {KEY!r} in --model_kwargs, which says which adapter to train: "
            '--model_kwargs \'{"rank_experts": {"preset": "smora", "r": 16, "top_k": 4}}\', for instance.'
        )
    if settings is not None:
        check_rows(args, settings.values.get("tasks"))


def check_rows(args: Any, tasks: list[str] | None) -> None:
    """Check that a row holds one example where there are tasks.

    Raises:
        ValueError: The rows are packed, so that a row has several tasks.
    """
    for option in ("packing", "padding_free"):
        if tasks is not None and getattr(args, option):
            raise ValueError(
                f"--{option} true with an adapter that routes by task: a packed row holds examples of several tasks, "
                f"and a row has one. Leave --{option} out, or use a preset without tasks."
            )
