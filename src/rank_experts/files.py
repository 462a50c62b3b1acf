"""Saving and loading an adapter: PEFT's adapter_config.json and one safetensors file.

Loading reads the config and the tensors' names, shapes and values first and compares them with what the model would
need; only when all of it fits is the model touched. How the bytes come off and onto the disk is in `storage.py`.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch.distributed as dist
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .card import write_card
from .config import RankExpertConfig, nearest, read_fields
from .inject import inject_rank_experts
from .layout import PREFIX, tensor_shapes
from .model import adapted_layers
from .storage import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_tensor,
    is_finite,
    parse_weights,
    read_pair,
    read_weights,
    write_pair,
)
from .targets import Target, find_targets


def save_rank_experts(model: nn.Module, path: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Save an adapter: `adapter_config.json` and `adapter_model.safetensors`, which PEFT reads too.

    The two files change in one step: a process that is killed, or a disk that is full, leaves the old adapter or the
    new one, never a mixture. Processes that save to one folder wait for each other. A model card, README.md, comes
    with them, unless the folder has one that we did not write or that was edited.

    In a distributed run the first process writes. Under FSDP2 and DeepSpeed's ZeRO-3 all processes must call, because
    each holds a part.

    Args:
        model: With the adapter, wrapped in a `PeftModel` or not.
        path: A folder, made where it is missing; files of an earlier save are replaced.
        adapter_name: Which adapter.

    Raises:
        ValueError: The model has no such adapter, or the adapter has values that are not finite.
        OSError: The disk is full, or the folder cannot be written; what was there before is unchanged.

    Example:
        >>> save_rank_experts(model, "my-adapter")  # doctest: +SKIP
    """
    config = adapter_config(model, adapter_name)
    with _gathered(model):
        tensors = {
            key: _whole(tensor.detach()).to("cpu").contiguous().clone()
            for key, tensor in _adapter_tensors(model, adapter_name)
        }
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise ValueError(
                f"{name} of adapter {adapter_name!r} has values that are not finite: the training diverged. Nothing is "
                f"written to {path}; go back to an earlier checkpoint."
            )
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        return
    write_adapter(Path(path), config, tensors)


def write_adapter(folder: Path, config: RankExpertConfig, tensors: dict[str, Tensor]) -> None:
    """Write an adapter's two files in one step, and its model card.

    Args:
        folder: Made where it is missing.
        config: The adapter's.
        tensors: By the file's names, contiguous and on the CPU.

    Raises:
        OSError: The disk is full, or the folder cannot be written; what was there before is unchanged.
    """
    write_pair(folder, config_to_json(config), tensors)
    write_card(folder, config, tensors)


def _adapter_tensors(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Tensor]]:
    for key, tensor in get_peft_model_state_dict(model, adapter_name=adapter_name).items():
        if not _without_adapter(key):
            yield key if key.startswith(PREFIX) else PREFIX + key, tensor


def _without_adapter(name: str) -> str:
    # PEFT 0.19 writes the model's other adapters beside the one that is saved, with their names in the tensors' names.
    found = re.fullmatch(r"(.*\.rank_expert_(?:A|B))\.[^.]+|(.*\.rank_expert_router)\.[^.]+(\.\w+)", name)
    return "" if found is None else found[1] or found[2] + found[3]


def _whole(tensor: Tensor) -> Tensor:
    # FSDP2 keeps a shard on each rank.
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _gathered(model: nn.Module) -> AbstractContextManager[None]:
    # DeepSpeed's ZeRO-3 leaves parameters empty between forwards.
    own = {id(p) for _, layer in adapted_layers(model) for p in layer.parameters()}
    parted = [p for p in model.parameters() if hasattr(p, "ds_id") and (p.requires_grad or id(p) in own)]
    return sys.modules["deepspeed"].zero.GatheredParameters(parted) if parted else nullcontext()


def config_to_json(config: PeftConfig) -> str:
    """Return what `adapter_config.json` holds: the fields, sorted, sets as sorted lists, inference_mode on."""
    values = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    values["inference_mode"] = True
    return json.dumps(values, indent=2, sort_keys=True, default=str) + "\n"


