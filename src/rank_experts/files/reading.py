"""Reading an adapter's folder without a model: the config, and every tensor checked against it.

Loading into a model (`files/loading.py`) knows which layers the model has. Whoever serves, converts or inspects an
adapter knows the folder alone; what can be checked then is checked here: the config, the digest, every tensor's name,
shape and dtype, and that all values are finite.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from peft.utils.other import get_pattern_key
from torch import Tensor

from ..config.checks import check_experts
from ..config.config import RankExpertConfig
from ..config.method import PEFT_TYPE
from ..storage.pair import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_tensor,
    parse_json,
    parse_weights,
    read_config_bytes,
    read_pair,
    read_weights,
)
from .layout import PREFIX, TENSOR_NAME, tensor_shapes


class AdapterFiles(NamedTuple):
    """An adapter as its folder holds it.

    Attributes:
        folder: Where it lies.
        config: The adapter's.
        layers: Layer path to the layer's tensors, by the names of docs/file-format.md ("A", "B", "router_weight", …).
        others: What else the weights' file holds, by the file's names: biases, modules_to_save, embeddings.
    """

    folder: Path
    config: RankExpertConfig
    layers: dict[str, dict[str, Tensor]]
    others: dict[str, Tensor]

    def alpha(self, path: str) -> float:
        """Return a layer's alpha, after alpha_pattern."""
        return _of_pattern(self.config, self.config.alpha_pattern, path, self.config.alpha)


def read_adapter_files(folder: str | os.PathLike[str]) -> AdapterFiles:
    """Read an adapter and check all that can be checked without its model.

    Args:
        folder: Where it lies.

    Returns:
        The config and the tensors, as they are on the disk.

    Raises:
        FileNotFoundError: The folder or one of its files is missing; a pickle is not read.
        ValueError: Another method's adapter, a newer format, a config out of range, a damaged file, a layer without one
            of its tensors or with one that does not belong there, or a tensor of another shape or dtype, or not finite.

    Example:
        >>> read_adapter_files("my-adapter").config.router  # doctest: +SKIP
        'token'
    """
    folder = Path(folder)
    config_bytes, saved_config, weights = read_pair(folder)
    config = RankExpertConfig.from_bytes(folder / CONFIG_FILE, config_bytes, saved_config)
    file = folder / WEIGHTS_FILE
    layers: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in parse_weights(file, read_weights(folder) if weights is None else weights).items():
        if match := TENSOR_NAME.fullmatch(key):
            layers.setdefault(match["path"], {})[match["name"]] = tensor
        else:
            check_tensor(f"{file}: {key}", tensor, tuple(tensor.shape), tensor.is_floating_point())
            others[key] = tensor
    if not layers:
        raise ValueError(f"{file} holds no adapted layer: expected tensors like {PREFIX}<layer>.rank_experts.A.")
    for path, tensors in layers.items():
        _check_layer(file, config, path, tensors)
    return AdapterFiles(folder, config, layers, others)


def holds_rank_experts(folder: str | os.PathLike[str]) -> bool:
    """Say whether a folder's `adapter_config.json` is one of this library's.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It cannot be read, or is not JSON.
    """
    folder = Path(folder)
    return parse_json(folder / CONFIG_FILE, read_config_bytes(folder)).get("peft_type") == PEFT_TYPE


def _check_layer(file: Path, config: RankExpertConfig, path: str, tensors: dict[str, Tensor]) -> None:
    A, B = tensors.get("A"), tensors.get("B")
    d_in = A.shape[-1] if A is not None and A.dim() else 0
    d_out = B.shape[0] if B is not None and B.dim() else 0
    r = _of_pattern(config, config.rank_pattern, path, config.r)
    if config.router == "token":
        check_experts(r, config.expert_rank, config.top_k, where=f"{file}: {path}")
    expected = tensor_shapes(config, r, d_in, d_out)
    if missing := sorted(expected.keys() - tensors.keys()):
        raise ValueError(f"{file} lacks {', '.join(missing)} of {path}. Save or download the adapter again.")
    if unexpected := sorted(tensors.keys() - expected.keys()):
        raise ValueError(
            f"{file} holds {', '.join(unexpected)} of {path}, which an adapter with router={config.router!r} does not "
            "have. The config and the weights do not belong together; save or download the adapter again."
        )
    for name, shape in expected.items():
        check_tensor(f"{file}: {PREFIX}{path}.rank_experts.{name}", tensors[name], shape)


def _of_pattern(config: RankExpertConfig, pattern: dict[str, Any], path: str, default: Any) -> Any:
    # An expert of a mixture goes by its own path or, with all the others, by its parameter's; see `tuner/targets.py`.
    parameter, _, number = path.rpartition(".")
    paths = (path, parameter) if config.target_parameters and number.isdigit() else (path,)
    keys = (get_pattern_key(list(pattern), name) for name in paths)
    return next((pattern[key] for key in keys if key in pattern), default)
