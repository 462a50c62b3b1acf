"""Every name of vLLM's that the plugin replaces or relies on beyond its public interface, and why no public one serves.

vLLM has public extension points for models, model loaders, platforms and for finding an adapter's folder (resolvers);
for another kind of LoRA layer, or another way to read an adapter, it has none. What the plugin needs is checked when
it is installed: where a name has gone, vLLM does not start half-served.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any, NamedTuple

from packaging.version import Version

from ..._version import __version__
from ...messages import warn_once

TESTED = ("0.32", "0.33")
"""The lowest vLLM that the tests have been run with, and the first one that they have not."""


class Hook(NamedTuple):
    """A name of vLLM's.

    Attributes:
        module: Where it is defined.
        name: Its name there, dotted.
        why: What for, and why nothing public serves.
    """

    module: str
    name: str
    why: str


REPLACED = (
    Hook("vllm.lora.utils", "_all_lora_classes", "the classes that linear layers become; nothing adds to them"),
    Hook(
        "vllm.lora.worker_manager",
        "WorkerLoRAManager._load_adapter",
        "reads a folder in a worker; a resolver chooses the folder and leaves the reading to this",
    ),
    Hook(
        "vllm.lora.model_manager",
        "LoRAModelManager.activate_adapter",
        "puts an adapter into a slot; layers are handed A and B alone, so that gates go beside it",
    ),
    Hook(
        "vllm.v1.engine.llm_engine", "LLMEngine.add_request", "where a request names an adapter first, before a batch"
    ),
    Hook("vllm.v1.engine.llm_engine", "LLMEngine.add_lora", "where an adapter is asked for by name"),
    Hook("vllm.v1.engine.async_llm", "AsyncLLM.add_request", "likewise, in a server"),
    Hook("vllm.v1.engine.async_llm", "AsyncLLM.add_lora", "likewise, in a server"),
    Hook("vllm.v1.executor.abstract", "Executor.add_lora", "where workers' errors would stay in a queue"),
)
"""What the plugin replaces."""

RELIED_ON = (
    Hook(
        "vllm.lora.layers.base_linear",
        "BaseLinearLayerWithLoRA._apply_lora_to_output",
        "overridden: the one place between the base layer's output and the update, in both kinds of forward",
    ),
    Hook("vllm.lora.layers.base_linear", "BaseLinearLayerWithLoRA.create_lora_weights", "overridden: room for gates"),
    Hook("vllm.lora.punica_wrapper.punica_base", "PunicaWrapperBase.add_shrink", "A x for rows of several adapters"),
    Hook("vllm.lora.punica_wrapper.punica_base", "PunicaWrapperBase.add_expand", "y += B u, likewise"),
    Hook(
        "vllm.lora.punica_wrapper.punica_base",
        "PunicaWrapperBase.__init__:_token_lora_indices",
        "each row's slot; the public property cuts it to the batch, which a CUDA graph must not",
    ),
)
"""What it overrides or reads."""


def install() -> None:
    """Install the plugin in this process; the second call does nothing.

    Raises:
        RuntimeError: This vLLM lacks a name that is needed.
    """
    check_version()
    check_names()
    try:
        from . import admission, fitting, layers, loader
    except ImportError as error:
        raise _lacking(str(error)) from error
    from vllm.lora import utils
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.utils import get_adapter_absolute_path
    from vllm.lora.worker_manager import WorkerLoRAManager
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor.abstract import Executor

    if any(cls in layers.GATED.values() for cls in utils._all_lora_classes):
        return
    loader.register()
    utils._all_lora_classes = tuple(layers.GATED.get(cls, cls) for cls in utils._all_lora_classes)

    load_adapter = WorkerLoRAManager._load_adapter

    @functools.wraps(load_adapter)
    def _load_adapter(self: Any, lora_request: Any) -> Any:
        return fitting.load(self, lora_request, load_adapter, get_adapter_absolute_path)

    WorkerLoRAManager._load_adapter = _load_adapter

    activate = LoRAModelManager.activate_adapter

    @functools.wraps(activate)
    def activate_adapter(self: Any, lora_id: int) -> bool:
        activated = activate(self, lora_id)
        if activated:
            fitting.set_gates(self, lora_id)
        return activated

    LoRAModelManager.activate_adapter = activate_adapter

    _admit(LLMEngine, AsyncLLM, admission)

    @functools.wraps(Executor.add_lora)
    def add_lora(self: Any, lora_request: Any) -> bool:
        return admission.add_lora_to_workers(self, lora_request)

    Executor.add_lora = add_lora


def _admit(engine_class: Any, async_class: Any, admission: Any) -> None:
    add_lora, add_request = engine_class.add_lora, engine_class.add_request
    add_lora_async, add_request_async = async_class.add_lora, async_class.add_request
    given, given_async = inspect.signature(add_request), inspect.signature(add_request_async)

    @functools.wraps(add_lora)
    def checked_add_lora(self: Any, lora_request: Any) -> bool:
        return admission.add_lora(self, lora_request, add_lora)

    @functools.wraps(add_request)
    def checked_add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = _adapter_of(given.bind_partial(self, *args, **kwargs).arguments)
        if request is not None and admission.admission(self).is_new(request):
            self.add_lora(request)
        return add_request(self, *args, **kwargs)

    @functools.wraps(add_lora_async)
    async def checked_add_lora_async(self: Any, lora_request: Any) -> bool:
        return await admission.add_lora_async(self, lora_request, add_lora_async)

    @functools.wraps(add_request_async)
    async def checked_add_request_async(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = _adapter_of(given_async.bind_partial(self, *args, **kwargs).arguments)
        if request is not None and admission.admission(self).is_new(request):
            await self.add_lora(request)
        return await add_request_async(self, *args, **kwargs)

    engine_class.add_lora, engine_class.add_request = checked_add_lora, checked_add_request
    async_class.add_lora, async_class.add_request = checked_add_lora_async, checked_add_request_async


def _adapter_of(given: dict[str, Any]) -> Any:
    # The adapter that a request names: an argument, or in the request where that has been made already.
    return given.get("lora_request") or getattr(given.get("prompt"), "lora_request", None)


def check_version() -> None:
    """Warn once where this vLLM is outside what the tests have been run with."""
    import vllm

    lowest, first_untested = TESTED
    if not Version(lowest) <= Version(Version(vllm.__version__).base_version) < Version(first_untested):
        warn_once(
            f"rank-experts {__version__} is tested with vllm {lowest} up to, not including, {first_untested}; found "
            f"{vllm.__version__}. It may work. If it does not, install vllm>={lowest},<{first_untested}, or turn the "
            "plugin off with RANK_EXPERTS_VLLM=0."
        )


def check_names() -> None:
    """Check that every name of `REPLACED` and `RELIED_ON` is there.

    Raises:
        RuntimeError: One is not.
    """
    for module, name, _ in (*REPLACED, *RELIED_ON):
        path, _, attribute = name.partition(":")
        try:
            found: Any = importlib.import_module(module)
            for part in path.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError):
            raise _lacking(f"{module}.{path}") from None
        if attribute and attribute not in found.__code__.co_names:
            raise _lacking(f"the attribute {attribute} of {module}.{path.partition('.')[0]}")


def _lacking(what: str) -> RuntimeError:
    import vllm

    lowest, first_untested = TESTED
    return RuntimeError(
        f"rank-experts {__version__} cannot serve in vllm {vllm.__version__}, which lacks what its plugin needs: "
        f"{what}. Install vllm>={lowest},<{first_untested}, or turn the plugin off with RANK_EXPERTS_VLLM=0 to use "
        "vLLM without rank-expert adapters."
    )
