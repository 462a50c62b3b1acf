"""What a layer computes with when its adapter is served: A, B with every scale in it, and the token gate, if any.

A dense adapter is a LoRA, and so is one task of a task-routed adapter: its gates are constant, so that the ranks which
the task does not use are left out and the others' gates go into B. A token gate stays a gate.

Nothing here knows vLLM.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...files.reading import AdapterFiles
from ...messages import nearest
from ...routing import TokenGate, task_logits, task_routing

_TASK = "?task="


class ServedLayer(NamedTuple):
    """y += B (g ⊙ A x), with g from the gate; without one, g = 1.

    Attributes:
        A: (r, d_in) float32.
        B: (d_out, r) float32, with all scales and constant gates in it.
        gate: The token gate, or None.
    """

    A: Tensor
    B: Tensor
    gate: TokenGate | None


def split_task(path: str) -> tuple[str, str | None]:
    """Split "folder?task=rte" into the folder and the task; without a task, None.

    Example:
        >>> split_task("my-adapter?task=rte")
        ('my-adapter', 'rte')
    """
    folder, mark, task = path.partition(_TASK)
    return folder, task if mark else None


def served_layers(files: AdapterFiles, task: str | None) -> dict[str, ServedLayer]:
    """Return layer path to what it computes with.

    Args:
        files: The adapter.
        task: Which task of a task-routed adapter; it may be left out where there is only one.

    Raises:
        ValueError: The task is missing, unknown, or the adapter has none; or the adapter trains what cannot be served:
            biases, modules_to_save, embeddings, the experts of a mixture.
    """
    _check_servable(files)
    index = _task_index(files, task)
    return {path: _served(files, path, index) for path in files.layers}


def _task_index(files: AdapterFiles, task: str | None) -> int:
    tasks = files.config.tasks or []
    if not tasks:
        if task is not None:
            raise ValueError(
                f"{files.folder}{_TASK}{task}: the adapter is routed by {files.config.router!r} and knows no tasks. "
                f"Ask for {files.folder}."
            )
        return 0
    if task is None and len(tasks) == 1:
        return 0
    if task not in tasks:
        what = f"has no task {task!r}.{nearest(task, tasks)}" if task else "is routed by task."
        raise ValueError(
            f"{files.folder} {what} It knows {tasks}: ask for one of them as {files.folder}{_TASK}{tasks[0]}."
        )
    return tasks.index(task)


def _check_servable(files: AdapterFiles) -> None:
    config, folder = files.config, files.folder
    if config.target_parameters:
        raise ValueError(
            f"{folder} adapts the experts of a mixture (target_parameters={config.target_parameters}), which this "
            "plugin does not serve. Train an adapter of linear layers alone, or serve it with examples/serve.py."
        )
    if config.bias != "none":
        raise ValueError(
            f"{folder} has trained biases (bias={config.bias!r}), which vLLM's LoRA layers cannot hold. Train with "
            'bias="none", or merge the adapter into the base model.'
        )
    if config.modules_to_save:
        raise ValueError(
            f"{folder} has modules of its own (modules_to_save={config.modules_to_save}), which this plugin does not "
            "serve. Put those modules' weights into the base model, and train and save the adapter without them."
        )
    own = {f"base_model.model.{path}.base_layer.weight" for path in files.layers}
    if unexpected := sorted(files.others.keys() - own):
        raise ValueError(
            f"{folder} holds {', '.join(unexpected[:3])}, no adapter's tensors: an embedding that was resized "
            "or trained, for instance. Put these weights into the base model and save the adapter without them."
        )


def _served(files: AdapterFiles, path: str, task: int) -> ServedLayer:
    config, tensors = files.config, files.layers[path]
    A, B, alpha = tensors["A"].float(), tensors["B"].float(), files.alpha(path)
    if config.router == "token":
        gate = TokenGate(
            tensors["router_weight"].float(),
            tensors["balance_bias"],
            config.top_k,
            config.expert_rank,
            config.score_function,
            config.biased_gates,
        )
        return ServedLayer(A, B * (alpha / config.top_k), gate)
    B = B * (alpha / len(A))
    if config.router == "dense":
        return ServedLayer(A, B, None)
    logits = task_logits(tensors["task_embedding"], tensors["gate_weight"], tensors["gate_bias"], torch.tensor([task]))
    gates = task_routing(logits, len(config.tasks or ()), config.rank_scaling).gates[0]
    used = gates.nonzero().squeeze(1)
    return ServedLayer(A[used].contiguous(), (B * gates)[:, used].contiguous(), None)
