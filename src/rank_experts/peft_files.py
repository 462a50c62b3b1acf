"""Checks an adapter's files before PEFT loads them, as `load_rank_experts` does for its own.

`PeftModel.from_pretrained` injects the adapter first and reads the weights then: it allocates whatever the config
claims, reads a pickle where there is no safetensors file, and warns where tensors are missing. `check_files` runs
before that. Adapters of other methods are none of its business.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import nn

from .config import PEFT_TYPE, RankExpertConfig
from .files import read_adapter
from .storage import CONFIG_FILE, PICKLE_REFUSED, WEIGHTS_FILE, parse_json, read_config_bytes, read_weights

_DOWNLOAD = frozenset(inspect.signature(hf_hub_download).parameters)


def check_files(
    model: nn.Module,
    model_id: str | os.PathLike[str],
    config: Any = None,
    weights_alone: bool = False,
    **kwargs: Any,
) -> None:
    """Check an adapter of ours against a model before PEFT touches it; leave other methods' alone.

    Args:
        model: The base model, with or without adapters already.
        model_id: A folder, or a repository of the Hub.
        config: What PEFT was given in place of the config that lies there, if anything.
        weights_alone: Look at the weights' file without comparing it with the model.
        **kwargs: PEFT's, of which subfolder, revision, cache_dir, token, … say where to look.

    Raises:
        FileNotFoundError: There is no safetensors file; a pickle is not read.
        ValueError: See `load_rank_experts`.
        TypeError: The config targets modules that the library cannot adapt.
    """
    if config is not None and not isinstance(config, RankExpertConfig):
        return
    download = {name: value for name, value in kwargs.items() if name in _DOWNLOAD and value is not None}
    if (folder := _folder(str(model_id), config, download)) is None:
        return
    # Where a model renames its layers while PEFT loads, names on disk are not names in the model.
    if weights_alone or kwargs.get("key_mapping") or getattr(model, "_checkpoint_conversion_mapping", None):
        read_weights(folder)
    else:
        read_adapter(model, folder, config)


def _folder(model_id: str, config: RankExpertConfig | None, download: dict[str, Any]) -> Path | None:
    # Looks where PEFT looks; None where nothing of ours lies.
    local = Path(model_id, download.get("subfolder", ""))
    if (local / CONFIG_FILE).is_file() or (config is not None and local.is_dir()):
        return local if config is not None or _is_ours(local) else None
    try:
        folder = Path(hf_hub_download(model_id, CONFIG_FILE, **download)).parent
    except Exception:  # PEFT asks again, and reports it.
        return None
    if config is None and not _is_ours(folder):
        return None
    try:
        hf_hub_download(model_id, WEIGHTS_FILE, **download)
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"{model_id} holds no {WEIGHTS_FILE}. {PICKLE_REFUSED}") from error
    return folder


def _is_ours(folder: Path) -> bool:
    return parse_json(folder / CONFIG_FILE, read_config_bytes(folder)).get("peft_type") == PEFT_TYPE
