"""Serving rank-expert adapters in vLLM: a plugin that vLLM finds by its entry point and loads in all its processes.

Two ways to serve (docs/serving.md):

- `--enable-lora` and a `LoRARequest` on the adapter's own folder, `folder` or, for one task of a task-routed adapter,
  `folder?task=rte`. vLLM's LoRA layers get a gate between their two products; slots, paging and batching stay vLLM's.
- `--load-format rank_experts`: one adapter becomes part of the model, for every request, without the LoRA machinery.

The files, from the ground: `served.py` (a folder → what a layer computes with), `slots.py` and `kernels.py` (the token
gate of rows that belong to different adapters), `layers.py` (vLLM's layers with it), `fitting.py` (an adapter against
a model that vLLM has loaded), `loader.py` (the second way), `admission.py` (a bad adapter is refused before it reaches
a running batch), and `hooks.py` (which of vLLM's names are replaced, and why).
"""

from __future__ import annotations

import os

SWITCH = "RANK_EXPERTS_VLLM"
"""The environment variable that turns the plugin off, with the value 0."""


def register() -> None:
    """Install the plugin in this process; vLLM calls this, at times more than once.

    Raises:
        RuntimeError: This vLLM lacks a name that the plugin needs.
    """
    if os.environ.get(SWITCH, "1") == "0":
        return
    from . import hooks  # here, because it imports vLLM

    hooks.install()
