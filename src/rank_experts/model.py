"""Rank experts as a PEFT method: injection, tasks for a block of calls, and registration with PEFT.

Target matching, several adapters and modules_to_save are PEFT's own code (`BaseTuner`). What is ours is said here:
the layer that takes a target's place, checks before anything changes, and how `task_ids` reach the layers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import peft
from peft import PeftModel
from peft.tuners import tuners_utils
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import Tensor, nn
from transformers import PreTrainedModel

from ._warnings import warn_once
from .adaptable import in_out_features, stacked_experts
from .boundary import RoutedForward, install_model, uninstall
from .config import RankExpertConfig, check_experts, nearest
from .context import Call, RoutingScope, Tasks, resolve_task_ids
from .layer import AdapterSettings, RankExpertLinear
from .routing import TaskRouter, TokenRouter
from .storage import check_tensor, is_finite

# What PeftModel's classes by task type train and save in full.
_HEADS: dict[str | None, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


class Target(NamedTuple):
    """A module that a config adapts.

    Attributes:
        module: The base layer, or a `RankExpertLinear` that holds other adapters already.
        r: Ranks, after rank_pattern.
        alpha: After alpha_pattern.
        d_in: Input features.
        d_out: Output features.
    """

    module: nn.Module
    r: int
    alpha: float
    d_in: int
    d_out: int


def find_targets(model: nn.Module, config: RankExpertConfig) -> dict[str, Target]:
    """Find what a config adapts in a model, and check that it can. Changes neither.

    Args:
        model: The base model, with or without adapters already.
        config: What to look for.

    Returns:
        Module path to `Target`, in the model's order.

    Raises:
        ValueError: Nothing matches (the message names the nearest module), or a layer's ranks do not divide into
            experts, or top_k is more than it has.
        TypeError: A match is not a linear layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU())
        >>> list(find_targets(model, RankExpertConfig(target_modules=["0"], r=8)))
        ['0']
    """
    config = copy.deepcopy(config)
    if config.target_modules is None:
        config.target_modules = _default_targets(model)
    if config.target_modules == "all-linear":
        _warn_of_experts(model)
    config = tuners_utils._maybe_include_all_linear_layers(config, model)
    targets: dict[str, Target] = {}
    adapted: list[str] = []
    for path, module in model.named_modules():
        if not path or any(path.startswith(prefix) for prefix in adapted):
            continue
        if isinstance(module, BaseTunerLayer):
            adapted.append(path + ".")
        matched = tuners_utils.check_target_module_exists(config, path)
        if matched and not isinstance(matched, tuners_utils._ExcludedModule):
            targets[path] = _check_target(path, module, config)
    if not targets:
        raise ValueError(_no_match_message(model, config))
    return targets


def _warn_of_experts(model: nn.Module) -> None:
    left_out = [path for path, module in model.named_modules() if type(module).__name__.endswith("Experts")]
    if left_out := [path for path in left_out if stacked_experts(model.get_submodule(path))]:
        warn_once(
            f'target_modules="all-linear" leaves out the {len(left_out)} mixtures of experts of {type(model).__name__} '
            f"({left_out[0]}, …): their weights are 3-D parameters, which rank experts do not adapt."
        )


def _default_targets(model: nn.Module) -> set[str]:
    model_type = str(getattr(getattr(model, "config", None), "model_type", None))
    if (names := TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)) is None:
        raise ValueError(
            f"target_modules is not set and PEFT has no default for model type {model_type!r}. "
            'Name the modules to adapt, or use target_modules="all-linear".'
        )
    return set(names)


def _check_target(path: str, module: nn.Module, config: RankExpertConfig) -> Target:
    if isinstance(module, BaseTunerLayer) and not isinstance(module, RankExpertLinear):
        raise TypeError(
            f"{path} is already adapted by {type(module).__module__}.{type(module).__name__}, another PEFT method. "
            "Unload or merge that adapter first, or leave the module out of target_modules."
        )
    if isinstance(module, RankExpertLinear):
        d_in, d_out = module.in_features, module.out_features
    else:
        d_in, d_out = in_out_features(module, path)
    r = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), path), config.r)
    alpha = config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), path), config.alpha)
    if config.router == "token":
        check_experts(r, config.expert_rank, config.top_k, where=path)
    return Target(module, r, alpha, d_in, d_out)


def _no_match_message(model: nn.Module, config: RankExpertConfig) -> str:
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = sorted({path.rpartition(".")[2] for path in linear})
    wanted = config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules or [])
    asked = [wanted] if isinstance(wanted, str) else wanted
    hint = nearest(asked[0].rpartition(".")[2], names) if asked else ""
    parts = [f"No module of {type(model).__name__} matches target_modules={wanted!r}"]
    for name in ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"):
        if (value := getattr(config, name)) not in (None, [], set()):
            parts.append(f"{name}={value!r}")
    return f"{', '.join(parts)}.{hint} Its linear layers are called {names}."


class RankExpertModel(BaseTuner):
    """A model with rank-expert adapters, as `get_peft_model` makes it: PEFT's tuner of type RANK_EXPERTS.

    Args:
        model: The base model; its modules are replaced in place.
        peft_config: A `RankExpertConfig`, or a dict of adapter name to one.
        adapter_name: The new adapter's name.

    Example:
        >>> from peft import get_peft_model
        >>> model = get_peft_model(base, RankExpertConfig.smora(target_modules="all-linear"))  # doctest: +SKIP
    """

    prefix = "rank_expert_"
    tuner_layer_cls = RankExpertLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    @property
    def scope(self) -> RoutingScope:
        """The scope that the adapted layers share."""
        return next(layer.scope for _, layer in adapted_layers(self.model))

    def _check_new_adapter_config(self, config: RankExpertConfig) -> None:
        # PEFT calls this before it changes the model.
        super()._check_new_adapter_config(config)
        if config.bias != "none" and not hasattr(BaseTuner, "_get_learnable_bias_state_dict"):
            raise ValueError(
                f"bias={config.bias!r}: peft {peft.__version__} would not save the trained biases of this method. "
                'Install peft 0.21 or newer, or use bias="none".'
            )
        # The last one: PEFT has just entered it, and a config may serve two adapters (TRL's reference adapter).
        adapter_name = [name for name, known in self.peft_config.items() if known is config][-1]
        for path, layer in adapted_layers(self.model):
            if adapter_name in layer.rank_expert_A:
                raise ValueError(
                    f"{path} has an adapter {adapter_name!r} already. Choose another adapter_name, or delete the old "
                    "one first."
                )
        find_targets(self.model, config)

    def _create_and_replace(
        self,
        peft_config: RankExpertConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if parameter_name is not None:
            raise ValueError(f"{current_key}: rank experts adapt modules, not single parameters ({parameter_name}).")
        found = _check_target(current_key, target, peft_config)
        if isinstance(target, RankExpertLinear):
            layer = target
        else:
            scope = next((layer.scope for _, layer in adapted_layers(self.model)), None) or RoutingScope()
            layer = RankExpertLinear(target, path=current_key, scope=scope)
        if peft_config.router == "task":
            layer.scope.tasks[adapter_name] = tuple(peft_config.tasks or ())
        layer.add_adapter(
            adapter_name,
            r=found.r,
            settings=_settings(peft_config, found.alpha),
            router=_router(peft_config, found),
            dropout=peft_config.dropout,
            init_weights=peft_config.init_weights,
        )
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)
        if adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, requires_grad=False)

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Inject as `BaseTuner` does, then put a call around the model's forward."""
        super().inject_adapter(model, *args, **kwargs)
        install_model(model, self.scope)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, as PEFT's tuners do.

        Raises:
            ValueError: There is no such adapter, or it is merged.
        """
        if merged := [path for path, layer in adapted_layers(self.model) if adapter_name in layer.merged_adapters]:
            raise ValueError(f"Adapter {adapter_name!r} is merged into {merged[0]}: call unmerge_adapter() first.")
        super().delete_adapter(adapter_name)
        self.scope.tasks.pop(adapter_name, None)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: RankExpertConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        # PEFT 0.21 and newer call this before they load anything; their own loading skips what is missing.
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        prefixes = tuners_utils._get_tuner_state_dict_key_prefixes(model, adapter_name=adapter_name)
        expected = tuners_utils._filter_state_dict_by_key_prefixes(model.state_dict(), prefixes)
        if missing := sorted(expected.keys() - remapped.keys()):
            raise ValueError(f"The state dict for adapter {adapter_name!r} lacks {missing[0]} ({len(missing)} in all).")
        if unknown := sorted(name for name in remapped.keys() - expected.keys() if f".{cls.prefix}" in name):
            raise ValueError(f"Adapter {adapter_name!r} has no {unknown[0]} ({len(unknown)} such tensors were given).")
        for name, tensor in remapped.items():
            if name in expected:
                check_tensor(f"the state dict's {name}", tensor, tuple(expected[name].shape))
            elif not is_finite(tensor):
                raise ValueError(f"The state dict's {name} has values that are not finite.")
        return remapped

    def generate(self, *args: Any, task_ids: Tasks | None = None, **kwargs: Any) -> Any:
        """Call the base model's `generate`, for `task_ids` (see `use_task`) where given."""
        if task_ids is None:
            return self.model.generate(*args, **kwargs)
        with use_task(self.model, task_ids):
            return self.model.generate(*args, **kwargs)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PeftModel enters this around forward and generate, with their keyword arguments.
        adapter_names = kwargs.get("adapter_names")
        task_ids = kwargs.get("task_ids")
        if adapter_names is None and task_ids is None:
            yield
            return
        outer = self.scope.current()
        call = Call(self.scope) if outer is None else outer.fork()
        if task_ids is not None:
            call.tasks = task_ids
        handles = []
        if adapter_names is not None:
            self._check_adapter_names(adapter_names)
            call.adapter_names = list(adapter_names)
            handles = _pass_adapter_names(self.model, adapter_names, kwargs.get("num_beams"))
        try:
            with call:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_adapter_names(self, adapter_names: list[str]) -> None:
        if self.training:
            raise ValueError("adapter_names, one adapter an example, is for inference: call model.eval() first.")
        known = {name for _, layer in adapted_layers(self.model) for name in layer.rank_expert_A}
        if unknown := sorted(set(adapter_names) - known - {"__base__"}):
            raise ValueError(f"Unknown adapters {unknown} in adapter_names; the model has {sorted(known)}.")

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, task: str | None = None
    ) -> None:
        """Merge as PEFT does; a task router merges for `task`, or for the surrounding `use_task`.

        Raises:
            ValueError: A token router is among them, or the task is missing; nothing is merged then.
        """
        with merging(self.model, adapter_names, safe_merge, task):
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        task: str | None = None,
    ) -> nn.Module:
        """Merge, remove every trace of the adapters, and return the base model; see `merge_adapter`."""
        with merging(self.model, adapter_names, safe_merge, task):
            return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        uninstall(model)
        return model


