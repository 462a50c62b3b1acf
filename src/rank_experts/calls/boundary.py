"""Where a forward pass enters an adapted model: the call begins, and the losses and loads that it gathered leave.

`install` puts a `RoutedForward` in the place of a module's `forward`, on the instance, as accelerate does it. It
accepts `task_ids` beside the model's own arguments, so that `Trainer` keeps a column of that name and `generate`
passes the argument on. A model that has such an argument itself gets it too.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..messages import warn_once
from .batch import read_batch
from .call import Call, current_call
from .checkpointing import bind_checkpointing, unbind_checkpointing
from .entering import Guard, begin_call, close_interrupted, enter_batch
from .first_calls import end_call
from .generation import install_generation, uninstall_generation
from .images import find_towers
from .later import Later
from .outputs import add_to_outputs, scores_of_outputs
from .rows import find_sequence_first, find_windowed
from .scope import RoutingScope, Tasks

UNCOMPILED = "models with adapters on a mixture's experts (target_parameters) run uncompiled"
"""Why, for `torch.compiler.disable`, which quotes it where fullgraph=True was asked for."""

_SILENT_CALLS = 1000
_UNUSED_LOSSES = 20


class RoutedForward:
    """A module's forward with a call around it.

    Args:
        module: Whose forward it replaces.
        scope: Whose calls it makes.
        role: "model": the adapted model, which gathers losses and loads; "encoder" and "decoder": the halves of an
            encoder-decoder, which `generate` calls directly, and whose lengths and padding are their own; "entry": a
            PEFT wrapper, which only hands tasks on.
    """

    def __init__(self, module: nn.Module, scope: RoutingScope, role: str) -> None:
        self.module = module
        self.scope = scope
        self.role = role
        self.original: Callable[..., Any] = module.forward
        self.was_instance_attribute = "forward" in module.__dict__
        signature = inspect.signature(self.original)
        by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.names = tuple(name for name, each in signature.parameters.items() if each.kind in by_position)
        self.takes_task_ids = "task_ids" in signature.parameters
        self.guards: tuple[RemovableHandle, ...] = ()

    @property
    def __signature__(self) -> inspect.Signature:
        """The forward's own with `task_ids`; made when asked for, because annotations cannot always be pickled."""
        return _with_task_ids(inspect.signature(self.original))

    @property
    def __code__(self) -> CodeType:
        """What `torch.export` asks of any forward."""
        return type(self).__call__.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward with a call around it; `task_ids` are (batch,) ids, a task's name, or a name an example."""
        if torch.compiler.is_compiling() and self.scope.adapts_experts:
            return self._uncompiled(args, kwargs)
        return self._forward(args, kwargs)

    @torch.compiler.disable(reason=UNCOMPILED)
    def _uncompiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Which tokens reach an expert is known only when they run, and a call that a graph break cuts would be lost.
        warn_once(f"torch.compile: {UNCOMPILED}.")
        return self._forward(args, kwargs)

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        task_ids, kwargs = self._take_task_ids(args, kwargs)
        if self.role == "model":
            return self._model(args, kwargs, task_ids)
        outer = current_call(self.scope)
        if self.role == "decoder":
            call = self._decoder_call(outer, args, kwargs, task_ids)
        elif self.role == "encoder":
            call = self._half_call(outer, self._given(args, kwargs), task_ids)
        elif task_ids is not None:
            call = begin_call(self.scope, outer, task_ids)
            call.handed_on = task_ids
        else:
            return self.original(*args, **kwargs)
        with call:
            return self.original(*args, **kwargs)

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        # Arguments by name, those of *args by number.
        numbered = {f"argument {i}": value for i, value in enumerate(args) if i >= len(self.names)}
        return dict(zip(self.names, args)) | numbered | kwargs

    def _take_task_ids(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        # What was said of tasks, and the arguments without it unless the module has such an argument itself.
        if not self.takes_task_ids:
            return kwargs.get("task_ids"), {name: value for name, value in kwargs.items() if name != "task_ids"}
        given = dict(zip(self.names, args)) | kwargs
        if "task_ids" not in given and self.role == "model":
            # A PeftModel keeps it for itself.
            outer = current_call(self.scope)
            if outer is not None and outer.handed_on is not None:
                return outer.handed_on, {**kwargs, "task_ids": outer.handed_on}
        return given.get("task_ids"), kwargs

    def _model(self, args: tuple[Any, ...], kwargs: dict[str, Any], task_ids: Tasks | None) -> Any:
        call = self._model_call(args, kwargs, task_ids)
        with call:
            outputs = self.original(*args, **kwargs)
        return self._leave(call, outputs)

    def _model_call(self, args: tuple[Any, ...], kwargs: dict[str, Any], task_ids: Tasks | None) -> Call:
        if self.module.training:
            bind_checkpointing(self.module, self.scope)
        given = self._given(args, kwargs)
        close_interrupted(self.scope)
        call = begin_call(self.scope, current_call(self.scope), task_ids)
        enter_batch(call, read_batch(self.module, self.scope, given))
        call.records = torch.is_grad_enabled()
        call.mask = _matrix(given.get("attention_mask"))
        call.labels = given.get("labels")
        call.num_items = given.get("num_items_in_batch")
        if (labels := _matrix(call.labels)) is not None:
            call.target_mask = labels != -100
        return call

    def _leave(self, call: Call, outputs: Any) -> Any:
        if self.module.training:
            if call.records:
                end_call(self.module, self.scope)
            self._commit_loads(call)
            self._note_nan(call, outputs)
            outputs = self._add_losses(call, outputs)
            for listen in self.scope.listeners:
                listen(outputs)
        return outputs

    def guard(self) -> None:
        """Keep the call around the module where others replace its forward without calling ours, as TRL does.

        Hooks run whatever `forward` is; they act only where it is not this one any more.
        """
        before = self.module.register_forward_pre_hook(self._before, with_kwargs=True)
        after = self.module.register_forward_hook(self._after, with_kwargs=True, always_call=True)
        self.guards = (before, after)

    def _is_replaced(self) -> bool:
        return self.module.__dict__.get("forward") is not self

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                f"nn.DataParallel made a copy of {type(module).__name__}, whose forward would run the first device's "
                "modules: rank experts do not work with it. Start one process a device instead (torchrun or accelerate "
                "launch: DistributedDataParallel), or show the process one device (CUDA_VISIBLE_DEVICES=0), so that "
                "Trainer does not wrap the model."
            )
        if not self._is_replaced():
            return None
        task_ids, kwargs = self._take_task_ids(args, kwargs)
        call = self._model_call(args, kwargs, task_ids)
        call.owner = Guard(self, sys._getframe(1))
        call.__enter__()
        return args, kwargs

    def _after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> Any:
        call = current_call(self.scope)
        if call is None or not isinstance(call.owner, Guard) or call.owner.forward is not self:
            return None
        call.owner = None
        call.__exit__()
        return None if outputs is None else self._leave(call, outputs)

    def _decoder_call(
        self, outer: Call | None, args: tuple[Any, ...], kwargs: dict[str, Any], task_ids: Tasks | None
    ) -> Call:
        given = self._given(args, kwargs)
        call = self._half_call(outer, given, task_ids)
        call.memory = given.get("encoder_hidden_states")
        memory_mask = _matrix(given.get("encoder_attention_mask"))
        call.memory_mask = memory_mask if memory_mask is not None or outer is None else outer.mask
        call.mask = _matrix(given.get("attention_mask"))
        if call.mask is None:
            call.mask = call.target_mask
        return call

    def _half_call(self, outer: Call | None, given: dict[str, Any], task_ids: Tasks | None) -> Call:
        call = begin_call(self.scope, outer, task_ids)
        enter_batch(call, read_batch(self.module, self.scope, given))
        if outer is not None:
            call.loads, call.losses = outer.loads, outer.losses
        return call

    def _commit_loads(self, call: Call) -> None:
        for path, adapter, load in call.loads:
            self.scope.add_load(path, adapter, load)
        if call.loads and not torch.compiler.is_compiling():
            self.scope.silent_calls += 1
            if self.scope.silent_calls == _SILENT_CALLS:
                warn_once(
                    f"{_SILENT_CALLS} training passes without update_router_bias(model): load_balance='bias' balances "
                    "nothing until it is called once after each optimiser step. Trainer does so with "
                    "callbacks=[RankExpertCallback()] from rank_experts.training."
                )

    def _note_nan(self, call: Call, outputs: Any) -> None:
        scores = scores_of_outputs(outputs)
        if scores is None or torch.compiler.is_compiling():
            return
        # A NaN in a token's state reaches each of its scores: the first tells. Infinities may be meant.
        nan = scores.detach()[..., 0].isnan()
        for mask in (call.mask, call.target_mask):
            if mask is not None and mask.shape == nan.shape:
                nan = nan & mask.bool()
                break
        self.scope.suspects.append((call.tasks, Later(nan.flatten(1).any(1) if nan.dim() > 1 else nan)))

    def _add_losses(self, call: Call, outputs: Any) -> Any:
        if not call.losses:
            return outputs
        labels = call.labels
        shifted = not getattr(getattr(self.module, "config", None), "is_encoder_decoder", False)
        auxiliary = _mean_over_layers(call.losses) * _share_of_step(labels, call.num_items, shifted)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._watch(auxiliary, call)
        return add_to_outputs(outputs, auxiliary, has_labels=labels is not None)

    def _watch(self, auxiliary: Tensor, call: Call) -> None:
        # A trainer that bypasses outputs.loss (label smoothing, a loss of one's own) would drop it without a word.
        if not auxiliary.requires_grad:
            if not call.is_unrecorded:
                return  # What the losses depend on is frozen: a router whose A and B alone are trained.
            raise RuntimeError(
                "The auxiliary loss has no gradient although the model trains. Are blocks checkpointed by hand with "
                "use_reentrant=True? Use use_reentrant=False, or the model's gradient_checkpointing_enable()."
            )
        scope = self.scope
        scope.unused_losses += 1
        if scope.unused_losses == _UNUSED_LOSSES:
            warn_once(
                f"The last {_UNUSED_LOSSES} auxiliary losses took part in no backward pass. They are in outputs.loss "
                "where labels are given; where the loss is computed elsewhere, add outputs.rank_expert_loss to it."
            )

        def used(grad: Tensor) -> None:
            scope.unused_losses = 0

        auxiliary.register_hook(used)


