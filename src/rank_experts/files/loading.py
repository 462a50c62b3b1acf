"""Loading an adapter into a model, which is touched only when all of the adapter fits it.

The config and the tensors' names, shapes and values are read first and compared with what the model would need. How the
bytes come off the disk is in `storage/pair.py`.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from peft import PeftModel, set_peft_model_state_dict
from torch import Tensor, nn

from ..config.config import RankExpertConfig
from ..config.equality import check_same
from ..layers.offloading import is_offloaded
from ..storage.pair import CONFIG_FILE, WEIGHTS_FILE, read_pair, read_weights
from ..tuner.injection import inject_rank_experts
from ..tuner.targets import find_targets
from .expected import check_shapes, check_tensors, expected_tensors, integer_tensors, optional_tensors, read_tensors
from .layout import PREFIX
from .state import adapter_config, adapter_tensors


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
    if parameters and all(parameter.is_meta for parameter in parameters) and not is_offloaded(model):
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
        FileNotFoundError: A file is missing.
        ValueError: There is no such adapter, its config computes something else (tasks in another order, another
            alpha, …; the message names the field), or the tensors do not fit it; nothing is changed then.
    """
    config = adapter_config(model, adapter_name)
    check_same(Path(path), read_config(Path(path)), config, adapter_name)
    own = dict(adapter_tensors(model, adapter_name, save_embedding_layers=False))
    shapes = {key: tuple(tensor.shape) for key, tensor in own.items()}
    integers = {key for key, tensor in own.items() if not tensor.is_floating_point()}
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    optional = optional_tensors(base, config, find_targets(base, config))
    _set_tensors(model, read_tensors(Path(path), shapes, config, optional, integers), adapter_name)


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
    header = None
    for _ in range(100):
        if config is None or header is not None:
            config_bytes, saved_config, header = read_pair(folder, header_only=True)
            config = RankExpertConfig.from_bytes(folder / CONFIG_FILE, config_bytes, saved_config)
        targets = find_targets(model, config)
        shapes = expected_tensors(model, config, targets), optional_tensors(model, config, targets)
        try:
            weights = read_weights(folder, check=partial(check_shapes, folder, config, *shapes))
        except ValueError:
            if header is None or read_weights(folder, header_only=True) == header:
                raise
            continue  # Another process saved between the two reads; here, and where the header is another one.
        if header is None or weights.startswith(header):
            integers = integer_tensors(model, config)
            return config, check_tensors(folder, weights, shapes[0], config, shapes[1], integers)
    raise ValueError(f"{folder} is being written without pause: {WEIGHTS_FILE} changed at each of 100 readings.")


def read_config(folder: Path) -> RankExpertConfig:
    """Read and validate an adapter's `adapter_config.json`.

    Args:
        folder: Where it lies.

    Raises:
        FileNotFoundError: There is none.
        ValueError: Not JSON, another method's, a newer format, an unknown field, or a value out of range.
    """
    return RankExpertConfig(**RankExpertConfig.from_json_file(folder / CONFIG_FILE))
