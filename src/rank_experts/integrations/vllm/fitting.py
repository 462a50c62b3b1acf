"""An adapter against the model that vLLM has loaded: names, shapes and what its layers can do. Imports vLLM.

All of it is checked before a slot is touched; what does not fit is refused with a message that says why.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from peft.tuners import tuners_utils
from torch import nn
from vllm import envs
from vllm.config.lora import LoRAConfig
from vllm.lora.layers import BaseLayerWithLoRA, LogitsProcessorWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import WorkerLoRAManager
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.platforms import current_platform

from ...config.config import RankExpertConfig
from ...files.reading import AdapterFiles, holds_rank_experts, read_adapter_files
from ...routing import TokenGate
from ...storage.pair import CONFIG_FILE
from .layers import Gated
from .served import ServedLayer, served_layers, split_task


class RoutedLoRA(LoRAModel):
    """An adapter as vLLM's manager keeps it, with its gates.

    Attributes:
        gates: The name of a layer, as the adapter sees it (q_proj, not qkv_proj), to its token gate.
    """

    gates: dict[str, TokenGate]


def fit(
    files: AdapterFiles, task: str | None, lora_id: int, manager: LoRAModelManager, config: LoRAConfig
) -> LoRAModel:
    """Turn an adapter into what vLLM's manager keeps.

    Args:
        files: The adapter.
        task: Which of its tasks.
        lora_id: vLLM's number of it.
        manager: Has the model and its LoRA layers.
        config: vLLM's, with the largest rank.

    Raises:
        ValueError: The adapter cannot be served, or does not fit the model.
    """
    served = renamed(served_layers(files, task), manager.model)
    check_limits(files, served, config)
    places = {
        child: (name, index)
        for name in manager.modules
        for index, child in enumerate(manager.packed_modules.get(name) or [name])
    }
    absent = tuple(f"{name}." for name, module in manager.model.named_modules() if isinstance(module, PPMissingLayer))
    served = {name: layer for name, layer in served.items() if not f"{name}.".startswith(absent or ("\0",))}
    for name, layer in served.items():
        if name not in places:
            raise ValueError(
                f"{files.folder} adapts {name}, which is none of the layers that this vLLM adapts in "
                f"{type(manager.model).__name__}. Is this the model that the adapter was trained on, and does "
                "--lora-target-modules allow it?"
            )
        parent, index = places[name]
        module = manager.modules[parent]
        if not isinstance(module, (BaseLinearLayerWithLoRA, LogitsProcessorWithLoRA)):
            raise ValueError(
                f"{files.folder} adapts {name}, a {type(module).__name__.removesuffix('WithLoRA')} in vLLM: expected a "
                "linear layer. Train with exclude_modules for it."
            )
        _check_gate(files, name, layer, module, len(manager.packed_modules.get(parent) or [parent]))
        check_shapes(files, name, layer, *_sizes(module, index))
    check_complete(files, served, places)
    dtype = config.lora_dtype
    loras = {
        name: LoRALayerWeights(name, len(layer.A), len(layer.A), layer.A.to(dtype), layer.B.to(dtype))
        for name, layer in served.items()
    }
    gates = {name: layer.gate for name, layer in served.items() if layer.gate is not None}
    lora = RoutedLoRA(lora_id, max((len(layer.A) for layer in served.values()), default=1), loras)
    lora.gates = gates
    return lora


def renamed(served: dict[str, ServedLayer], model: nn.Module) -> dict[str, ServedLayer]:
    """Rename layers from transformers' names to those of vLLM's model, where it says how; drop what it leaves out."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    return served if mapper is None else mapper.get_rename_mapper().apply_dict(served)


def check_limits(files: AdapterFiles, served: dict[str, ServedLayer], config: LoRAConfig) -> None:
    """Check an adapter against how this vLLM was started.

    Raises:
        ValueError: A rank above max_lora_rank, or a token gate where vLLM's options would skip it.
    """
    for name, layer in served.items():
        if len(layer.A) > config.max_lora_rank:
            raise ValueError(
                f"{files.folder}: {name} has rank {len(layer.A)}, more than max_lora_rank={config.max_lora_rank}. "
                f"Start vLLM with --max-lora-rank of at least {max(len(layer.A) for layer in served.values())}."
            )
    if not any(layer.gate is not None for layer in served.values()):
        return
    if config.fully_sharded_loras:
        raise ValueError(
            f"{files.folder} is routed by token, which --fully-sharded-loras does not allow: it splits the ranks that "
            "a gate chooses from. Start vLLM without it."
        )
    if envs.VLLM_LORA_ENABLE_DUAL_STREAM:
        raise ValueError(
            f"{files.folder} is routed by token, and VLLM_LORA_ENABLE_DUAL_STREAM=1 computes LoRA on a path that has "
            "no gate. Start vLLM without it."
        )
    if not current_platform.can_update_inplace():
        raise ValueError(
            f"{files.folder} is routed by token, which is served on CPUs and on GPUs with Triton, not on "
            f"{current_platform.device_name}."
        )


