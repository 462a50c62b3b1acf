"""Adapters that the two papers' own code saved, in our files.

SMoRA's code (arXiv 2501.15103): `lora_A.weight` (r, d_in), `lora_B.weight` (d_out, r), `lora_router.weight`
(r / rank_partition, d_in), `lora_biases` (r,). The bias is added to the scores after these were repeated over a
partition, and it enters the gates; the activate_r largest of r ranks are active; the scale is lora_alpha / activate_r.

MoRE's code (arXiv 2505.22694): `lora_A.weight` (8, d_in), `lora_B.weight` (d_out, 8), `lora_gate.0.weight` (8, d_in),
`lora_gate.0.bias` (8,), `lora_task_embedding.weight` (8, d_in): always 8 ranks and 8 tasks without names. Rank j is
scaled by j / 8 in A and in B; the scale is lora_alpha / r.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config.checks import MAX_FLOAT
from ..config.config import RankExpertConfig
from ..files.layout import PREFIX
from ..files.lora import read_adapter_config, read_adapter_tensors
from ..files.saving import write_adapter
from ..storage.pair import CONFIG_FILE

_SMORA = ("lora_A.weight", "lora_B.weight", "lora_router.weight", "lora_biases")
_MORE = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_gate.0.weight",
    "lora_gate.0.bias",
    "lora_task_embedding.weight",
)
_KEY = re.compile(r"(?P<layer>.+?)\.(?P<name>lora_(?:A|B|router|gate|biases|task_embedding)\b.*)")
_RANKS = 8


def import_checkpoint(
    source: str | os.PathLike[str], target: str | os.PathLike[str], *, tasks: list[str] | None = None
) -> RankExpertConfig:
    """Turn a folder that SMoRA's or MoRE's own code saved into one that `load_rank_experts` and PEFT read.

    The adapter computes the same. Which of the two codes wrote it shows in the tensors' names. A SMoRA checkpoint
    becomes an adapter with `biased_gates=True`, of blocks where its biases are equal within every partition and of
    single ranks where not. A MoRE checkpoint becomes one with `rank_scaling="quadratic"`.

    Args:
        source: With `adapter_config.json` and `adapter_model.safetensors`. An `adapter_model.bin` is a pickle and is
            not read; if you trust it, `safetensors.torch.save_file(torch.load(file, weights_only=True), …)` converts.
        target: The folder to write; it appears when it is complete.
        tasks: Names for MoRE's tasks in the order of their ids, up to 8; None: "task0" … "task7".

    Returns:
        The config that was written.

    Raises:
        FileNotFoundError: The source or one of its files is missing.
        ValueError: A checkpoint of neither code, or one whose shapes or config do not fit together. Nothing is
            written then.

    Example:
        >>> import_checkpoint("smora-output", "my-adapter")  # doctest: +SKIP
        >>> model = load_rank_experts(model, "my-adapter")  # doctest: +SKIP
    """
    source = Path(source)
    values = read_adapter_config(source)
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_adapter_tensors(source).items():
        match = _KEY.fullmatch(key.removeprefix(PREFIX))
        if match is None:
            raise ValueError(f"{source}: {key} belongs to no adapted layer of SMoRA's or MoRE's code.")
        layers.setdefault(match["layer"], {})[match["name"]] = tensor
    kinds = {frozenset(found) for found in layers.values()}
    if kinds == {frozenset(_SMORA)}:
        if tasks is not None:
            raise ValueError(f"tasks={tasks!r}: {source} is a SMoRA checkpoint, which knows no tasks. Leave tasks out.")
        config, tensors = _import_smora(source, values, layers)
    elif kinds == {frozenset(_MORE)}:
        config, tensors = _import_more(source, values, layers, tasks)
    else:
        found = sorted(set().union(*kinds)) if kinds else []
        raise ValueError(
            f"{source} is a checkpoint of neither paper's code: its layers hold {found}. Expected {list(_SMORA)} "
            f"(SMoRA) or {list(_MORE)} (MoRE) in each. Plain LoRAs are read by inject_lora and inject_loras."
        )
    write_adapter(Path(target), config, tensors)
    return config


def _config(
    source: Path, preset: Callable[..., RankExpertConfig], values: dict[str, Any], layers: Iterable[str], **own: Any
) -> RankExpertConfig:
    try:
        return preset(**own, **_shared(values, layers))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source / CONFIG_FILE}: {error}") from error


def _shared(values: dict[str, Any], layers: Iterable[str]) -> dict[str, Any]:
    names = ("target_modules", "base_model_name_or_path", "task_type", "revision", "layers_to_transform")
    defaults = {"target_modules": sorted(layers), "dropout": values.get("lora_dropout") or 0.0}
    return defaults | {name: values[name] for name in names if values.get(name) is not None}


def _number(source: Path, values: dict[str, Any], name: str) -> float:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < MAX_FLOAT:
        raise ValueError(f"{source / CONFIG_FILE}: {name}={value!r}: expected a number above 0, finite in float32.")
    return value


def _count(source: Path, values: dict[str, Any], name: str, default: int | None = None) -> int:
    value = values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{source / CONFIG_FILE}: {name}={value!r}: expected a whole number of at least 1.")
    return value


def _import_smora(
    source: Path, values: dict[str, Any], layers: dict[str, dict[str, Tensor]]
) -> tuple[RankExpertConfig, dict[str, Tensor]]:
    r, active = _count(source, values, "r"), _count(source, values, "activate_r")
    partition = _count(source, values, "rank_partition", 1)
    if r % partition:
        raise ValueError(f"{source / CONFIG_FILE}: r={r} is not a multiple of rank_partition={partition}.")
    alpha = _number(source, values, "lora_alpha")
    for layer, found in layers.items():
        d_in, d_out = _sizes(source, layer, found)
        sizes = ((r, d_in), (d_out, r), (r // partition, d_in), (r,))
        _check_shapes(source, layer, found, dict(zip(_SMORA, sizes)))
    blocks = {layer: found["lora_biases"].view(-1, partition) for layer, found in layers.items()}
    # Ranks of a partition that have one bias are chosen together; they are a block. Others are chosen on their own.
    whole = active % partition == 0 and all(bool((bias == bias[:, :1]).all()) for bias in blocks.values())
    expert_rank = partition if whole else 1
    config = _config(
        source,
        RankExpertConfig.smora,
        values,
        layers,
        r=r,
        top_k=active // expert_rank,
        # Their scale is alpha / activate_r for a rank; ours alpha / top_k for a block.
        alpha=alpha / expert_rank,
        expert_rank=expert_rank,
        biased_gates=True,
    )
    tensors = {}
    for layer, found in layers.items():
        weight = found["lora_router.weight"]
        key = f"{PREFIX}{layer}.rank_experts."
        tensors[f"{key}A"] = found["lora_A.weight"].contiguous()
        tensors[f"{key}B"] = found["lora_B.weight"].contiguous()
        tensors[f"{key}router_weight"] = (weight if whole else weight.repeat_interleave(partition, 0)).contiguous()
        bias = blocks[layer][:, 0] if whole else found["lora_biases"]
        tensors[f"{key}balance_bias"] = bias.float().contiguous()
    return config, tensors


def _import_more(
    source: Path, values: dict[str, Any], layers: dict[str, dict[str, Tensor]], tasks: list[str] | None
) -> tuple[RankExpertConfig, dict[str, Tensor]]:
    if (r := _count(source, values, "r")) != _RANKS:
        raise ValueError(f"{source / CONFIG_FILE}: r={r}: MoRE's code has gates for {_RANKS} ranks and no others.")
    tasks = [f"task{i}" for i in range(_RANKS)] if tasks is None else list(tasks)
    if len(tasks) > _RANKS:
        raise ValueError(f"tasks has {len(tasks)} names: MoRE's code has {_RANKS} tasks.")
    own: dict[str, Any] = {"r": r, "alpha": _number(source, values, "lora_alpha"), "rank_scaling": "quadratic"}
    config = _config(source, RankExpertConfig.more, values, layers, tasks=tasks, **own)
    tensors = {}
    for layer, found in layers.items():
        d_in, d_out = _sizes(source, layer, found)
        sizes = ((r, d_in), (d_out, r), (_RANKS, d_in), (_RANKS,), (_RANKS, d_in))
        _check_shapes(source, layer, found, dict(zip(_MORE, sizes)))
        key = f"{PREFIX}{layer}.rank_experts."
        tensors[f"{key}A"] = found["lora_A.weight"].contiguous()
        tensors[f"{key}B"] = found["lora_B.weight"].contiguous()
        tensors[f"{key}gate_weight"] = found["lora_gate.0.weight"].contiguous()
        tensors[f"{key}gate_bias"] = found["lora_gate.0.bias"].contiguous()
        # Copied, because a slice shares its storage with the rows that are left out.
        tensors[f"{key}task_embedding"] = found["lora_task_embedding.weight"][: len(tasks)].clone()
    return config, tensors


def _sizes(source: Path, layer: str, found: dict[str, Tensor]) -> tuple[int, int]:
    A, B = found["lora_A.weight"], found["lora_B.weight"]
    if A.dim() != 2 or B.dim() != 2:
        raise ValueError(
            f"{source}: {layer} has lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)}: expected matrices."
        )
    return A.shape[1], B.shape[0]


def _check_shapes(source: Path, layer: str, found: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    for name, shape in expected.items():
        if tuple(found[name].shape) != shape:
            raise ValueError(f"{source}: {layer}.{name} has shape {tuple(found[name].shape)}, expected {shape}.")