def adapter_config(model: nn.Module, adapter_name: str) -> RankExpertConfig:
    """Return the config of one of a model's rank-expert adapters, or raise a `ValueError` that lists them."""
    configs = getattr(model, "peft_config", None) or {}
    config = configs.get(adapter_name)
    if not isinstance(config, RankExpertConfig):
        known = [name for name, known in configs.items() if isinstance(known, RankExpertConfig)]
        raise ValueError(
            f"{type(model).__name__} has no rank-expert adapter {adapter_name!r}; it has {known}."
            f"{nearest(adapter_name, known)}"
        )
    return config


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
            that are missing, unexpected, of another shape, or not finite; the message names them. Or the model
            lies on the meta device.

    Example:
        >>> model = load_rank_experts(model, "my-adapter")  # doctest: +SKIP
    """
    folder = Path(path)
    parameters = list(model.parameters())
    if parameters and all(parameter.is_meta for parameter in parameters):
        raise ValueError(
            f"{type(model).__name__} lies on the meta device, where a loaded adapter would have no values either. Give "
            "the model its weights first (from_pretrained, or to_empty and load_state_dict), then load the adapter."
        )
    config, tensors = read_adapter(model, folder)
    config.inference_mode = not is_trainable
    inject_rank_experts(
        model, config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype, low_cpu_mem_usage=False
    )
    _set_tensors(model, tensors, adapter_name)
    return model


def restore_rank_experts(model: nn.Module, path: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Read an adapter's tensors back into the model that has it already, when training resumes for instance.

    Args:
        model: With the adapter.
        path: A folder that `save_rank_experts` wrote for an adapter of the same config.
        adapter_name: Which adapter.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: There is no such adapter, or the tensors do not fit it; nothing is changed then.
    """
    config = adapter_config(model, adapter_name)
    shapes = {key: tuple(tensor.shape) for key, tensor in _adapter_tensors(model, adapter_name)}
    _set_tensors(model, read_tensors(Path(path), shapes, config), adapter_name)


def _set_tensors(model: nn.Module, tensors: dict[str, Tensor], adapter_name: str) -> None:
    # PEFT looks modules_to_save up under the model's own names, which have the prefix in a PeftModel alone.
    if not isinstance(model, PeftModel):
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    set_peft_model_state_dict(model, tensors, adapter_name=adapter_name)


def read_adapter(
    model: nn.Module, folder: Path, config: RankExpertConfig | None = None
) -> tuple[RankExpertConfig, dict[str, Tensor]]:
    """Read an adapter and check all of it against a model, which is not changed.

    Args:
        model: The base model, with or without adapters already.
        folder: Where the adapter lies.
        config: Use this in place of the config that lies there.

    Returns:
        The config, and name to tensor.

    Raises:
        FileNotFoundError: The folder or one of its files is missing.
        ValueError: See `load_rank_experts`.
        TypeError: The config targets modules that the library cannot adapt.
    """
    weights = None
    if config is None:
        config_bytes, saved_config, weights = read_pair(folder)
        config = RankExpertConfig(**read_fields(folder / CONFIG_FILE, config_bytes, saved_config))
    targets = find_targets(model, config)
    expected = expected_tensors(model, config, targets)
    optional = optional_tensors(model, config, targets)
    weights = read_weights(folder) if weights is None else weights
    return config, check_tensors(folder, weights, expected, config, optional, integer_tensors(model, config))


def read_config(folder: Path) -> RankExpertConfig:
    """Read and validate an adapter's `adapter_config.json`.

    Args:
        folder: Where it lies.

    Raises:
        FileNotFoundError: There is none.
        ValueError: Not JSON, another method's, a newer format, an unknown field, or a value out of range.
    """
    return RankExpertConfig(**RankExpertConfig.from_json_file(folder / CONFIG_FILE))


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
        own = tensor_shapes(config, target.r, target.d_in, target.d_out)
        shapes |= {f"{PREFIX}{path}.rank_expert_{name}": shape for name, shape in own.items()}
    shapes.update(_saved_modules(model, config))
    shapes.update(_biases(model, config, targets))
    return shapes


def _modules_to_save(model: nn.Module, config: RankExpertConfig) -> Iterator[tuple[str, Tensor]]:
    for path, module in model.named_modules():
        if any(path == name or path.endswith(f".{name}") for name in config.modules_to_save or ()):
            # Another adapter may have wrapped it already.
            original = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module
            for key, tensor in original.state_dict().items():
                yield f"{PREFIX}{path}.{key}", tensor