def _check_gate(files: AdapterFiles, name: str, layer: ServedLayer, module: BaseLayerWithLoRA, children: int) -> None:
    if layer.gate is None:
        return
    if not isinstance(module, Gated):
        raise ValueError(
            f"{files.folder}: {name} is routed by token, and a {type(module).__name__.removesuffix('WithLoRA')} cannot "
            "be: vLLM computes its update elsewhere. Train with exclude_modules for it, or export a calibrated LoRA."
        )
    if children != module.n_slices:
        raise ValueError(
            f"{files.folder}: {name} is routed by token and lies with others in a layer of {module.n_slices} slices, "
            f"for which vLLM knows {children} names. Such a layer is served without a gate only."
        )


def check_shapes(files: AdapterFiles, name: str, layer: ServedLayer, d_in: int, d_out: int) -> None:
    """Check A and B against the layer that they adapt.

    Raises:
        ValueError: They are of another size.
    """
    if (found := (layer.A.shape[1], len(layer.B))) != (d_in, d_out):
        raise ValueError(
            f"{files.folder} adapts {name} as a layer with {found[0]} inputs and {found[1]} outputs; the model's has "
            f"{d_in} and {d_out}. Is this the model that the adapter was trained on?"
        )


def check_complete(files: AdapterFiles, served: dict[str, ServedLayer], names: Any) -> None:
    """Check that the adapter has every one of the model's layers that its config names.

    Args:
        files: The adapter.
        served: Its layers, by the model's names.
        names: The layers that the model has here.

    Raises:
        ValueError: A layer is missing.
    """
    config = files.config
    if not config.target_modules or config.target_modules == "all-linear":
        return  # What these mean depends on the base model as transformers has it.
    if missing := sorted(name for name in names if name not in served and _targets(config, name)):
        raise ValueError(
            f"{files.folder} lacks {', '.join(missing[:3])}, which its config targets. Save or download the adapter "
            "again. Is this the model that it was trained on?"
        )


def _targets(config: RankExpertConfig, name: str) -> bool:
    found = tuners_utils.check_target_module_exists(copy.copy(config), name)
    return bool(found) and not isinstance(found, tuners_utils._ExcludedModule)


def _sizes(module: BaseLayerWithLoRA, index: int) -> tuple[int, int]:
    # d_in and d_out of one of the layers that lie in a module of vLLM's, before tensor parallelism splits them.
    if isinstance(module, LogitsProcessorWithLoRA):
        return module.lora_a_stacked.shape[-1], module.lora_b_stacked.shape[-2]
    linear = module.base_layer
    return linear.input_size, part_sizes(linear)[index] if module.n_slices > 1 else sum(part_sizes(linear))


def part_sizes(linear: LinearBase) -> list[int]:
    """Return the outputs of the parts (q, k, v; gate, up) of one of vLLM's linear layers, before it is split."""
    if isinstance(linear, QKVParallelLinear):
        # Where there are fewer key-value heads than processes, vLLM's own sizes count them more than once.
        keys = linear.total_num_kv_heads
        return [linear.total_num_heads * linear.head_size, keys * linear.head_size, keys * linear.v_head_size]
    return list(getattr(linear, "output_sizes", None) or [linear.output_size])


def load(manager: WorkerLoRAManager, request: LoRARequest, plain: Any, resolve: Any) -> LoRAModel:
    """Read an adapter in a worker; what is none of ours goes `plain`, vLLM's way.

    Args:
        manager: The worker's.
        request: Names a folder, `folder?task=rte`, or a repository on the Hub.
        plain: vLLM's own function.
        resolve: vLLM's function from a name to a folder.

    Raises:
        FileNotFoundError, ValueError: See `read_adapter_files`, `served_layers` and `fit`.
    """
    name, task = split_task(request.lora_path)
    folder = resolve(name)
    if task is None and not (Path(folder, CONFIG_FILE).is_file() and holds_rank_experts(folder)):
        return plain(manager, request)
    adapter = read_adapter_files(folder)
    return fit(adapter, task, request.lora_int_id, manager._adapter_manager, manager.lora_config)


def set_gates(manager: LoRAModelManager, lora_id: int) -> None:
    """Put the gates of an adapter that has just got a slot beside its A and B; any other adapter has none."""
    slot = manager.lora_index_to_id.index(lora_id)
    lora = manager.get_adapter(lora_id)
    gates = lora.gates if isinstance(lora, RoutedLoRA) else {}
    for name, module in manager.modules.items():
        if isinstance(module, Gated):
            children = manager.packed_modules.get(name) or [name]
            own = [gates.get(child) for child in children]
            module.set_gates(slot, own if len(own) == module.n_slices else [None] * module.n_slices)
