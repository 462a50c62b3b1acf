"""What a config adapts in a model: which modules and parameters match, and whether they can be adapted at all.

Matching is PEFT's own; what is ours are the checks, all of them before anything changes.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

from peft.tuners import tuners_utils
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import nn

from ..config.checks import check_experts
from ..config.config import RankExpertConfig
from ..layers.adaptable import in_out_features, stacked_experts, why_unusable
from ..layers.experts import RankExpertExperts, check_expert_parameter, expert_parameters
from ..layers.linear import RankExpertLinear
from ..messages import nearest, warn_once


class Target(NamedTuple):
    """A linear layer that a config adapts.

    Attributes:
        r: Ranks, after rank_pattern.
        alpha: After alpha_pattern.
        d_in: Input features.
        d_out: Output features.
    """

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
        Module path to `Target`, in the model's order; then, for the parameters of a mixture's experts, one for each
        expert: the parameter's path and the expert's number.

    Raises:
        ValueError: Nothing matches (the message names the nearest module), or a layer's ranks do not divide into
            experts, or top_k is more than it has.
        TypeError: A match is not a linear layer, or one that is never called as such, or a parameter that is no
            mixture's experts.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU())
        >>> list(find_targets(model, RankExpertConfig(target_modules=["0"], r=8)))
        ['0']
    """
    config = copy.deepcopy(config)
    if config.target_modules is None:
        config.target_modules = _default_targets(model)
    if config.target_modules == "all-linear" and not config.target_parameters:
        _warn_of_experts(model)
    config = with_linear_layers(model, config)
    targets: dict[str, Target] = {}
    adapted: list[str] = []
    for path, module in model.named_modules():
        if not path or any(path.startswith(prefix) for prefix in adapted):
            continue
        if isinstance(module, BaseTunerLayer | RankExpertExperts):
            adapted.append(path + ".")
        matched = tuners_utils.check_target_module_exists(config, path)
        if matched and not isinstance(matched, tuners_utils._ExcludedModule):
            if reason := _why_unusable(model, path, module):
                raise TypeError(
                    f"{path} is a {type(module).__name__}, and {reason}: an adapter of it would do nothing. Leave it "
                    "out of target_modules, or put it into exclude_modules."
                )
            targets[path] = check_target(path, module, config)
    if config.target_parameters:
        targets |= _expert_targets(model, config)
        _warn_of_patterns(config, targets)
    if not targets:
        raise ValueError(_no_match_message(model, config))
    return targets


def with_linear_layers(model: nn.Module, config: RankExpertConfig) -> RankExpertConfig:
    """Return a config that names the layers which "all-linear" stands for in a model, without those of no use.

    Args:
        model: The base model, with or without adapters already.
        config: Changed in place and returned, as PEFT does it; as it is where it does not say "all-linear".
    """
    if config.target_modules != "all-linear":
        return config
    config = tuners_utils._maybe_include_all_linear_layers(config, model)
    names = set(config.target_modules or ())
    reasons = {path: _why_unusable(model, path, model.get_submodule(path)) for path in sorted(names)}
    if unusable := {path: reason for path, reason in reasons.items() if reason}:
        config.target_modules = names - unusable.keys()
        of_each = {reason: [path for path, own in unusable.items() if own == reason] for reason in unusable.values()}
        listed = "; ".join(f"{_few(paths)}: {reason}" for reason, paths in of_each.items())
        warn_once(f'target_modules="all-linear" leaves out layers whose adapters would do nothing. {listed}.')
    return config


def _why_unusable(model: nn.Module, path: str, module: nn.Module) -> str:
    parent, _, name = path.rpartition(".")
    if isinstance(module, RankExpertLinear):
        return ""
    return why_unusable(module, name, model.get_submodule(parent))


