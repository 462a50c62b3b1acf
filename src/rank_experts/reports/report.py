"""Routing that people can read: a table, a page, and what stands out.

    routing_report(model, dataloader, "routing.html")    what the routers do with data
    inspect_adapter("my-adapter")                        what the files alone tell, without the base model

Both return a `RoutingReport`. The counting is in `recording.py`, the tables in `report_tables.py`, the page in
`report_page.py`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config.config import RankExpertConfig
from ..files.expected import check_tensors
from ..files.heads import HEADS_CONFIG, read_heads
from ..files.layout import TENSOR_NAME, layers_of_tensors
from ..files.saving import config_to_json
from ..layers.offloading import device_of
from ..messages import printable
from ..routing.statistics import MOST_COMPARED, LayerStatistics, mean_similarity
from ..storage.pair import CONFIG_FILE, WEIGHTS_FILE, read_pair, read_weights
from .contents import Contents
from .page import render
from .recording import record_routing
from .tables import layer_rows, task_rows, text_table

_METHODS = {"token": "SMoRA (token-routed ranks)", "task": "MoRE (task-routed ranks)", "dense": "LoRA (no router)"}
_MIXTURE = "mixture of LoRAs (token-routed blocks of ranks)"
_MOST_TASKS = 1024  # of an adapter's files; a file of a few MB can name millions
_OF_A_LAYER = (
    *("path", "router", "tasks", "sizes", "num_experts", "update_norm", "balance_bias", "chosen_rank"),
    *("load", "load_cv", "load_max", "load_entropy", "routing_entropy", "dead_experts", "task_usage", "task_overlap"),
)


class RoutingReport(Contents):
    """What is known of an adapter's routing, ready to be printed; what it holds, see `Contents`."""

    def to_text(self) -> str:
        """Return the report for a terminal: facts, findings, one line a task, one line a layer."""
        facts = {printable(name): printable(value) for name, value in self.facts.items()}
        width = max(map(len, facts), default=0)
        parts = [printable(self.title), *(f"  {name.ljust(width)}  {value}" for name, value in facts.items()), ""]
        parts += [f"{'!' if found.level == 'warning' else '-'} {printable(found.text)}" for found in self.findings]
        for rows in (task_rows(self.layers), layer_rows(self.layers)):
            parts += ["", *text_table([[printable(cell) for cell in row] for row in rows])] if rows else []
        return "\n".join(parts) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as what JSON can hold: numbers of a layer by the names of `LayerStatistics`."""
        # Numbers for each pair of tasks, or of task and expert, are left out where there would be too many.
        many = len(self.tasks) > MOST_COMPARED
        left_out = ("task_usage", "task_overlap") if many else ()
        return {
            "title": self.title,
            "facts": dict(self.facts),
            "findings": [found._asdict() for found in self.findings],
            "config": None if self.config is None else json.loads(config_to_json(self.config)),
            "tasks": list(self.tasks),
            "task_similarity": None if many else _plain(mean_similarity(self.layers)),
            "layers": [
                {name: None if name in left_out else _plain(getattr(layer, name)) for name in _OF_A_LAYER}
                for layer in self.layers
            ],
        }

    def to_html(self) -> str:
        """Return the report as one self-contained HTML page."""
        return render(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the HTML page."""
        Path(path).write_text(self.to_html(), encoding="utf-8")

    def __str__(self) -> str:
        return self.to_text()


