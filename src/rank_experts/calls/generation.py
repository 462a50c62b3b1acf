"""Tasks in `generate`: a call around all of a generation, beside the calls around its forwards.

Without it transformers would hand `task_ids` on to whatever takes part, an assistant model for instance, and encode
images before the first forward, where their texts are not at hand.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from .batch import read_batch
from .call import current_call
from .entering import begin_call, enter_batch
from .scope import RoutingScope, Tasks

_METHODS = ("generate", "init_continuous_batching")


class RoutedGenerate:
    """A model's `generate` with a call around it, for `task_ids`, which beams and returned sequences follow.

    Args:
        module: Whose method it replaces, on the instance.
        scope: Whose calls it makes.
    """

    def __init__(self, module: Any, scope: RoutingScope) -> None:
        self.module = module
        self.scope = scope
        self.original: Callable[..., Any] = module.generate
        self.takes_task_ids = "task_ids" in inspect.signature(type(module).forward).parameters
        self.__doc__ = self.original.__doc__

    @property
    def __signature__(self) -> inspect.Signature:
        """The method's own; made when asked for, because its annotations cannot always be pickled."""
        return inspect.signature(self.original)

    def __call__(self, *args: Any, task_ids: Tasks | None = None, **kwargs: Any) -> Any:
        """Generate; `task_ids` as in a forward, one an example."""
        given = {"inputs": args[0]} | kwargs if args else dict(kwargs)
        given.setdefault(getattr(self.module, "main_input_name", "input_ids"), given.pop("inputs", None))
        call = begin_call(self.scope, current_call(self.scope), task_ids)
        call.records, call.generates = None, True
        enter_batch(call, read_batch(self.module, self.scope, given))
        if task_ids is not None and self.takes_task_ids:
            kwargs["task_ids"] = task_ids
        with call:
            return self.original(*args, **kwargs)


class UntaskedBatching:
    """Continuous batching (`generate_batch`), refused where a task was named: its thread would not know of it.

    Args:
        module: Whose method it replaces, on the instance.
        scope: Whose tasks are meant.
    """

    def __init__(self, module: Any, scope: RoutingScope) -> None:
        self.scope = scope
        self.original: Callable[..., Any] = module.init_continuous_batching

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Make a manager, as transformers does.

        Raises:
            RuntimeError: Within `use_task`.
        """
        call = current_call(self.scope)
        if call is not None and call.tasks is not None and self.scope.tasks:
            raise RuntimeError(
                "generate_batch runs the model in a thread of its own, on rows that hold several requests: use_task "
                "does not reach it. Use generate(..., task_ids=ids), or merge the adapter for one task first "
                "(merge_rank_experts(model, task=name))."
            )
        return self.original(*args, **kwargs)


def install_generation(model: Any, scope: RoutingScope) -> None:
    """Put calls around a model's ways to generate; harmless where done already, or where it has none."""
    for name, kind in zip(_METHODS, (RoutedGenerate, UntaskedBatching)):
        if callable(getattr(model, name, None)) and not isinstance(model.__dict__.get(name), kind):
            model.__dict__[name] = kind(model, scope)


def uninstall_generation(model: nn.Module) -> None:
    """Take them off again."""
    for name in _METHODS:
        if isinstance(model.__dict__.get(name), (RoutedGenerate, UntaskedBatching)):
            del model.__dict__[name]
