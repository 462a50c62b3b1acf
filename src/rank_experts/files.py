"""Saving and loading an adapter: PEFT's adapter_config.json and one safetensors file.

Loading reads the config and the tensors' names, shapes and values first and compares them with what the model would
need; only when all of it fits is the model touched. Saving writes beside the target and renames.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .card import CARD_FILE, may_write_card, model_card
from .config import FORMAT_VERSION, PEFT_TYPE, RankExpertConfig, nearest
from .model import Target, find_targets, inject_rank_experts

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def save_rank_experts(model: nn.Module, path: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Save an adapter: `adapter_config.json` and `adapter_model.safetensors`, which PEFT reads too.

    A model card, README.md, comes with it, unless the folder has one that we did not write or that was edited.

    Args:
        model: With the adapter, wrapped in a `PeftModel` or not.
        path: A folder, made where it is missing; files of an earlier save are replaced.
        adapter_name: Which adapter.

    Raises:
        ValueError: The model has no such adapter.

    Example:
        >>> save_rank_experts(model, "my-adapter")  # doctest: +SKIP
    """
    config = _adapter_config(model, adapter_name)
    tensors = {}
    for key, tensor in get_peft_model_state_dict(model, adapter_name=adapter_name).items():
        key = key if key.startswith(_PREFIX) else _PREFIX + key
        tensors[key] = tensor.detach().to("cpu").contiguous().clone()
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    description = config_to_json(config)
    metadata = {"format": "pt"}
    _replace(folder / WEIGHTS_FILE, lambda file: save_file(tensors, file, metadata=metadata))
    _replace(folder / CONFIG_FILE, lambda file: Path(file).write_text(description, encoding="utf-8"))
    if may_write_card(folder):
        card = model_card(config, tensors).encode()
        _replace(folder / CARD_FILE, lambda file: Path(file).write_bytes(card))


def config_to_json(config: RankExpertConfig) -> str:
    """Return what `adapter_config.json` holds: the fields, sorted, sets as sorted lists, inference_mode on."""
    values = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    values["inference_mode"] = True
    return json.dumps(values, indent=2, sort_keys=True, default=str) + "\n"


def _adapter_config(model: nn.Module, adapter_name: str) -> RankExpertConfig:
    configs = getattr(model, "peft_config", None) or {}
    config = configs.get(adapter_name)
    if not isinstance(config, RankExpertConfig):
        known = [name for name, known in configs.items() if isinstance(known, RankExpertConfig)]
        raise ValueError(
            f"{type(model).__name__} has no rank-expert adapter {adapter_name!r}; it has {known}."
            f"{nearest(adapter_name, known)}"
        )
    return config