def routing_report(
    model: nn.Module,
    dataloader: Iterable[Mapping[str, Any]],
    output: str | os.PathLike[str] | None = None,
    *,
    adapter_name: str | None = None,
    tasks: Sequence[str] | None = None,
    log_history: Sequence[Mapping[str, Any]] = (),
    max_batches: int | None = None,
) -> RoutingReport:
    """Run a model over data in evaluation mode and report what its routers decided.

    Under data parallelism all ranks call it, each with its own data; each returns the report on all of it and rank 0
    writes the page.

    Args:
        model: With a routed adapter.
        dataloader: Batches of keyword arguments for the model, tensors on any device. `task_ids` among them tell the
            tasks apart, also where only token routers are there.
        output: Where to write the HTML page; None: nowhere.
        adapter_name: Which adapter; None: the first active one.
        tasks: Names for `task_ids` where the model has token routers only.
        log_history: `trainer.state.log_history`, for the curves of the training.
        max_batches: Stop after so many; None: take all.

    Returns:
        A `RoutingReport`; `print` it, or `.save` it.

    Raises:
        ValueError: There is no routed adapter, or nothing was routed (no data, or the adapter is merged or disabled).
        TypeError: A batch is not a mapping.

    Example:
        >>> print(routing_report(model, dataloader, "routing.html"))  # doctest: +SKIP
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with record_routing(model, tasks) as stats, torch.no_grad():
            for i, batch in enumerate(dataloader):
                if max_batches is not None and i >= max_batches:
                    break
                model(**_on_device(batch, model))
    finally:
        for module, training in modes:
            module.training = training
    distributed = dist.is_available() and dist.is_initialized()
    layers = stats.all_reduce().layers(adapter_name)
    tokens = [int(layer.counts.tokens.sum()) for layer in layers if layer.counts is not None]
    if not sum(tokens):
        raise ValueError(
            "routing_report saw no token being routed: the dataloader is empty, all of it is padding, or the adapter "
            "is merged (unmerge_rank_experts), disabled or not active."
        )
    config = _config_of(model, adapter_name)
    facts = _facts(config, layers) | {"recorded": f"{max(tokens):,} tokens" + _by_task(layers)}
    report = RoutingReport("Routing report", facts, layers, config, tuple(log_history))
    if output is not None and not (distributed and dist.get_rank()):
        report.save(output)
    return report


def _on_device(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"A batch is a {type(batch).__name__}: expected keyword arguments for the model, for instance "
            '{"input_ids": …, "attention_mask": …, "task_ids": …}.'
        )
    device = device_of(model)
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _config_of(model: nn.Module, adapter_name: str | None) -> RankExpertConfig | None:
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        for name, config in configs.items() if isinstance(configs, dict) else ():
            if isinstance(config, RankExpertConfig) and adapter_name in (None, name):
                return config
    return None


def _plain(value: Any) -> Any:
    # As JSON: tensors as lists, NaN (a task that was not seen) as null.
    value = value.tolist() if isinstance(value, Tensor) else value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _facts(config: RankExpertConfig | None, layers: Sequence[LayerStatistics]) -> dict[str, str]:
    ranks = sorted({layer.sizes[0] for layer in layers})
    facts = {
        "method": _METHODS[layers[0].router] if layers else "",
        "layers": f"{len(layers)}, r = {' / '.join(map(str, ranks))}",
    }
    if config is None:
        return facts
    if config.router == "token" and config.expert_rank > 1:
        facts["method"] = _MIXTURE
    if config.base_model_name_or_path:
        facts["base model"] = str(config.base_model_name_or_path)
    facts["alpha"] = f"{config.alpha:g}"
    if config.router == "token":
        experts = sorted({layer.num_experts for layer in layers})
        facts["experts"] = (
            f"{' / '.join(map(str, experts))} of rank {config.expert_rank}, {config.top_k} active a token"
        )
        facts["balancing"] = config.load_balance
    if config.router == "task":
        names = config.tasks or []
        facts["tasks"] = ", ".join(names[:MOST_COMPARED])
        if (more := len(names) - MOST_COMPARED) > 0:
            facts["tasks"] += f", and {more:,} more"
    return facts


def _by_task(layers: Sequence[LayerStatistics]) -> str:
    layer = max(layers, key=lambda layer: 0 if layer.counts is None else int(layer.counts.tokens.sum()))
    if layer.counts is None or not layer.tasks:
        return ""
    numbers = layer.counts.tokens.tolist()
    named = [f"{task} {number:,}" for task, number in zip(layer.tasks, numbers[1:])]
    return f" ({', '.join([*named, *([f'no task {numbers[0]:,}'] if numbers[0] else [])])})"


def inspect_adapter(path: str | os.PathLike[str], log_history: Sequence[Mapping[str, Any]] = ()) -> RoutingReport:
    """Report on an adapter from its files alone; no base model is needed.

    Sizes, the size of every rank's update, a token router's balancing bias, and a task router's chosen ranks and
    embeddings. What tokens do only data can tell: see `routing_report`.

    Args:
        path: A folder that `save_rank_experts` or `PeftModel.save_pretrained` wrote.
        log_history: The Trainer's, for the curves of the training.

    Returns:
        A `RoutingReport`.

    Raises:
        FileNotFoundError: The folder or one of its files is missing.
        ValueError: It is another method's adapter, a newer format, damaged, or its tensors do not fit together.

    Example:
        >>> print(inspect_adapter("my-adapter"))  # doctest: +SKIP
    """
    folder = Path(path)
    config_bytes, saved_config, weights = read_pair(folder)
    config = RankExpertConfig.from_bytes(folder / CONFIG_FILE, config_bytes, saved_config)
    weights = read_weights(folder) if weights is None else weights  # raises, and says what is there instead
    shapes, integers = _header(folder, weights)
    tensors = check_tensors(folder, weights, shapes, config, integers=integers)
    layers = layers_of_tensors(tensors, config, _MOST_TASKS)
    size = len(weights)
    facts = _facts(config, layers) | {
        "parameters": f"{sum(tensor.numel() for tensor in tensors.values()):,}{_by_role(tensors)}",
        "file": f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB",
    }
    if (number := len(config.tasks or ())) > _MOST_TASKS:
        facts["looked at"] = f"{_MOST_TASKS:,} of {number:,} tasks are looked at"
    if (folder / HEADS_CONFIG).exists():
        heads = {task: ", ".join(spec.labels or ["numbers"]) for task, spec in read_heads(folder)[0].items()}
        facts |= {f"head {task}": labels for task, labels in heads.items()}
    return RoutingReport(f"Adapter {folder.resolve().name}", facts, layers, config, tuple(log_history))


def _header(folder: Path, weights: bytes) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    # Name to shape as the file claims them, and which of the modules_to_save hold no floating-point numbers.
    entries = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    entries.pop("__metadata__", None)
    try:
        shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
        kinds = {name: str(entry["dtype"]) for name, entry in entries.items()}
    except (KeyError, TypeError):
        raise ValueError(f"{folder / WEIGHTS_FILE} is damaged: save or download the adapter again.") from None
    return shapes, {name for name, kind in kinds.items() if not TENSOR_NAME.fullmatch(name) and "F" not in kind}


def _by_role(tensors: Mapping[str, Tensor]) -> str:
    roles = {"A and B": 0, "routers": 0, "other modules": 0}
    for name, tensor in tensors.items():
        match = TENSOR_NAME.fullmatch(name)
        role = "other modules" if match is None else "routers" if match["name"].startswith("router") else "A and B"
        roles[role] += tensor.numel()
    return f" ({', '.join(f'{role} {count:,}' for role, count in roles.items() if count)})"
