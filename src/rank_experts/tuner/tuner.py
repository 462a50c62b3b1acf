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
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from ..calls.boundary import install_model, uninstall
from ..calls.call import Call, current_call
from ..calls.first_calls import FirstCalls
from ..calls.scope import RoutingScope, Tasks
from ..calls.use_task import use_task
from ..config.config import RankExpertConfig
from ..layers.experts import RankExpertExperts
from ..layers.linear import RankExpertLinear, adapted_layers
from ..layers.offloading import is_offloaded
from ..storage.pair import check_tensor, is_finite
from .combining import check_combination, combined_config, combined_factors, fill, linear_layers
from .names import check_adapter_name, check_apart
from .settings import adapter_settings
from .targets import Target, check_target, expert_targets, find_targets, targets_parameter, with_linear_layers

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

    prefix = "rank_experts"
    tuner_layer_cls = RankExpertLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        known = set(getattr(model, "peft_config", None) or ())
        try:
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        except Exception:
            # PEFT has entered the adapter into the model's own dictionary, and transformers has noted that it has one.
            if adapter_name not in known:
                (getattr(model, "peft_config", None) or {}).pop(adapter_name, None)
            if not known:
                model.__dict__.pop("_hf_peft_config_loaded", None)
            raise

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
            if adapter_name in layer.rank_experts:
                raise ValueError(
                    f"{path} has an adapter {adapter_name!r} already. Choose another adapter_name, or delete the old "
                    "one first."
                )
        check_adapter_name(self.model, adapter_name)
        targets = find_targets(self.model, config)
        check_apart(_places(self.model) | {adapter_name: [*targets, *_modules_to_save(self.model, config)]})

    def _prepare_adapter_config(self, peft_config: RankExpertConfig, model_config: dict[str, Any]) -> RankExpertConfig:
        # Before PEFT says itself what "all-linear" stands for.
        super()._prepare_adapter_config(peft_config, model_config)
        return with_linear_layers(self.model, peft_config)

    def _add_modules_to_save_to_tie(self, peft_config: RankExpertConfig, tied_weight_keys: list[str]) -> None:
        # PEFT asks this of a method that ties: one copy, the input embeddings', which the tied layers share.
        embedding = self.model.get_input_embeddings()
        path = next(path for path, module in self.model.named_modules() if module is embedding)
        tied = set(tied_weight_keys)
        kept = [
            name
            for name in peft_config.modules_to_save or ()
            if not any(key == name or key.endswith(f".{name}") for key in tied)
        ]
        peft_config.modules_to_save = list(dict.fromkeys([*kept, path]))
        peft_config.modules_to_tie = tied

    def _add_targets_to_tie(self, peft_config: RankExpertConfig, tied_weight_keys: list[str]) -> None:
        raise ValueError(
            f"ensure_weight_tying: target_modules names a layer that shares its weight with an embedding (here "
            f"{tied_weight_keys}), and rank experts do not adapt embeddings. Leave it out of target_modules, or train "
            "it as a whole with modules_to_save."
        )

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
        if isinstance(parent, nn.TransformerEncoderLayer) and layer is not target:
            layer.register_forward_pre_hook(_keep_off_the_fast_path)
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
        layer.add_adapter(adapter_name, adapter_settings(config, target.r, target.alpha), config.init_weights)
        self._start_bias(layer, config, adapter_name)
        if adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, requires_grad=False)

    def _start_bias(self, layer: RankExpertLinear, config: RankExpertConfig, adapter_name: str) -> None:
        # Two adapters with one config object are a trained one and TRL's reference for it: TRL copies the parameters
        # by their names, and the balancing bias is a buffer.
        for name, known in self.peft_config.items():
            if config.router == "token" and known is config and name != adapter_name and name in layer.rank_experts:
                bias = layer.rank_experts[adapter_name].balance_bias
                if not bias.is_meta:
                    bias.copy_(layer.rank_experts[name].balance_bias)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject as `BaseTuner` does, then put a call around the model's forward."""
        with warnings.catch_warnings():
            for text in _SAID_OF_PARAMETERS if self.peft_config[adapter_name].target_parameters else ():
                warnings.filterwarnings("ignore", text)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        install_model(model, self.scope)
        self.scope.first_calls = FirstCalls()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, as PEFT's tuners do.

        Raises:
            ValueError: There is no such adapter, or it is merged.
        """
        if any(adapter_name in layer.merged_adapters for _, layer in adapted_layers(self.model)):
            # PEFT's own words, which its versions before 0.21 do not say.
            raise ValueError(
                f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge them first."
            )
        super().delete_adapter(adapter_name)
        self.scope.forget(adapter_name)

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        *,
        task: str | None = None,
    ) -> None:
        """Make one dense adapter, frozen and not active, out of several, as PEFT's LoRA does.

        Args:
            adapters: Their names; dense ones, and ones that route by task for the one that is named.
            weights: A weight for each.
            adapter_name: The new adapter's name.
            combination_type: "cat" (exact, with the ranks of all) or "linear" (for equal ranks; an approximation).
                PEFT's default, "svd", and its other kinds are not supported.
            task: Whose gate, for adapters that route by task.

        Raises:
            ValueError: What is asked for is not supported, or the name exists or cannot be used; nothing changes then.
        """
        check_combination(self.model, self.peft_config, adapters, weights, combination_type, task)
        if adapter_name in self.peft_config:
            raise ValueError(f"The model has an adapter {adapter_name!r} already. Choose another adapter_name.")
        layers = linear_layers(dict(adapted_layers(self.model)))
        factors = combined_factors(layers, adapters, weights, combination_type, task)
        self.peft_config[adapter_name] = combined_config(self.peft_config, adapters, factors)
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            self.peft_config.pop(adapter_name, None)
            raise
        fill(layers, adapter_name, factors)

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
        outer = current_call(self.scope)
        said = {} if task_ids is None else {"tasks": task_ids, "handed_on": task_ids}
        call = Call(self.scope, **said) if outer is None else outer.fork(records=None, **said)
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
        known = {name for _, layer in adapted_layers(self.model) for name in layer.rank_experts}
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
        elif is_offloaded(child):
            # PEFT would move the adapter to where the base weight seems to lie, the meta device.
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
    prefix = f".{RankExpertModel.prefix}."
    if unknown := sorted(name for name in given.keys() - expected.keys() if prefix in name):
        raise ValueError(f"Adapter {adapter_name!r} has no {unknown[0]} ({len(unknown)} such tensors were given).")
    for name, tensor in given.items():
        if name in expected:
            check_tensor(f"the state dict's {name}", tensor, expected[name])
        elif not is_finite(tensor):
            raise ValueError(f"The state dict's {name} has values that are not finite.")


def _places(model: nn.Module) -> dict[str, list[str]]:
    # Adapter name to the modules that it adapts or has a copy of.
    places: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        if isinstance(module, RankExpertLinear):
            for adapter_name in module.rank_experts:
                places.setdefault(adapter_name, []).append(path)
        elif isinstance(module, ModulesToSaveWrapper):
            for adapter_name in module.modules_to_save:
                places.setdefault(adapter_name, []).append(path)
    return places


def _modules_to_save(model: nn.Module, config: RankExpertConfig) -> list[str]:
    names = tuple(config.modules_to_save or ())
    return [path for path, _ in model.named_modules() if path.endswith(names)] if names else []


def _keep_off_the_fast_path(layer: RankExpertLinear, args: tuple[Any, ...]) -> None:
    # In evaluation torch's encoder layer reads its linear layers' weights, unless one of its modules has a hook.
    if args and args[0].is_nested:
        raise ValueError(
            f"{layer.path}: its input is a nested tensor, which adapters do not take. Set "
            "use_nested_tensor = False on the nn.TransformerEncoder, which makes them of padded batches in evaluation."
        )


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
        if sharing and names & set(layer.rank_experts):
            raise ValueError(
                f"{path} shares its weight with {', '.join(sharing)}, which merging would change too. Keep the adapter "
                "unmerged, export it with export_lora, or untie the weights before injection."
            )
