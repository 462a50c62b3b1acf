"""Where a forward pass enters an adapted model: the call begins, and the losses and loads that it gathered leave.

`install` puts a `RoutedForward` in the place of a module's `forward`, on the instance, as accelerate does it. It
accepts `task_ids` beside the model's own arguments, so that `Trainer` keeps a column of that name and `generate`
passes the argument on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ._warnings import warn_once
from .context import Call, RoutingScope, Tasks, bind_checkpointing, check_task_ids, unbind_checkpointing

UNCOMPILED = "models with adapters on a mixture's experts (target_parameters) run uncompiled"
"""Why, for `torch.compiler.disable`, which quotes it where fullgraph=True was asked for."""

_SILENT_CALLS = 1000
_UNUSED_LOSSES = 20


class RoutedForward:
    """A module's forward with a call around it.

    Args:
        module: Whose forward it replaces.
        scope: Whose calls it makes.
        role: "model": the adapted model, which gathers losses and loads; "decoder": the decoder of an
            encoder-decoder, whose padding is its own; "entry": a module that only hands tasks on (a PEFT wrapper, an
            encoder that `generate` calls directly).
    """

    def __init__(self, module: nn.Module, scope: RoutingScope, role: str) -> None:
        self.module = module
        self.scope = scope
        self.role = role
        self.original: Callable[..., Any] = module.forward
        self.was_instance_attribute = "forward" in module.__dict__
        signature = inspect.signature(self.original)
        self.names = tuple(signature.parameters)
        self.__signature__ = _with_task_ids(signature)
        self.guards: tuple[RemovableHandle, ...] = ()

    @property
    def __code__(self) -> CodeType:
        """What `torch.export` asks of any forward."""
        return type(self).__call__.__code__

    def __call__(self, *args: Any, task_ids: Tasks | None = None, **kwargs: Any) -> Any:
        """Forward with a call around it; `task_ids` are (batch,) ids, a task's name, or a name an example."""
        if torch.compiler.is_compiling() and self.scope.adapts_experts:
            return self._uncompiled(args, kwargs, task_ids)
        return self._forward(args, kwargs, task_ids)

    @torch.compiler.disable(reason=UNCOMPILED)
    def _uncompiled(self, args: tuple[Any, ...], kwargs: dict[str, Any], task_ids: Tasks | None) -> Any:
        # Which tokens reach an expert is known only when they run, and a call that a graph break cuts would be lost.
        warn_once(f"torch.compile: {UNCOMPILED}.")
        return self._forward(args, kwargs, task_ids)

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], task_ids: Tasks | None) -> Any:
        if self.role == "model":
            return self._model(args, kwargs, task_ids)
        outer = self.scope.current()
        if self.role == "decoder":
            with self._decoder_call(outer, args, kwargs, task_ids):
                return self.original(*args, **kwargs)
        if task_ids is None:
            return self.original(*args, **kwargs)
        with _begin(self.scope, outer, task_ids):
            return self.original(*args, **kwargs)

    def _model(self, args: tuple[Any, ...], kwargs: dict[str, Any], task_ids: Tasks | None) -> Any:
        call = self._model_call(args, kwargs, task_ids)
        with call:
            outputs = self.original(*args, **kwargs)
        return self._leave(call, outputs)

    def _model_call(self, args: tuple[Any, ...], kwargs: dict[str, Any], task_ids: Tasks | None) -> Call:
        if self.module.training:
            bind_checkpointing(self.module, self.scope)
        given = dict(zip(self.names, args)) | kwargs
        call = _begin(self.scope, self.scope.current(), task_ids)
        call.mask = _matrix(given.get("attention_mask"))
        call.labels = given.get("labels")
        call.num_items = given.get("num_items_in_batch")
        if (labels := _matrix(call.labels)) is not None:
            call.target_mask = labels != -100
        return call

    def _leave(self, call: Call, outputs: Any) -> Any:
        if self.module.training:
            self._commit_loads(call)
            self._note_nan(call, outputs)
            outputs = self._add_losses(call, outputs)
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
        if not self._is_replaced():
            return None
        kwargs = dict(kwargs)
        call = self._model_call(args, kwargs, kwargs.pop("task_ids", None))
        call.owner = self
        call.__enter__()
        return args, kwargs

    def _after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> Any:
        call = self.scope.current()
        if call is None or call.owner is not self:
            return None
        call.__exit__()
        return None if outputs is None else self._leave(call, outputs)

    def _decoder_call(
        self, outer: Call | None, args: tuple[Any, ...], kwargs: dict[str, Any], task_ids: Tasks | None
    ) -> Call:
        given = dict(zip(self.names, args)) | kwargs
        call = _begin(self.scope, outer, task_ids)
        call.memory = given.get("encoder_hidden_states")
        memory_mask = _matrix(given.get("encoder_attention_mask"))
        call.memory_mask = memory_mask if memory_mask is not None or outer is None else outer.mask
        call.mask = _matrix(given.get("attention_mask"))
        if call.mask is None:
            call.mask = call.target_mask
        if outer is not None:
            call.loads, call.losses = outer.loads, outer.losses
        return call

    def _commit_loads(self, call: Call) -> None:
        for layer, adapter, load in call.loads:
            layer.add_load(adapter, load)
        if call.loads and not torch.compiler.is_compiling():
            self.scope.silent_calls += 1
            if self.scope.silent_calls == _SILENT_CALLS:
                warn_once(
                    f"{_SILENT_CALLS} training passes without update_router_bias(model): load_balance='bias' balances "
                    "nothing until it is called once after each optimiser step. Trainer does so with "
                    "callbacks=[RankExpertCallback()] from rank_experts.trainer."
                )

    def _note_nan(self, call: Call, outputs: Any) -> None:
        scores = _scores(outputs)
        if scores is None or torch.compiler.is_compiling():
            return
        # A NaN in a token's state reaches each of its scores: the first tells. Infinities may be meant.
        nan = scores.detach()[..., 0].isnan()
        for mask in (call.mask, call.target_mask):
            if mask is not None and mask.shape == nan.shape:
                nan = nan & mask.bool()
                break
        self.scope.suspects.append((call.tasks, nan.flatten(1).any(1) if nan.dim() > 1 else nan))

    def _add_losses(self, call: Call, outputs: Any) -> Any:
        if not call.losses:
            return outputs
        labels = call.labels
        shifted = not getattr(getattr(self.module, "config", None), "is_encoder_decoder", False)
        auxiliary = _mean_over_layers(call.losses) * _share_of_step(labels, call.num_items, shifted)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._watch(auxiliary)
        if isinstance(outputs, tuple):
            return (outputs[0] + auxiliary, *outputs[1:]) if labels is not None else outputs
        if getattr(outputs, "loss", None) is not None:
            outputs.loss = outputs.loss + auxiliary
        # A plain attribute, not a field: whoever computes the loss alone adds it.
        outputs.rank_expert_loss = auxiliary
        return outputs

    def _watch(self, auxiliary: Tensor) -> None:
        # A trainer that bypasses outputs.loss (label smoothing, a loss of one's own) would drop it without a word.
        if not auxiliary.requires_grad:
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