def _matrix(mask: Any) -> Tensor | None:
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _mean_over_layers(losses: list[tuple[str, Tensor]]) -> Tensor:
    # Averaged over an adapter's layers, added up over adapters.
    total: Any = 0.0
    for adapter in dict.fromkeys(adapter for adapter, _ in losses):
        own = [loss for name, loss in losses if name == adapter]
        device = own[0].device
        total = total + torch.stack([loss.to(device) for loss in own]).mean().to(losses[0][1].device)
    return total


def _share_of_step(labels: Any, num_items: Any, shifted: bool) -> Any:
    # Where Trainer divides by the labels of the whole step, several forwards add up: this one counts for its share.
    # A causal model shifts its labels, so that the first one does not count; an encoder-decoder does not.
    if num_items is None or not isinstance(labels, Tensor) or labels.dim() < 2:
        return 1.0
    return (labels[..., int(shifted) :] != -100).sum() / num_items


def _with_task_ids(signature: inspect.Signature) -> inspect.Signature:
    parameters = list(signature.parameters.values())
    if "task_ids" in signature.parameters:
        return signature
    extra = inspect.Parameter("task_ids", inspect.Parameter.KEYWORD_ONLY, default=None)
    end = len(parameters) - (bool(parameters) and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    return signature.replace(parameters=[*parameters[:end], extra, *parameters[end:]])


def install(module: nn.Module, scope: RoutingScope, role: str) -> None:
    """Put a call around a module's forward; harmless where one of the same scope is there already."""
    installed = module.__dict__.get("forward")
    if not (isinstance(installed, RoutedForward) and installed.scope is scope):
        module.forward = routed = RoutedForward(module, scope, role)
        if role == "model":
            routed.guard()


def routed_forward(module: nn.Module) -> RoutedForward | None:
    """Return the call around a module's forward, or None; found too where others have replaced that forward since."""
    if isinstance(forward := module.__dict__.get("forward"), RoutedForward):
        return forward
    owners = (getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, RoutedForward)), None)


def install_model(model: nn.Module, scope: RoutingScope) -> None:
    """Put calls around a model's forward and, in an encoder-decoder, around its two halves'."""
    install(model, scope, "model")
    install_generation(model, scope)
    scope.towers = find_towers(model)
    scope.sequence_first = find_sequence_first(model)
    scope.windowed = find_windowed(model)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        for role, getter in (("encoder", "get_encoder"), ("decoder", "get_decoder")):
            half = getattr(model, getter)() if hasattr(model, getter) else None
            if isinstance(half, nn.Module) and half is not model:
                install(half, scope, role)


def uninstall(model: nn.Module) -> None:
    """Take every call off a model again."""
    for module in model.modules():
        uninstall_generation(module)
        if (routed := routed_forward(module)) is not None:
            for guard in routed.guards:
                guard.remove()
        forward = module.__dict__.get("forward")
        if isinstance(forward, RoutedForward):
            if forward.was_instance_attribute:
                module.forward = forward.original
            else:
                del module.__dict__["forward"]
    unbind_checkpointing(model)
