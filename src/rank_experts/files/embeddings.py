"""A model's input and output embeddings in an adapter's files: there where they were asked for or were resized.

PEFT writes the whole frozen weight of an `lm_head` that is a target: 2 GB for a vocabulary of 128,000 in float32, of
which nothing was trained. It is read where a file has it, and not written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from peft import get_peft_model_state_dict
from peft.utils.other import check_file_exists_on_hf_hub
from torch import Tensor, nn


def peft_tensors(
    model: nn.Module, adapter_name: str, save_embedding_layers: bool | str = "auto", **kwargs: Any
) -> dict[str, Tensor]:
    """Return an adapter's tensors by the names that PEFT gives them, which have no prefix outside of a `PeftModel`.

    Args:
        model: With the adapter.
        adapter_name: Which adapter.
        save_embedding_layers: Whole embeddings as well; "auto": only where the vocabulary was resized.
        **kwargs: `get_peft_model_state_dict`'s.
    """
    saved = saves_embeddings(model, adapter_name, save_embedding_layers)
    return get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=saved, **kwargs)


def saves_embeddings(model: nn.Module, adapter_name: str, save_embedding_layers: bool | str = "auto") -> bool:
    """Say whether whole embeddings are saved with an adapter; see `peft_tensors`.

    Raises:
        ValueError: Neither a truth value nor "auto".
    """
    if isinstance(save_embedding_layers, bool):
        return save_embedding_layers
    if save_embedding_layers != "auto":
        raise ValueError(f"save_embedding_layers={save_embedding_layers!r}: expected True, False or 'auto'.")
    peft_configs: Any = model.peft_config
    name = peft_configs[adapter_name].base_model_name_or_path
    config: Any = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None)
    if not size or not name:
        return False
    # As PEFT does: what cannot be looked up counts as not resized.
    if not os.path.exists(os.path.join(name, "config.json")) and not check_file_exists_on_hf_hub(name, "config.json"):
        return False
    return bool(type(config).from_pretrained(name).vocab_size != size)


def embedding_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (path, weight) of a model's input and output embeddings, of those that it says it has."""
    paths = {id(module): path for path, module in model.named_modules()}
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            embedding = getattr(model, getter)() if hasattr(model, getter) else None
        except NotImplementedError:  # Many vision models, whose input is no token.
            continue
        weight = getattr(embedding, "weight", None)
        if id(embedding) in paths and isinstance(weight, Tensor):
            yield paths[id(embedding)], weight
