"""From an adapter's folder back to its model; needs none of what reads recipes and their data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from ..files.heads import HEADS_CONFIG
from ..files.loading import load_rank_experts, read_config

CLASSES = {"classification": AutoModel, "causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM}
"""A recipe's kind of model to its class."""


def load_adapted(adapter: Path, base: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load an adapter's base model with the adapter in it, from the adapter's folder alone.

    Args:
        adapter: The folder.
        base: The base model, where it moved since.
        trust_remote_code: Run the code that comes with the base model; the folder says which model that is.

    Raises:
        FileNotFoundError: The folder holds no adapter.
        ValueError: The folder does not name its base model, the adapter does not fit it, or the base needs code of its
            own and that is not to be run.
    """
    config = read_config(adapter)
    name = base or config.base_model_name_or_path
    if not name:
        raise ValueError(f"{adapter} does not name its base model. Pass --base NAME.")
    kinds = {"CAUSAL_LM": "causal", "SEQ_2_SEQ_LM": "seq2seq", "FEATURE_EXTRACTION": "classification"}
    task_type = getattr(config.task_type, "value", config.task_type)
    if (adapter / HEADS_CONFIG).is_file():
        kind = "classification"
    elif task_type in kinds:
        kind = kinds[task_type]
    else:
        kind = None
    # Said outright: left out, transformers asks the terminal whether to run code.
    options = {"revision": config.revision if base is None else None, "trust_remote_code": trust_remote_code}
    if kind is None:
        # The class that the checkpoint was made with.
        architecture = (transformers.AutoConfig.from_pretrained(name, **options).architectures or [""])[0]
        named = getattr(transformers, str(architecture), None)
        is_model = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
        model_class: Any = named if is_model else AutoModel
    else:
        model_class = CLASSES[kind]
    return load_rank_experts(model_class.from_pretrained(name, dtype="auto", **options), adapter)
