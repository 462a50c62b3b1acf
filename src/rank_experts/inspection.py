"""What an adapter's files say of it, without its base model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import RankExpertConfig
from .files import CONFIG_FILE, WEIGHTS_FILE, read_config
from .heads import HEADS_CONFIG, read_heads
from .routing import TaskRouter

_PREFIX = "base_model.model."


def inspect_adapter(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe a saved adapter.

    Args:
        path: Its folder.

    Returns:
        A mapping that JSON can hold: method, base_model, tasks, layers, parameters, bytes, ranks (layer to r); for a
        token router balance_bias (layer to mean absolute, least and greatest bias); for a task router chosen_ranks
        (task to layer to r_t) and task_similarity (T × T cosine of the embeddings, averaged over layers); heads,
        where there are any.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged or another method's.

    Example:
        >>> inspect_adapter("my-adapter")["method"]  # doctest: +SKIP
        'SMoRA'
    """
    folder = Path(path)
    config = read_config(folder)
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no {WEIGHTS_FILE}; save_rank_experts writes it beside {CONFIG_FILE}.")
    try:
        with safe_open(file, framework="pt") as stored:
            tensors = {key.removeprefix(_PREFIX): stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}.") from None
    layers = [key.removesuffix(".rank_expert_A") for key in tensors if key.endswith(".rank_expert_A")]
    report: dict[str, Any] = {
        "method": _method(config),
        "base_model": config.base_model_name_or_path,
        "tasks": config.tasks,
        "layers": len(layers),
        "parameters": sum(t.numel() for key, t in tensors.items() if not key.endswith("balance_bias")),
        "bytes": file.stat().st_size,
        "ranks": {layer: len(tensors[f"{layer}.rank_expert_A"]) for layer in layers},
    }
    if config.router == "token":
        report["balance_bias"] = {layer: _bias(tensors[f"{layer}.rank_expert_router.balance_bias"]) for layer in layers}
    if config.router == "task":
        report |= _tasks(config, tensors, layers)
    if (folder / HEADS_CONFIG).is_file():
        report["heads"] = {task: spec.labels or "numbers" for task, spec in read_heads(folder)[0].items()}
    return report


def _method(config: RankExpertConfig) -> str:
    if config.router == "token":
        if config.expert_rank == 1:
            return f"SMoRA, {config.top_k} of {config.r} ranks a token"
        return f"mixture of LoRAs, {config.top_k} of {config.num_experts} experts of rank {config.expert_rank}"
    return f"MoRE, ranks 1…{config.r}" if config.router == "task" else f"LoRA, rank {config.r}"


def _bias(bias: Tensor) -> dict[str, float]:
    values = {"mean_abs": bias.abs().mean(), "min": bias.min(), "max": bias.max()}
    return {name: round(float(value), 6) for name, value in values.items()}


def _tasks(config: RankExpertConfig, tensors: dict[str, Tensor], layers: list[str]) -> dict[str, Any]:
    tasks = config.tasks or []
    ranks: dict[str, dict[str, int]] = {task: {} for task in tasks}
    similarity = torch.zeros(len(tasks), len(tasks))
    for layer in layers:
        key = f"{layer}.rank_expert_router"
        embedding, weight = tensors[f"{key}.task_embedding"].float(), tensors[f"{key}.gate_weight"].float()
        r, width = weight.shape
        # The router itself decides, so that this cannot come to differ from it.
        router = TaskRouter(d_in=width, r=r, num_tasks=len(tasks))
        state = {"task_embedding": embedding, "gate_weight": weight, "gate_bias": tensors[f"{key}.gate_bias"].float()}
        router.load_state_dict(state)
        for task, rank in zip(tasks, router(torch.arange(len(tasks))).indices.tolist(), strict=True):
            ranks[task][layer] = rank
        unit = F.normalize(embedding, dim=-1)
        similarity += unit @ unit.T / len(layers)
    return {"chosen_ranks": ranks, "task_similarity": [[round(v, 4) for v in row] for row in similarity.tolist()]}


def format_report(report: dict[str, Any]) -> str:
    """Return what `rank-experts inspect` prints of `inspect_adapter`'s report."""
    ranks = sorted(set(report["ranks"].values()))
    lines = [
        report["method"],
        f"base model   {report['base_model'] or 'not named'}",
        f"layers       {report['layers']}, ranks {', '.join(map(str, ranks))}",
        f"parameters   {report['parameters']:,} ({report['bytes'] / 2**20:.1f} MiB)",
    ]
    if "balance_bias" in report:
        biases = report["balance_bias"].values()
        mean = sum(bias["mean_abs"] for bias in biases) / max(1, len(biases))
        low, high = min(bias["min"] for bias in biases), max(bias["max"] for bias in biases)
        lines.append(f"balance bias mean |b| {mean:.4f}, from {low:.4f} to {high:.4f}")
    if tasks := report.get("tasks"):
        wide = max(map(len, tasks))
        lines += [
            "",
            f"{'task':{wide}}  chosen ranks over layers: mean, least, most   similarity to {', '.join(tasks)}",
        ]
        for task, similar in zip(tasks, report["task_similarity"], strict=True):
            own = list(report["chosen_ranks"][task].values())
            spread = f"{sum(own) / len(own):5.2f} {min(own):3} {max(own):3}"
            lines.append(f"{task:{wide}}  {spread:44} {' '.join(f'{value:6.2f}' for value in similar)}")
    if heads := report.get("heads"):
        lines += [
            "",
            *(f"head {task}: {labels if labels == 'numbers' else ', '.join(labels)}" for task, labels in heads.items()),
        ]
    return "\n".join(lines)
