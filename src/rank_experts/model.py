"""Rank experts as a PEFT method: the tuner, and tasks for a block of calls.

Walking through the model, several adapters and modules_to_save are PEFT's own code (`BaseTuner`). What is ours is said
here: the layer that takes a target's place, and how `task_ids` reach the layers. What may be a target: `targets.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import peft
from peft.tuners import tuners_utils
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .base_experts import RankExpertExperts
from .boundary import RoutedForward, install_model, uninstall
from .config import RankExpertConfig
from .context import Call, RoutingScope, Tasks, resolve_task_ids
from .layer import AdapterSettings, RankExpertLinear
from .routing import TaskRouter, TokenRouter
from .storage import check_tensor, is_finite
from .targets import Target, check_target, expert_targets, find_targets, targets_parameter

# PEFT looks for matches among the modules alone; `find_targets` knows the parameters too, and warns itself.
_SAID_OF_PARAMETERS = (
    r"The following (rank|alpha)_pattern keys did not match any targeted module",
    r"You have passed exclude_modules=.* but no modules were excluded",
)


class RankExpertModel(BaseTuner):
    """A model with rank-expert adapters, as `get_peft_model` makes it: PEFT's tuner of type RANK_EXPERTS.

    PEFT makes it, with the base model, whose modules are replaced in place, a `RankExpertConfig` and the adapter's
    name.

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
            path = current_key.removesuffix(f".{parameter_name}")
            if targets_parameter(peft_config, path, parameter_name):
                self._adapt_experts(peft_config, adapter_name, target, target_name, parent, path, parameter_name)
            return
        found = check_target(current_key, target, peft_config)
        layer = target if isinstance(target, RankExpertLinear) else None
        if layer is None:
            layer = RankExpertLinear(target, path=current_key, scope=self._scope_or_new())
        self._add_adapter(layer, peft_config, adapter_name, found)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _adapt_experts(
        self,
        config: RankExpertConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        path: str,
        parameter_name: str,
    ) -> None:
        # PEFT names the module that holds the parameter: bare, wrapped by an earlier call, or within its wrapper.
        experts = next((module for module in (parent, target) if isinstance(module, RankExpertExperts)), None)
        base = target if experts is None else experts.base_layer
        targets = expert_targets(path, base, parameter_name, config)
        if experts is None:
            experts = RankExpertExperts(target, path, self._scope_or_new())
            self._replace_module(parent, target_name, experts, target)
        for layer, found in zip(experts.adapted(parameter_name), targets, strict=True):
            self._add_adapter(layer, config, adapter_name, found)

    def _scope_or_new(self) -> RoutingScope:
        return next((layer.scope for _, layer in adapted_layers(self.model)), None) or RoutingScope()

    def _add_adapter(
        self, layer: RankExpertLinear, config: RankExpertConfig, adapter_name: str, target: Target
    ) -> None:
        if config.router == "task":
            layer.scope.tasks[adapter_name] = tuple(config.tasks or ())
        layer.add_adapter(
            adapter_name,
            r=target.r,
            settings=_settings(config, target.alpha),
            router=_router(config, target),
            dropout=config.dropout,
            init_weights=config.init_weights,
        )
        if adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, requires_grad=False)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject as `BaseTuner` does, then put a call around the model's forward."""
        with warnings.catch_warnings():
            for text in _SAID_OF_PARAMETERS if self.peft_config[adapter_name].target_parameters else ():
                warnings.filterwarnings("ignore", text)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
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
        check_state_dict(adapter_name, {name: tuple(tensor.shape) for name, tensor in expected.items()}, remapped)
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

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, RankExpertExperts):
            # PEFT would give the module of experts a `weight`, as if it were a linear layer.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model: Any = super()._unload_and_optionally_merge(*args, **kwargs)
        uninstall(model)
        return model


def check_state_dict(adapter_name: str, expected: dict[str, tuple[int, ...]], given: dict[str, Tensor]) -> None:
    """Refuse a state dict that lacks, adds or bends a tensor of an adapter.

    Args:
        adapter_name: For messages.
        expected: Name to shape of the adapter's tensors in the model, in the names of the model's state dict.
        given: What is to be loaded, modules_to_save among it.

    Raises:
        ValueError: It does not fit.
    """
    if missing := sorted(expected.keys() - given.keys()):
        raise ValueError(f"The state dict for adapter {adapter_name!r} lacks {missing[0]} ({len(missing)} in all).")
    prefix = f".{RankExpertModel.prefix}"
    if unknown := sorted(name for name in given.keys() - expected.keys() if prefix in name):
        raise ValueError(f"Adapter {adapter_name!r} has no {unknown[0]} ({len(unknown)} such tensors were given).")
    for name, tensor in given.items():
        if name in expected:
            check_tensor(f"the state dict's {name}", tensor, expected[name])
        elif not is_finite(tensor):
            raise ValueError(f"The state dict's {name} has values that are not finite.")


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
