"""Writing an adapter as plain PEFT LoRA checkpoints, which need no part of this library.

LoRA servers read one `r` and one `lora_alpha` from the config and neither `rank_pattern` nor `alpha_pattern`. So every
layer gets the same number of ranks, zeros filling up, `lora_alpha` equals `r`, and all scales and gates are in B.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

import torch
from peft import LoraConfig
from safetensors.torch import save
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..config.config import RankExpertConfig
from ..files.embeddings import peft_tensors
from ..files.layout import PREFIX
from ..files.saving import config_to_json
from ..files.state import adapter_config, saved_modules
from ..layers.experts import ExpertProjection
from ..layers.linear import RankExpertLinear, adapted_layers
from ..layers.offloading import onloaded
from ..messages import nearest
from ..storage.pair import CONFIG_FILE, WEIGHTS_FILE
from ..storage.staging import write_files
from .calibrate import CalibrationReport, Factors, calibrate
from .passes import Batches

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
    """Write an adapter as one standard PEFT LoRA checkpoint. The model is left as it is.

    A dense adapter is exported exactly, a task-routed one exactly for one task (`export_loras` writes one for each). A
    token-routed adapter has no exact static form: with `calibration`, the nearest one on that data is exported (see
    `calibrate`), and the returned report says how near.

    Modules to save and trained biases go along, as PEFT stores them. Tensors are float32 (float64 from a float64
    adapter): folding a scale into B would round in a narrower type.

    Args:
        model: With the adapter, wrapped in a `PeftModel` or not.
        path: The folder to write; it appears when it is complete, and replaces files of the same names.
        task: For a task-routed adapter, the task; it may be left out where there is only one.
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
        ValueError: The adapter or the task is unknown, no task is given and there are several, a token gate comes
            without calibration or another gate with it, r is too small, or a tensor is not finite. Nothing is
            written then.
        OSError: The disk is full, or the folder cannot be written; what was there before is unchanged.

    Example:
        >>> export_lora(model, "rte-lora", task="rte")  # doctest: +SKIP
        >>> print(export_lora(model, "static-lora", calibration=loader, r=32))  # doctest: +SKIP
    """
    config, layers = _exportable(model, adapter_name)
    if task is not None and config.router != "task":
        raise ValueError(
            f"task={task!r}: adapter {adapter_name!r} has router {config.router!r} and knows no tasks. Leave task out."
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
    factors = _exact_factors(layers, adapter_name, _task_id(config, task, adapter_name))
    r = _ranks({"": factors}, r, adapter_name)
    write_files(path, _checkpoint(model, config, adapter_name, factors, r))
    return None


def export_loras(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    r: int | None = None,
) -> None:
    """Write a task-routed adapter as one PEFT LoRA checkpoint a task, exactly; see `export_lora`.

    All of them have the same rank, so that a server swaps one for another in place.

    Args:
        model: With the adapter, wrapped in a `PeftModel` or not.
        path: The folder that gets a folder for each task, under the task's name. All of them appear when they are
            complete, and replace files of the same names.
        adapter_name: Which adapter.
        r: Ranks of the checkpoints. None: as few as hold every task's. More are filled up with zeros.

    Raises:
        ValueError: The adapter is unknown or does not route by task, a task's name cannot be a folder's, r is too
            small, or a tensor is not finite. Nothing is written then.
        OSError: The disk is full, or the folder cannot be written; what was there before is unchanged.

    Example:
        >>> export_loras(model, "loras")  # doctest: +SKIP
    """
    config, layers = _exportable(model, adapter_name)
    if config.router != "task":
        raise ValueError(
            f"Adapter {adapter_name!r} has router {config.router!r} and knows no tasks: there is one LoRA to write, by "
            "export_lora(model, path)."
        )
    tasks = list(config.tasks or ())
    for name in tasks:
        if name in (".", "..") or re.search(r'[/\\\0:*?"<>|]', name):
            raise ValueError(
                f"Task {name!r} cannot be a folder's name. Export each task by export_lora(model, path, task=...) to a "
                "path of its own."
            )
    static = {name: _exact_factors(layers, adapter_name, index) for index, name in enumerate(tasks)}
    r = _ranks(static, r, adapter_name)
    files = {
        f"{name}/{file}": parts
        for name, factors in static.items()
        for file, parts in _checkpoint(model, config, adapter_name, factors, r).items()
    }
    write_files(path, files)


def _exportable(model: nn.Module, adapter_name: str) -> tuple[RankExpertConfig, dict[str, RankExpertLinear]]:
    config = adapter_config(model, adapter_name)
    layers = {path: layer for path, layer in adapted_layers(model) if adapter_name in layer.rank_experts}
    for layer_path, layer in layers.items():
        if isinstance(layer.base_layer, ExpertProjection):
            raise ValueError(
                f"{layer_path} is one of a mixture's experts, which a plain LoRA does not name: it cannot be exported. "
                "Keep the adapter (save_rank_experts); or merge it, unless it routes by token (merge_rank_experts), "
                "and save the model."
            )
    return config, layers


def _task_id(config: RankExpertConfig, task: str | None, adapter_name: str) -> int | None:
    if config.router != "task":
        return None
    known = list(config.tasks or ())
    if task is None:
        if len(known) > 1:
            raise ValueError(
                f"Adapter {adapter_name!r} routes by task and knows {known}: name one with task=..., or write a folder "
                "for each with export_loras(model, path)."
            )
        return 0
    if task not in known:
        raise ValueError(
            f"Task {task!r} is unknown to adapter {adapter_name!r}, which knows {known}.{nearest(task, known)}"
        )
    return known.index(task)


def _ranks(static: dict[str, dict[str, Factors]], r: int | None, adapter_name: str) -> int:
    needed = max(own.A.shape[0] for factors in static.values() for own in factors.values())
    if r is not None and r < needed:
        raise ValueError(f"r={r}: adapter {adapter_name!r} needs {needed} ranks to be exported exactly.")
    return needed if r is None else r


@torch.no_grad()
def _exact_factors(layers: dict[str, RankExpertLinear], adapter_name: str, task_id: int | None) -> dict[str, Factors]:
    factors = {}
    for path, layer in layers.items():
        adapter = layer.rank_experts[adapter_name]
        with onloaded(adapter):
            A, B = adapter.factors(task_id)
            if task_id is not None:
                used = adapter.task_gate().route(torch.tensor([task_id], device=A.device)).gates[0] != 0
                A, B = A[used], B[:, used]
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
        dtype = torch.promote_types(layers[path].rank_experts[adapter_name].A.dtype, torch.float32)
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
    with onloaded(*saved_modules(model)):
        for key, tensor in peft_tensors(model, adapter_name).items():
            if ".rank_experts." not in key:
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
        trainable_token_indices=config.trainable_token_indices,
        ensure_weight_tying=config.ensure_weight_tying,
        bias="lora_only" if config.bias == "rank_experts_only" else config.bias,  # type: ignore[arg-type]
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