def _few(paths: list[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _warn_of_experts(model: nn.Module) -> None:
    left_out = [path for path, module in model.named_modules() if type(module).__name__.endswith("Experts")]
    if left_out := [path for path in left_out if stacked_experts(model.get_submodule(path))]:
        warn_once(
            f'target_modules="all-linear" leaves out the {len(left_out)} mixtures of experts of {type(model).__name__} '
            f"({left_out[0]}, …), whose weights are 3-D parameters. Name these in target_parameters to adapt them."
        )


def _warn_of_patterns(config: RankExpertConfig, targets: dict[str, Target]) -> None:
    paths = {name for path in targets for name in (path, path.rpartition(".")[0])}
    for field in ("rank_pattern", "alpha_pattern"):
        unused = [key for key in getattr(config, field) if all(get_pattern_key([key], path) != key for path in paths)]
        if unused:
            warn_once(f"{field}: {unused} name no layer and no parameter that the adapter targets.")


def _default_targets(model: nn.Module) -> set[str]:
    model_type = str(getattr(getattr(model, "config", None), "model_type", None))
    if (names := TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model_type)) is None:
        raise ValueError(
            f"target_modules is not set and PEFT has no default for model type {model_type!r}. "
            'Name the modules to adapt, or use target_modules="all-linear"; [] where target_parameters says it all.'
        )
    return set(names)


def _expert_targets(model: nn.Module, config: RankExpertConfig) -> dict[str, Target]:
    found: dict[str, Target] = {}
    wrapped = {
        id(module.base_layer): path for path, module in model.named_modules() if isinstance(module, RankExpertExperts)
    }
    for path, module in model.named_modules():
        path = wrapped.get(id(module), path)
        for name, _ in module.named_parameters(recurse=False):
            if targets_parameter(config, path, name):
                own = expert_targets(path, module, name, config)
                found |= {f"{path}.{name}.{index}": target for index, target in enumerate(own)}
    if not found:
        known = {
            f"{path.rpartition('.')[2]}.{name}"
            for path, module in model.named_modules()
            for name in expert_parameters(module)
        }
        has = f"Its mixtures of experts have {sorted(known)}." if known else "It has no mixture of experts."
        raise ValueError(
            f"No parameter of {type(model).__name__} matches target_parameters={config.target_parameters}. {has}"
        )
    return found


def targets_parameter(config: RankExpertConfig, path: str, name: str) -> bool:
    """Say whether target_parameters names a parameter, and neither exclude_modules nor the layers rule it out.

    Args:
        config: The adapter's.
        path: The place in the model of the module that holds the parameter.
        name: The parameter's name in it.
    """
    # For parameters PEFT looks at the names alone; its matching of modules knows the other fields too.
    as_modules = copy.copy(config)
    as_modules.target_modules, as_modules.target_parameters = set(config.target_parameters or ()), None
    found = [tuners_utils.check_target_module_exists(as_modules, key) for key in (path, f"{path}.{name}")]
    return bool(found[1]) and not any(isinstance(one, tuners_utils._ExcludedModule) for one in found)


def expert_targets(path: str, module: nn.Module, name: str, config: RankExpertConfig) -> list[Target]:
    """Return what a parameter that a config names is to become, for each expert in it, or refuse it.

    Args:
        path: The place in the model of the module that holds it.
        module: That module.
        name: The parameter's name in it.
        config: The adapter's.

    Raises:
        ValueError, TypeError: See `find_targets`.
    """
    d_in, d_out = check_expert_parameter(module, name, path, config.bias)
    parameter = f"{path}.{name}"
    return [
        _target((f"{parameter}.{index}", parameter), d_in, d_out, config) for index in range(len(getattr(module, name)))
    ]


def check_target(path: str, module: nn.Module, config: RankExpertConfig) -> Target:
    """Return what a module that a config names is to become, or refuse it; see `find_targets`."""
    if isinstance(module, BaseTunerLayer) and not isinstance(module, RankExpertLinear):
        raise TypeError(
            f"{path} is already adapted by {type(module).__module__}.{type(module).__name__}, another PEFT method. "
            "Unload or merge that adapter first, or leave the module out of target_modules."
        )
    if isinstance(module, RankExpertExperts):
        module = module.base_layer
    if isinstance(module, RankExpertLinear):
        return _target((path,), module.in_features, module.out_features, config)
    return _target((path,), *in_out_features(module, path), config)


def _target(paths: tuple[str, ...], d_in: int, d_out: int, config: RankExpertConfig) -> Target:
    # A pattern may name an expert by its own path or, with all the others, by its parameter's: the first one counts.
    r = _of_pattern(config.rank_pattern, paths, config.r)
    alpha = _of_pattern(config.alpha_pattern, paths, config.alpha)
    if config.router == "token":
        check_experts(r, config.expert_rank, config.top_k, where=paths[0])
    return Target(r, alpha, d_in, d_out)


def _of_pattern(pattern: dict[str, Any], paths: tuple[str, ...], default: Any) -> Any:
    keys = (get_pattern_key(list(pattern), path) for path in paths)
    return next((pattern[key] for key in keys if key in pattern), default)


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