def _saved_modules(model: nn.Module, config: RankExpertConfig) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in _modules_to_save(model, config)}


def integer_tensors(model: nn.Module, config: RankExpertConfig) -> set[str]:
    """Return which tensors of an adapter's file hold integers or truth values: buffers of modules_to_save."""
    return {key for key, tensor in _modules_to_save(model, config) if not tensor.is_floating_point()}


def _biases(model: nn.Module, config: RankExpertConfig, targets: dict[str, Target]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    if config.bias == "none":
        return shapes
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        if leaf == "bias" and (config.bias == "all" or path in targets):
            key = f"{path}.base_layer.bias" if path in targets else name
            shapes[PREFIX + key] = tuple(parameter.shape)
    return shapes


def optional_tensors(
    model: nn.Module, config: RankExpertConfig, targets: dict[str, Target]
) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes that PEFT may write beside the adapter's own.

    Whole embeddings, where a target is one of them or the vocabulary was resized, and with bias="all" a second copy
    of the biases within modules_to_save.

    Args:
        model: The base model.
        config: The adapter's.
        targets: From `find_targets`.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    paths = {id(module): path for path, module in model.named_modules()}
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        embedding = getattr(model, getter)() if hasattr(model, getter) else None
        weight = getattr(embedding, "weight", None)
        if id(embedding) in paths and isinstance(weight, Tensor):
            path = paths[id(embedding)]
            inner = "base_layer.weight" if path in targets else "weight"
            shapes[f"{PREFIX}{path}.{inner}"] = tuple(weight.shape)
    if config.bias == "all":
        for key, shape in _saved_modules(model, config).items():
            path, _, leaf = key.rpartition(".")
            if leaf == "bias":
                shapes |= {f"{path}.modules_to_save.bias": shape, f"{path}.original_module.bias": shape}
    return shapes


def read_tensors(
    folder: Path,
    expected: dict[str, tuple[int, ...]],
    config: RankExpertConfig,
    optional: dict[str, tuple[int, ...]] | None = None,
) -> dict[str, Tensor]:
    """Read an adapter's tensors and compare them with what is expected; see `check_tensors`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or does not hold what is expected.
    """
    return check_tensors(folder, read_weights(folder), expected, config, optional)


def check_tensors(
    folder: Path,
    weights: bytes,
    expected: dict[str, tuple[int, ...]],
    config: RankExpertConfig,
    optional: dict[str, tuple[int, ...]] | None = None,
    integers: Collection[str] = (),
) -> dict[str, Tensor]:
    """Parse a safetensors file and compare it with what is expected.

    Args:
        folder: Where it lies, for messages.
        weights: Its bytes.
        expected: Name to shape.
        config: The adapter's, for messages.
        optional: Name to shape of what may be there too.
        integers: Names of the tensors that are not floating-point.

    Returns:
        Name to tensor.

    Raises:
        ValueError: It is damaged, or tensors are missing, unexpected, of another shape or dtype, or not finite.
    """
    file = folder / WEIGHTS_FILE
    trained_on = f" The adapter was trained on {config.base_model_name_or_path!r}: is this that model?"
    hint = trained_on if config.base_model_name_or_path else " Is this the model that the adapter was trained on?"
    tensors = parse_weights(file, weights)
    if missing := sorted(expected.keys() - tensors.keys()):
        raise ValueError(f"{file} lacks {_few(missing)}.{hint}")
    expected = expected | {name: shape for name, shape in (optional or {}).items() if name in tensors}
    tensors = {name: tensor for name, tensor in tensors.items() if _without_adapter(name) not in expected}
    if unexpected := sorted(tensors.keys() - expected.keys()):
        raise ValueError(f"{file} holds unexpected tensors: {_few(unexpected)}.{hint}")
    for name, shape in expected.items():
        check_tensor(f"{file}: {name}", tensors[name], shape, name not in integers, hint)
    for name in tensors:
        copied = name.removesuffix(".modules_to_save.bias") + ".bias"
        if name.endswith(".modules_to_save.bias") and bool((tensors[name] != tensors[copied]).any()):
            raise ValueError(f"{file}: {name} and {copied} are two copies of one tensor and differ. Save it again.")
    return tensors


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
