"""Reading PEFT's LoRA checkpoints, and refusing those that have no equivalent here."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from peft.utils.other import get_pattern_key
from torch import Tensor

from ..config.checks import MAX_FLOAT, check_patterns
from ..storage.pair import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_tensor,
    is_finite,
    parse_json,
    parse_weights,
    read_config_bytes,
    read_weights,
)
from .layout import PREFIX

# Options of LoraConfig that change what a checkpoint computes, and the values that leave it a plain LoRA.
_PLAIN = {
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "modules_to_save": (None, []),
}
# Initialisations that change the base model's weights too.
_CHANGES_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga", re.IGNORECASE)
_KEY = re.compile(r"(?P<path>.+)\.lora_(?P<factor>[AB])\.weight")


class LoraCheckpoint(NamedTuple):
    """A plain LoRA, y = W0 x + scale · B A x.

    Attributes:
        path: Its folder.
        base: The base model's name, or None.
        task_type: PEFT's, or None.
        layers: Module path to (A (r, d_in), B (d_out, r), scale).
    """

    path: Path
    base: str | None
    task_type: str | None
    layers: dict[str, tuple[Tensor, Tensor, float]]


def read_lora(folder: str | os.PathLike[str]) -> LoraCheckpoint:
    """Read a PEFT LoRA checkpoint: any ranks, alphas, patterns, rank-stabilised or not.

    Args:
        folder: With `adapter_config.json` and `adapter_model.safetensors`; a pickle is not read.

    Raises:
        FileNotFoundError: The folder or a file is missing.
        ValueError: Another method's, a variant without an equivalent (DoRA, trained biases, modules to save, …), or
            tensors that are missing, of other kinds (embeddings, convolutions) or not finite.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{folder / CONFIG_FILE} is of peft_type {config.get('peft_type')!r}: expected a LoRA checkpoint of PEFT."
        )
    for option, plain in _PLAIN.items():
        if (value := config.get(option)) not in plain:
            raise ValueError(
                f"{folder / CONFIG_FILE}: {option}={value!r} has no equivalent in a mixture of plain LoRAs. Use a "
                f"checkpoint that was trained without {option}, or merge it into the base model."
            )
    if _CHANGES_BASE.search(str(config.get("init_lora_weights"))):
        raise ValueError(
            f"{folder / CONFIG_FILE}: init_lora_weights={config['init_lora_weights']!r} changes the base model's "
            "weights as well. Save it as a plain LoRA first (PEFT: path_initial_model_for_weight_conversion)."
        )
    _check_alphas(folder / CONFIG_FILE, config)
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_adapter_tensors(folder).items():
        match = _KEY.fullmatch(key.removeprefix(PREFIX))
        if match is None or tensor.dim() != 2:
            raise ValueError(
                f"{folder}: {key} of shape {tuple(tensor.shape)} is no factor of a linear layer's LoRA; expected keys "
                f"{PREFIX}<layer>.lora_A.weight and .lora_B.weight with two dimensions."
            )
        factors.setdefault(match["path"], {})[match["factor"]] = tensor
    layers = {path: _layer(folder, config, path, found) for path, found in factors.items()}
    if not layers:
        raise ValueError(f"{folder} holds no LoRA tensors.")
    return LoraCheckpoint(folder, config.get("base_model_name_or_path"), config.get("task_type"), layers)


def _layer(folder: Path, config: dict[str, Any], path: str, found: dict[str, Tensor]) -> tuple[Tensor, Tensor, float]:
    if len(found) < 2:
        raise ValueError(f"{folder}: {path} has lora_{next(iter(found))} alone; expected lora_A and lora_B.")
    A, B = found["A"], found["B"]
    if A.shape[0] != B.shape[1]:
        raise ValueError(f"{folder}: {path} has lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)}: ranks differ.")
    if (r := A.shape[0]) == 0:
        raise ValueError(f"{folder}: {path} has lora_A {tuple(A.shape)}: expected at least one rank.")
    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), path), config["lora_alpha"])
    scale = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    if not is_finite(B * scale):
        raise ValueError(f"{folder}: {path} is scaled by {scale:g}, which makes its lora_B infinite.")
    return A, B, scale


def _check_alphas(file: Path, config: dict[str, Any]) -> None:
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{file}: alpha_pattern={patterns!r}: expected an object of module name to number.")
    try:
        check_patterns("alpha_pattern", patterns)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from None
    for name, alpha in ({"lora_alpha": config.get("lora_alpha")} | patterns).items():
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not -MAX_FLOAT < alpha < MAX_FLOAT:
            raise ValueError(f"{file}: {name} is {alpha!r}: expected a number that is finite in float32.")


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Read an `adapter_config.json` of any method as a dict.

    Raises:
        FileNotFoundError: There is none.
        ValueError: Not a JSON object, not a regular file, or a link out of the folder.
    """
    return parse_json(folder / CONFIG_FILE, read_config_bytes(folder))


def read_adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """Read an `adapter_model.safetensors` of any method, and check that the tensors are finite.

    Raises:
        FileNotFoundError: There is none; a pickle is not read.
        ValueError: Damaged, not floating-point, or not finite.
    """
    file = folder / WEIGHTS_FILE
    tensors = parse_weights(file, read_weights(folder))
    for key, tensor in tensors.items():
        check_tensor(f"{file}: {key}", tensor, tuple(tensor.shape))
    return tensors