def _replace(target: Path, write: Any) -> None:
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def load_rank_experts(
    model: nn.Module,
    path: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    autocast_adapter_dtype: bool = True,
) -> nn.Module:
    """Load an adapter into a model, in place. Where it does not fit, nothing of the model changes.

    Args:
        model: The base model that the adapter was trained on.
        path: A folder that `save_rank_experts` or `PeftModel.save_pretrained` wrote.
        adapter_name: A name that the model does not have yet.
        is_trainable: Train it on; False: frozen, for inference.
        autocast_adapter_dtype: Keep the adapter in float32 where the base is float16 or bfloat16, as PEFT does.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: The folder or one of its files is missing.
        ValueError: The folder holds another method's adapter, a newer format, a config out of range, or tensors
            that are missing, unexpected, of another shape, or not finite; the message names them.

    Example:
        >>> model = load_rank_experts(model, "my-adapter")  # doctest: +SKIP
    """
    folder = Path(path)
    config = read_config(folder)
    config.inference_mode = not is_trainable
    targets = find_targets(model, config)
    tensors = read_tensors(folder, expected_tensors(model, config, targets), config)
    inject_rank_experts(
        model, config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype, low_cpu_mem_usage=False
    )
    own_names = {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    set_peft_model_state_dict(model, own_names, adapter_name=adapter_name)
    return model


def read_config(folder: Path) -> RankExpertConfig:
    """Read and validate an adapter's `adapter_config.json`.

    Args:
        folder: Where it lies.

    Raises:
        FileNotFoundError: There is none.
        ValueError: Not JSON, another method's, a newer format, an unknown field, or a value out of range.
    """
    file = folder / CONFIG_FILE
    if not file.is_file():
        what = "is not a folder" if not folder.is_dir() else f"holds no {CONFIG_FILE}"
        raise FileNotFoundError(
            f"{folder} {what}. Expected a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, as save_rank_experts writes it."
        )
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}: expected an object of config fields.")
    if (found := values.get("peft_type")) != PEFT_TYPE:
        raise ValueError(
            f"{file} is of peft_type {found!r}: expected {PEFT_TYPE!r}. "
            "Load other methods' adapters with peft.PeftModel.from_pretrained."
        )
    version = values.get("format_version", FORMAT_VERSION)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"{file} has format_version {version!r}; this version of rank-experts reads up to {FORMAT_VERSION}. "
            "Upgrade rank-experts."
        )
    known = {field.name for field in fields(RankExpertConfig)}
    if unknown := sorted(set(values) - known):
        raise ValueError(
            f"{file} has unknown fields {unknown}.{nearest(unknown[0], known)} "
            "It may come from a newer rank-experts or peft; upgrade them."
        )
    try:
        return RankExpertConfig(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


def expected_tensors(
    model: nn.Module, config: RankExpertConfig, targets: dict[str, Target]
) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes that an adapter's file must hold for a model.

    Args:
        model: The base model.
        config: The adapter's.
        targets: From `find_targets`.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path, target in targets.items():
        layer = f"{_PREFIX}{path}.rank_expert_"
        shapes[f"{layer}A"] = (target.r, target.d_in)
        shapes[f"{layer}B"] = (target.d_out, target.r)
        if config.router == "token":
            num_experts = target.r // config.expert_rank
            shapes[f"{layer}router.weight"] = (num_experts, target.d_in)
            shapes[f"{layer}router.balance_bias"] = (num_experts,)
        elif config.router == "task":
            width = config.task_embedding_dim or target.d_in
            shapes[f"{layer}router.task_embedding"] = (len(config.tasks or ()), width)
            shapes[f"{layer}router.gate_weight"] = (target.r, width)
            shapes[f"{layer}router.gate_bias"] = (target.r,)
            if width != target.d_in:
                shapes[f"{layer}router.projection"] = (width, target.d_in)
    shapes.update(_saved_modules(model, config))
    shapes.update(_biases(model, config, targets))
    return shapes


def _saved_modules(model: nn.Module, config: RankExpertConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for path, module in model.named_modules():
        if any(path == name or path.endswith(f".{name}") for name in config.modules_to_save or ()):
            for key, tensor in module.state_dict().items():
                shapes[f"{_PREFIX}{path}.{key}"] = tuple(tensor.shape)
    return shapes


def _biases(model: nn.Module, config: RankExpertConfig, targets: dict[str, Target]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    if config.bias == "none":
        return shapes
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        if leaf == "bias" and (config.bias == "all" or path in targets):
            key = f"{path}.base_layer.bias" if path in targets else name
            shapes[_PREFIX + key] = tuple(parameter.shape)
    return shapes


def read_tensors(folder: Path, expected: dict[str, tuple[int, ...]], config: RankExpertConfig) -> dict[str, Tensor]:
    """Read an adapter's tensors after comparing the file's header with what is expected.

    Args:
        folder: Where `adapter_model.safetensors` lies.
        expected: Name to shape.
        config: The adapter's, for messages.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or tensors are missing, unexpected, of another shape or dtype, or not finite.
    """
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no {WEIGHTS_FILE}; save_rank_experts writes it beside {CONFIG_FILE}.")
    trained_on = f" The adapter was trained on {config.base_model_name_or_path!r}: is this that model?"
    hint = trained_on if config.base_model_name_or_path else " Is this the model that the adapter was trained on?"
    try:
        with safe_open(file, framework="pt") as tensors:
            found = set(tensors.keys())
            if missing := sorted(expected.keys() - found):
                raise ValueError(f"{file} lacks {_few(missing)}.{hint}")
            if unexpected := sorted(found - expected.keys()):
                raise ValueError(f"{file} holds unexpected tensors: {_few(unexpected)}.{hint}")
            for name, shape in expected.items():
                if (size := tuple(tensors.get_slice(name).get_shape())) != shape:
                    raise ValueError(f"{file}: {name} has shape {size}, expected {shape}.{hint}")
            loaded = {name: tensors.get_tensor(name) for name in expected}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}. Save the adapter again.") from None
    for name, tensor in loaded.items():
        if re.search(r"\.rank_expert_\w+", name) and not tensor.is_floating_point():
            raise ValueError(f"{file}: {name} is {tensor.dtype}: expected a floating-point tensor.")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{file}: {name} has values that are not finite. The training that wrote it diverged.")
    return loaded


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