def _settings(config: RankExpertConfig, alpha: float) -> AdapterSettings:
    return AdapterSettings(
        alpha=alpha,
        load_balance=config.load_balance if config.router == "token" else "none",
        balance_rate=config.balance_rate,
        balance_coef=config.balance_coef,
        contrastive_coef=config.contrastive_coef,
        contrastive_temperature=config.contrastive_temperature,
        pooling=config.pooling,
        share_inputs=config.share_inputs,
    )


def _router(config: RankExpertConfig, target: Target) -> TokenRouter | TaskRouter | None:
    if config.router == "token":
        return TokenRouter(
            d_in=target.d_in,
            num_experts=target.r // config.expert_rank,
            top_k=config.top_k,
            expert_rank=config.expert_rank,
            score_function=config.score_function,
            biased_gates=config.biased_gates,
        )
    if config.router == "task":
        return TaskRouter(
            d_in=target.d_in,
            r=target.r,
            num_tasks=len(config.tasks or ()),
            embedding_dim=config.task_embedding_dim,
            rank_scaling=config.rank_scaling,
        )
    return None


def _pass_adapter_names(model: nn.Module, adapter_names: list[str], num_beams: int | None) -> list[Any]:
    # modules_to_save take the names as an argument, one a row; our own layers read them from the call.
    rows = [name for name in adapter_names for _ in range(num_beams or 1)]

    def add_names(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "adapter_names": rows}

    wrappers = (module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper))
    return [module.register_forward_pre_hook(add_names, with_kwargs=True) for module in wrappers]


