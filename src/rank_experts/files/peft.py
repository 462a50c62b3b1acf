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

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import nn

from ..config.config import RankExpertConfig
from ..config.equality import check_same
from ..config.method import PEFT_TYPE
from ..storage.pair import CONFIG_FILE, PICKLE_REFUSED, WEIGHTS_FILE, parse_json, read_config_bytes, read_weights
from .loading import read_adapter, read_config

_DOWNLOAD = frozenset(inspect.signature(hf_hub_download).parameters)
_NOT_THERE = (EntryNotFoundError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError)


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
        weights_alone: PEFT loads into the adapter of `config`, which the model has already: compare the configs, and
            look at the weights' file without comparing it with the model.
        **kwargs: PEFT's, of which subfolder, revision, cache_dir, token, … say where to look.

    Raises:
        FileNotFoundError: There is no safetensors file; a pickle is not read.
        ValueError: See `load_rank_experts`.
        TypeError: The config targets modules that the library cannot adapt.
        OSError: The Hub could not be asked what lies there.
    """
    if config is not None and not isinstance(config, RankExpertConfig):
        return
    download = {name: value for name, value in kwargs.items() if name in _DOWNLOAD and value is not None}
    if (folder := _folder(str(model_id), config, download)) is None:
        return
    if config is not None and weights_alone and (folder / CONFIG_FILE).is_file():
        check_same(folder, read_config(folder), config, kwargs.get("adapter_name", "default"))
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
    file = _download(model_id, CONFIG_FILE, download)
    if config is None and (file is None or not _is_ours(file.parent)):
        return None
    weights = _download(model_id, WEIGHTS_FILE, download)
    if weights is None:
        raise FileNotFoundError(f"{model_id} holds no {WEIGHTS_FILE}. {PICKLE_REFUSED}")
    return weights.parent


def _download(model_id: str, name: str, options: dict[str, Any]) -> Path | None:
    # None: it is not there. A look-up that fails says nothing of that, and PEFT's own, a moment later, may succeed.
    try:
        return Path(hf_hub_download(model_id, name, **options))
    except Exception as error:
        if isinstance(error, LocalEntryNotFoundError):
            is_absent = constants.HF_HUB_OFFLINE or bool(options.get("local_files_only"))
        else:
            is_absent = isinstance(error, _NOT_THERE) and not isinstance(error, GatedRepoError)
        if is_absent:
            return None
        raise OSError(
            f"Whether {model_id} holds a rank-expert adapter cannot be told, since {name} could not be looked up: "
            f"{error} Nothing was loaded and the model is as it was; try again."
        ) from error


def _is_ours(folder: Path) -> bool:
    return parse_json(folder / CONFIG_FILE, read_config_bytes(folder)).get("peft_type") == PEFT_TYPE
