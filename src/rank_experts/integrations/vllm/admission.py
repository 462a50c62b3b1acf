"""A bad adapter is refused where it is asked for, and never reaches a running batch. Imports vLLM.

vLLM reads an adapter's folder when a batch first needs it, or needs it again after its place went to another adapter.
An error there ends the engine and every request in it. So an adapter of ours is read, checked and loaded when a request
first names it, before that request is queued; and where its folder has changed since, it is checked again.

In the engine's own process, what a worker says against an adapter comes back as an answer, not as an error: with
several workers, vLLM leaves the others' errors in a queue, where the next call would find them.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any, NamedTuple

from vllm.config.lora import LoRAConfig
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest

from ...files.reading import holds_rank_experts, read_adapter_files
from ...storage.pair import CONFIG_FILE, WEIGHTS_FILE
from .fitting import check_limits
from .served import served_layers, split_task


class Examined(NamedTuple):
    """What was seen of a folder when its adapter was last checked.

    Attributes:
        stamp: When its files changed, and their sizes.
        layout: What decides whether it fits a model: the config, and every tensor's shape.
    """

    stamp: tuple[tuple[int, int], ...]
    layout: tuple[Any, ...]


class Admission:
    """Which adapters of ours an engine has accepted.

    Args:
        config: vLLM's, of its LoRA layers; None where they are off, and vLLM itself refuses every adapter.
    """

    def __init__(self, config: LoRAConfig | None) -> None:
        self.config = config
        self.accepted: dict[tuple[int, str], Examined | None] = {}

    def is_new(self, request: LoRARequest) -> bool:
        """Say whether an adapter must be loaded before a request for it may be queued; check it where it has changed.

        Raises:
            VLLMValidationError: Its folder has gone, or holds an adapter now that is bad or of another layout.
        """
        key, folder = _key(request), _folder(request)
        if key not in self.accepted:
            # Whether a name on the Hub is ours turns out in the worker.
            return self.config is not None and (not folder.is_dir() or _is_ours(request))
        before = self.accepted[key]
        if before is None or before.stamp == _stamp(folder):
            return False
        now = self.examine(request)
        if now is None or now.layout != before.layout:
            raise VLLMValidationError(
                f"{folder} holds another adapter than the one that was loaded as {request.lora_name!r}, with another "
                "config or other layers. Load it under a name of its own."
            )
        self.accepted[key] = now
        return False

    def examine(self, request: LoRARequest) -> Examined | None:
        """Read and check an adapter; None where it is none of ours, or not in a folder here.

        Raises:
            VLLMValidationError: It is bad, or cannot be served by a vLLM that was started like this one.
        """
        key, folder = _key(request), _folder(request)
        if not folder.is_dir():
            if self.accepted.get(key) is not None:
                raise VLLMValidationError(
                    f"{folder} has gone. vLLM may have to read it again at any time; put the adapter of "
                    f"{request.lora_name!r} back."
                )
            return None
        if self.config is None or not _is_ours(request):
            return None
        try:
            stamp = _stamp(folder)
            files = read_adapter_files(folder)
            check_limits(files, served_layers(files, split_task(request.lora_path)[1]), self.config)
        except (ValueError, TypeError, OSError) as error:
            raise VLLMValidationError(str(error)) from error
        shapes = {path: {name: tensor.shape for name, tensor in own.items()} for path, own in files.layers.items()}
        values = files.config.to_dict()
        return Examined(stamp, (values, shapes))


def _key(request: LoRARequest) -> tuple[int, str]:
    return request.lora_int_id, request.lora_path


def _folder(request: LoRARequest) -> Path:
    return Path(split_task(request.lora_path)[0]).expanduser()


def _is_ours(request: LoRARequest) -> bool:
    if split_task(request.lora_path)[1] is not None:
        return True
    try:
        return holds_rank_experts(_folder(request))
    except FileNotFoundError:
        return False
    except ValueError as error:
        raise VLLMValidationError(str(error)) from error


def _stamp(folder: Path) -> tuple[tuple[int, int], ...]:
    files = (folder / name for name in (CONFIG_FILE, WEIGHTS_FILE))
    return tuple((found.st_mtime_ns, found.st_size) for found in (os.stat(file) for file in files if file.exists()))


def admission(engine: Any) -> Admission:
    """Return an engine's own `Admission`; `engine` is vLLM's LLMEngine or AsyncLLM."""
    if not hasattr(engine, "rank_experts_admission"):
        engine.rank_experts_admission = Admission(engine.vllm_config.lora_config)
    return engine.rank_experts_admission


def add_lora(engine: Any, request: LoRARequest, plain: Any) -> bool:
    """Load an adapter into an LLMEngine: check it, load it, remember it. `plain` is vLLM's own way."""
    own = admission(engine)
    examined = own.examine(request)
    added = plain(engine, request)
    own.accepted[_key(request)] = examined
    return added


async def add_lora_async(engine: Any, request: LoRARequest, plain: Any) -> bool:
    """Load an adapter into an AsyncLLM; reading it does not hold up the server."""
    own = admission(engine)
    examined = await asyncio.to_thread(own.examine, request)
    added = await plain(engine, request)
    own.accepted[_key(request)] = examined
    return added


def add_lora_to_workers(executor: Any, request: LoRARequest) -> bool:
    """Load an adapter into every worker, or into none.

    Raises:
        ValueError: What a worker has against it.
    """
    answers = executor.collective_rpc(_try_to_add, args=(request,))
    if refusal := next((reason for _, reason in answers if reason is not None), None):
        if any(reason is None for _, reason in answers):
            executor.remove_lora(request.lora_int_id)
        raise ValueError(refusal)
    return all(added for added, _ in answers)


def _try_to_add(worker: Any, request: LoRARequest) -> tuple[bool, str | None]:
    try:
        return worker.add_lora(request), None
    except Exception as error:  # whatever it is, the engine must hear it as an answer
        return False, str(error) or repr(error)