@contextmanager
def merging(model: nn.Module, adapter_names: list[str] | None, safe_merge: bool, task: str | None) -> Iterator[None]:
    """Name the task for a block that merges, after refusing whatever can be refused. Changes nothing itself."""
    with use_task(model, task) if task is not None else nullcontext():
        for _, layer in adapted_layers(model):
            layer.check_merge(adapter_names, safe_merge)
        _check_shared_weights(model, adapter_names)
        yield


def _check_shared_weights(model: nn.Module, adapter_names: list[str] | None) -> None:
    # Merging into a weight that is tied to another module's (an embedding's) would change that module too.
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(path.removesuffix(".base_layer"))
    for path, layer in adapted_layers(model):
        names = set(layer.active_adapters if adapter_names is None else adapter_names)
        sharing = [owner for owner in owners.get(id(layer.get_base_layer().weight), []) if owner != path]
        if sharing and names & layer.rank_expert_A.keys():
            raise ValueError(
                f"{path} shares its weight with {', '.join(sharing)}, which merging would change too. Keep the adapter "
                "unmerged, export it with export_lora, or untie the weights before injection."
            )


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, RankExpertLinear]]:
    """Yield (path, layer) for every adapted layer of a model.

    Example:
        >>> [path for path, layer in adapted_layers(nn.Linear(2, 2))]
        []
    """
    for path, module in model.named_modules():
        if isinstance(module, RankExpertLinear):
            yield path, module


