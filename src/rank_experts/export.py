"""Writing an adapter as a plain PEFT LoRA checkpoint, which needs no part of this library.

LoRA servers read one `r` and one `lora_alpha` from the config and neither `rank_pattern` nor `alpha_pattern`. So every
layer gets the same number of ranks, zeros filling up, `lora_alpha` equals `r`, and all scales and gates are in B.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .base_experts import ExpertProjection
from .calibrate import CalibrationReport, Factors, calibrate
from .config import RankExpertConfig, nearest
from .files import adapter_config, config_to_json
from .layer import RankExpertLinear
from .layout import PREFIX
from .model import adapted_layers
from .passes import Batches
from .routing import TaskRouter, TokenRouter
from .staging import write_files
from .storage import CONFIG_FILE, WEIGHTS_FILE

_WRAPPED = re.compile(r"\.(original_module|modules_to_save\.[^.]+|base_layer)(?=\.|$)")


def export_lora(
    model: nn.Module,
    path: str | os.PathLike[str],
    task: str | None = None,
    *,
    adapter_name: str = "default",
    r: int | None = None,
    calibration: Batches | None = None,
    method: str = "least-squares",
    max_memory_gb: float = 8.0,
    progress: bool = True,
) -> CalibrationReport | None:
    """Write an adapter as a standard PEFT LoRA checkpoint. The model is left as it is.

    A dense adapter is exported exactly, a task-routed one exactly for one task; without a task, `path` becomes a
    folder with one checkpoint a task, all of the same rank. A token-routed adapter has no exact static form: with
    `calibration`, the nearest one on that data is exported (see `calibrate`), and the returned report says how near.

    Modules to save and trained biases go along, as PEFT stores them. Tensors are float32 (float64 from a float64
    adapter): folding a scale into B would round in a narrower type.

    Args:
        model: With the adapter, wrapped in a `PeftModel` or not.
        path: The folder to write; it appears when it is complete, and replaces files of the same names.
        task: For a task-routed adapter, the task; None: all of them, a folder each (or the only one, in `path`).
        adapter_name: Which adapter.
        r: Ranks of the checkpoint. None: as few as hold the adapter. More are filled up with zeros; fewer only with
            calibration.
        calibration: For a token-routed adapter, a `DataLoader` or a list of batches.
        method: How to make a token gate static; see `calibrate`.
        max_memory_gb: For the calibration's accumulators.
        progress: Show progress bars while calibrating.

    Returns:
        A `CalibrationReport` from a calibrated export, to be printed; None from an exact one.

    Raises:
        ValueError: The adapter or the task is unknown, a token gate comes without calibration or another gate with
            it, r is too small, or a tensor is not finite. Nothing is written then.
        OSError: The disk is full, or the folder cannot be written; what was there before is unchanged.

    Example:
        >>> export_lora(model, "rte-lora", task="rte")  # doctest: +SKIP
        >>> print(export_lora(model, "static-lora", calibration=loader, r=32))  # doctest: +SKIP
    """
    config = adapter_config(model, adapter_name)
    layers = {path: layer for path, layer in adapted_layers(model) if adapter_name in layer.rank_expert_A}
    if task is not None and config.router != "task":
        raise ValueError(
            f"task={task!r}: adapter {adapter_name!r} has router {config.router!r} and knows no tasks. Leave task out."
        )
    for layer_path, layer in layers.items():
        if isinstance(layer.base_layer, ExpertProjection):
            raise ValueError(
                f"{layer_path} is one of a mixture's experts, which a plain LoRA does not name: it cannot be exported. "
                "Keep the adapter (save_rank_experts); or merge it, unless it routes by token (merge_rank_experts), "
                "and save the model."
            )
    if calibration is not None:
        factors, report = calibrate(
            model,
            calibration,
            adapter_name,
            r=r,
            method=method,
            max_memory_gb=max_memory_gb,
            progress=progress,
        )
        write_files(path, _checkpoint(model, config, adapter_name, factors, report.r))
        return report
    if config.router == "token":
        raise ValueError(
            f"Adapter {adapter_name!r} routes by token, so its update differs from token to token and has no exact "
            "static form. Give calibration=dataloader to export the nearest static LoRA, or keep the router "
            "(save_rank_experts)."
        )
    tasks = _tasks_to_export(config, task, adapter_name)
    static = {name: _exact_factors(layers, adapter_name, task_id) for name, task_id in tasks.items()}
    needed = max(own.A.shape[0] for factors in static.values() for own in factors.values())
    if r is not None and r < needed:
        raise ValueError(f"r={r}: adapter {adapter_name!r} needs {needed} ranks to be exported exactly.")
    files: dict[str, list[bytes]] = {}
    for name, factors in static.items():
        place = "" if len(static) == 1 else f"{name}/"
        checkpoint = _checkpoint(model, config, adapter_name, factors, r or needed)
        files |= {place + file: parts for file, parts in checkpoint.items()}
    write_files(path, files)
    return None


def _tasks_to_export(config: RankExpertConfig, task: str | None, adapter_name: str) -> dict[str, int | None]:
    if config.router != "task":
        return {"": None}
    known = list(config.tasks or ())
    if task is not None:
        if task not in known:
            raise ValueError(
                f"Task {task!r} is unknown to adapter {adapter_name!r}, which knows {known}.{nearest(task, known)}"
            )
        return {task: known.index(task)}
    for name in known:
        if name in (".", "..") or re.search(r'[/\\\0:*?"<>|]', name):
            raise ValueError(
                f"Task {name!r} cannot be a folder's name. Export each task with task=... and its own path."
            )
    return {name: index for index, name in enumerate(known)}


@torch.no_grad()
def _exact_factors(layers: dict[str, RankExpertLinear], adapter_name: str, task_id: int | None) -> dict[str, Factors]:
    factors = {}
    for path, layer in layers.items():
        A, B = layer.rank_expert_A[adapter_name].detach(), layer.rank_expert_B[adapter_name].detach()
        dtype = torch.promote_types(A.dtype, torch.float32)
        B = B.to(dtype) * layer.scale(adapter_name)
        A = A.to(dtype)
        router = layer._router(adapter_name)
        assert not isinstance(router, TokenRouter)
        if isinstance(router, TaskRouter):
            gates = router(torch.tensor([task_id], device=A.device)).gates[0].to(dtype)
            used = gates != 0
            A, B = A[used], (B * gates)[:, used]
        factors[path] = Factors(A, B)
    return factors


def _checkpoint(
    model: nn.Module,
    config: RankExpertConfig,
    adapter_name: str,
    factors: dict[str, Factors],
    r: int,
) -> dict[str, list[bytes]]:
    # File name to bytes.
    layers = dict(adapted_layers(model))
    tensors: dict[str, Tensor] = {}
    for path, (A, B) in factors.items():
        key = PREFIX + path.removeprefix(PREFIX)
        dtype = torch.promote_types(layers[path].rank_expert_A[adapter_name].dtype, torch.float32)
        A, B = (factor.to("cpu", dtype) for factor in (A, B))
        tensors[f"{key}.lora_A.weight"] = torch.cat([A, A.new_zeros(r - len(A), A.shape[1])]).contiguous()
        tensors[f"{key}.lora_B.weight"] = torch.cat([B, B.new_zeros(len(B), r - B.shape[1])], dim=1).contiguous()
    tensors.update(_carried_along(model, adapter_name))
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(
                f"{name} has values that are not finite: the adapter's training diverged. Nothing is written."
            )
    lora_config = _lora_config(model, config, [path.removeprefix(PREFIX) for path in factors], r)
    return {
        WEIGHTS_FILE: [save(tensors, metadata={"format": "pt"})],
        CONFIG_FILE: [config_to_json(lora_config).encode()],
    }


def _carried_along(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    # Modules to save and trained biases, under the keys that PEFT's LoRA reads them from.
    tensors = {}
    for key, tensor in get_peft_model_state_dict(model, adapter_name=adapter_name).items():
        if ".rank_expert_" not in key:
            key = PREFIX + key.removeprefix(PREFIX)
            tensors[key] = tensor.detach().to("cpu").contiguous().clone()
    return tensors


def _lora_config(model: nn.Module, config: RankExpertConfig, paths: list[str], r: int) -> LoraConfig:
    names = [name.removeprefix(PREFIX) for name, _ in model.named_modules()]
    return LoraConfig(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        auto_mapping=config.auto_mapping,
        inference_mode=True,
        r=r,
        lora_alpha=r,
        target_modules=name_targets(paths, names),
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for _, layer in adapted_layers(model)),
        bias="lora_only" if config.bias == "rank_expert_only" else config.bias,  # type: ignore[arg-type]
        modules_to_save=config.modules_to_save,
    )


def name_targets(paths: Iterable[str], all_names: Iterable[str]) -> list[str] | str:
    """Name modules for a config's `target_modules` so that these and no others are matched.

    Args:
        paths: The modules' paths.
        all_names: The paths of all modules of the model, with or without wrappers that PEFT put around some.

    Returns:
        Last components where they suffice, full paths where not; a regular expression where one path ends another.

    Example:
        >>> name_targets(["0.query", "1.query"], ["0", "0.query", "0.key", "1", "1.query"])
        ['query']
    """
    wanted = set(paths)
    others = {_WRAPPED.sub("", name) for name in all_names} - wanted
    taken = {name.rpartition(".")[2] for name in others}
    targets = sorted({path if (leaf := path.rpartition(".")[2]) in taken else leaf for path in wanted})
    if any(other.endswith("." + target) or other == target for other in others for target in targets):
        return "|".join(re.escape(path) for path in sorted(wanted))
    return targets