def _begin(scope: RoutingScope, outer: Call | None, task_ids: Tasks | None) -> Call:
    call = Call(scope) if outer is None else outer.fork()
    if task_ids is not None:
        if isinstance(task_ids, Tensor):
            for adapter, tasks in scope.tasks.items():
                if len(scope.tasks) == 1:
                    check_task_ids(task_ids, len(tasks), f"adapter {adapter!r} with tasks {list(tasks)}")
        elif not isinstance(task_ids, (str, list, tuple)):
            raise TypeError(
                f"task_ids is a {type(task_ids).__name__}: expected an integer tensor (batch,), a task's name, or a "
                "list of names, one an example."
            )
        call.tasks = task_ids
    return call


def _scores(outputs: Any) -> Tensor | None:
    # (B, …, features): logits, or the last hidden state of a model without a head.
    values = outputs if isinstance(outputs, tuple) else (getattr(outputs, "logits", None), *_values(outputs))
    return next((v for v in values if isinstance(v, Tensor) and v.dim() >= 2 and v.is_floating_point()), None)


def _values(outputs: Any) -> tuple[Any, ...]:
    return tuple(outputs.values()) if isinstance(outputs, dict) else (outputs,)


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
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        for role, getter in (("entry", "get_encoder"), ("decoder", "get_decoder")):
            half = getattr(model, getter)() if hasattr(model, getter) else None
            if isinstance(half, nn.Module) and half is not model:
                install(half, scope, role)


def uninstall(model: nn.Module) -> None:
    """Take every call off a model again."""
    for module in model.modules():
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