def routing_scopes(model: nn.Module) -> list[RoutingScope]:
    """Return the scopes of a model's adapted layers: one, or several where parts were injected apart."""
    return list({id(layer.scope): layer.scope for _, layer in adapted_layers(model)}.values())


def inject_rank_experts(
    model: nn.Module,
    config: RankExpertConfig,
    adapter_name: str = "default",
    *,
    autocast_adapter_dtype: bool = True,
    low_cpu_mem_usage: bool = False,
) -> nn.Module:
    """Put rank-expert adapters into a model, in place, and freeze the rest.

    Args:
        model: Any model with linear layers; it keeps its class and its methods.
        config: What to inject and where. A task_type whose head is new to the model (SEQ_CLS, TOKEN_CLS,
            QUESTION_ANS) adds that head to modules_to_save, as `get_peft_model` does.
        adapter_name: A name that the model does not have yet. The new adapter becomes the active one.
        autocast_adapter_dtype: Keep the adapter in float32 where the base is float16 or bfloat16, as PEFT does.
        low_cpu_mem_usage: Create the adapter on the meta device, to be filled by loading.

    Returns:
        The same model.

    Raises:
        ValueError: Nothing matches the config's target_modules, the ranks do not divide into experts, or the name
            exists. The model is untouched then.
        TypeError: A matched module is not a linear layer, or `config` is not a `RankExpertConfig`.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
        >>> config = RankExpertConfig.smora(r=16, top_k=4, target_modules=["query", "value"])
        >>> model = inject_rank_experts(model, config)
    """
    if not isinstance(config, RankExpertConfig):
        raise TypeError(f"config is a {type(config).__name__}: expected a RankExpertConfig, for instance .smora().")
    if isinstance(model, PeftModel):
        raise TypeError("model is a PeftModel already: add an adapter with model.add_adapter(name, config).")
    for path, layer in adapted_layers(model):
        if adapter_name in layer.rank_expert_A:
            raise ValueError(
                f"{path} has an adapter {adapter_name!r} already. Choose another adapter_name, or delete the old one "
                "first."
            )
    config = copy.deepcopy(config)  # PEFT writes what "all-linear" stands for into the config that it is given.
    if heads := _HEADS.get(config.task_type):
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or ()), *heads]))
    find_targets(model, config)
    if config.base_model_name_or_path is None and isinstance(model, PreTrainedModel):
        config.base_model_name_or_path = model.name_or_path or None
    tuner = RankExpertModel(model, config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
    tuner._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
    return model


def _check_known(scope: RoutingScope, tasks: Tasks) -> None:
    # Adapters may know different tasks; what none of them knows is refused here, the rest where a layer asks.
    refusals = []
    for adapter_name in scope.tasks:
        try:
            resolve_task_ids(scope, tasks, adapter_name)
            return
        except ValueError as error:
            refusals.append(error)
    raise refusals[0]


@contextmanager
def use_task(model: nn.Module, tasks: Tasks) -> Iterator[None]:
    """Say for a block of calls which task, or which task an example, the adapters shall route for.

    For calls that cannot pass `task_ids`, `generate` above all. Holds in this thread (and its coroutines) alone.
    Rows that one example spans, beams and returned sequences, follow the example.

    Args:
        model: A model with a task-routed adapter.
        tasks: A task's name for all examples, a list of names or an integer tensor (batch,), one an example.

    Raises:
        ValueError: The model has no task router, or a task is unknown (the message lists the known ones).

    Example:
        >>> with use_task(model, "rte"):  # doctest: +SKIP
        ...     model.generate(**inputs)
    """
    forward = model.__dict__.get("forward")
    candidates = [forward.scope] if isinstance(forward, RoutedForward) else routing_scopes(model)
    scopes = [scope for scope in candidates if scope.tasks]
    if not scopes:
        raise ValueError(
            f"use_task: {type(model).__name__} has no task-routed adapter. "
            "Inject one with RankExpertConfig.more(tasks=[...]), or leave use_task out."
        )
    calls = []
    for scope in scopes:
        _check_known(scope, tasks)
        outer = scope.current()
        calls.append(Call(scope, tasks=tasks) if outer is None else outer.fork(tasks=tasks))
    for call in calls:
        call.__enter__()
    try:
        yield
    finally:
        for call in reversed(calls):
            call.__exit__()
