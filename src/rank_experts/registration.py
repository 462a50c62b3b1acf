"""Makes PEFT know the method: the one place where this library reaches into PEFT.

Done once, when `rank_experts` is imported. Six things, each harmless to other methods:

1. PEFT finds methods through the enum `PeftType`; `config/method.py` adds the member.
2. `register_peft_method`, PEFT's own function, enters config and tuner.
3. `PeftModel`'s classes by task type take `task_ids` as a named argument and drop it for every method but Poly.
   A `PeftModel` that holds our tuner therefore gets a forward that hands `task_ids` on before that.
4. `PeftModel.from_pretrained` and `load_adapter` change the model before they read the weights. For adapters of ours
   the files are checked first, and state dicts are for a PEFT before 0.21, which does not ask the tuner about them.
5. `PeftModel.save_pretrained` writes the frozen weight of an adapted `lm_head`. For adapters of ours it does so only
   where that is asked for, or where the vocabulary was resized.
6. PEFT's optimiser for LoRA+ finds the matrices B by the name "lora_B". It is made to refuse ours, whose B would get
   the learning rate of A without a word.
"""

from __future__ import annotations

import functools
import inspect
from importlib.metadata import version
from typing import Any

from packaging.version import Version
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.optimizers import loraplus
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method, save_and_load
from torch import Tensor, nn

from ._version import __version__
from .calls.boundary import install
from .config.config import RankExpertConfig
from .config.method import PEFT_TYPE, peft_type
from .files.embeddings import saves_embeddings
from .files.peft import check_files
from .layers.linear import adapted_layers
from .messages import warn_once
from .tuner.tuner import RankExpertModel, check_state_dict


def _pass_task_ids() -> None:
    original = PeftModel.__init__

    @functools.wraps(original)
    def __init__(self: PeftModel, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if isinstance(self.base_model, RankExpertModel):
            # Plain PeftModel.forward and generate strip these before they call the base model.
            self.special_peft_forward_args.add("task_ids")
            install(self, self.base_model.scope, "entry")

    PeftModel.__init__ = __init__


def _check_files_first() -> None:
    from_pretrained = inspect.getattr_static(PeftModel, "from_pretrained").__func__
    load_adapter = PeftModel.load_adapter

    @functools.wraps(from_pretrained)
    def checked_from_pretrained(cls: type[PeftModel], *args: Any, **kwargs: Any) -> PeftModel:
        given = _arguments(from_pretrained, (cls, *args), kwargs)
        if {"model", "model_id"} <= given.keys():
            check_files(**given)
        return from_pretrained(cls, *args, **kwargs)

    @functools.wraps(load_adapter)
    def checked_load_adapter(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        given = _arguments(load_adapter, (self, *args), kwargs)
        if "model_id" in given:
            config = self.peft_config.get(given.get("adapter_name", ""))
            own = {"model": self.get_base_model(), "config": config, "weights_alone": config is not None}
            check_files(**given | own)
        return load_adapter(self, *args, **kwargs)

    PeftModel.from_pretrained = classmethod(checked_from_pretrained)
    PeftModel.load_adapter = checked_load_adapter


def _save_what_was_trained() -> None:
    save_pretrained = PeftModel.save_pretrained

    @functools.wraps(save_pretrained)
    def saved(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        given = _arguments(save_pretrained, (self, *args), kwargs)
        if isinstance(self.base_model, RankExpertModel) and given.get("save_embedding_layers", "auto") == "auto":
            # Resized or not is the base model's affair, the same for all of its adapters.
            given["save_embedding_layers"] = saves_embeddings(self, next(iter(self.peft_config)))
            return save_pretrained(self, **given)
        return save_pretrained(self, *args, **kwargs)

    PeftModel.save_pretrained = saved


def _check_state_dicts_first() -> None:
    if hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"):
        return
    # Its last step before loading. `set_peft_model_state_dict` itself may have been imported by name already.
    find_mismatched_keys = save_and_load._find_mismatched_keys

    @functools.wraps(find_mismatched_keys)
    def checked(model: Any, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        expected: dict[str, dict[str, tuple[int, ...]]] = {}
        for path, layer in adapted_layers(model):
            for name, tensor in layer.state_dict().items():
                attribute, adapter, *_ = [*name.split("."), ""]
                if attribute in layer.adapter_layer_names:
                    expected.setdefault(adapter, {})[f"{path}.{name}"] = tuple(tensor.shape)
        for adapter, shapes in expected.items():
            # It is not said which adapter is meant: the one that has a tensor among them.
            if shapes.keys() & state_dict.keys():
                check_state_dict(adapter, shapes, state_dict)
        return find_mismatched_keys(model, state_dict, *args, **kwargs)

    save_and_load._find_mismatched_keys = checked


def _refuse_lora_plus() -> None:
    # A function that the optimiser calls first, because the optimiser itself may have been imported by name already.
    get_parameter_names = loraplus.get_parameter_names

    @functools.wraps(get_parameter_names)
    def checked(model: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(model, nn.Module) and any(adapted_layers(model)):
            raise ValueError(
                "create_loraplus_optimizer knows LoRA's parameters by their names, and would give the B of rank "
                "experts the learning rate of A. Make the two groups yourself: the parameters whose names end in '.B', "
                "with lr * loraplus_lr_ratio, and the others that are trained."
            )
        return get_parameter_names(model, *args, **kwargs)

    loraplus.get_parameter_names = checked


def _arguments(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    # By name, those in **kwargs beside the others. What is missing, the function itself complains about.
    given = inspect.signature(function).bind_partial(*args, **kwargs).arguments
    given = given | given.pop("kwargs", {})
    return {name: value for name, value in given.items() if name not in ("cls", "self")}


SUPPORTED = {"peft": ("0.19", "0.22"), "transformers": ("5.10", "5.24")}
"""Package to the lowest version that the tests pass with, and the first one that they have not been run with."""


def check_versions() -> None:
    """Warn once where a package's version is outside what the tests have been run with."""
    for package, (lowest, first_untested) in SUPPORTED.items():
        found = version(package)
        if not Version(lowest) <= Version(Version(found).base_version) < Version(first_untested):
            warn_once(
                f"rank-experts {__version__} is tested with {package} {lowest} up to, not including, {first_untested}; "
                f"found {found}. It may work. If it does not, install {package}>={lowest},<{first_untested}."
            )


def register() -> None:
    """Register the method with PEFT; the second call does nothing."""
    check_versions()
    if PEFT_TYPE in PEFT_TYPE_TO_TUNER_MAPPING:
        return
    peft_type()
    register_peft_method(
        name=PEFT_TYPE.lower(),
        config_cls=RankExpertConfig,
        model_cls=RankExpertModel,
        prefix=RankExpertModel.prefix,
    )
    _pass_task_ids()
    _check_files_first()
    _save_what_was_trained()
    _check_state_dicts_first()
    _refuse_lora_plus()
