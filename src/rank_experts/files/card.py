"""The model card: a README.md with the Hub's front matter, for people who find an adapter without its author.

A card that we wrote carries a comment with a digest of itself. Saving writes a card where there is none, or where the
comment shows that nobody has changed ours; a card that somebody edited stays.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from torch import Tensor, nn

from .._version import __version__
from ..config.config import RankExpertConfig
from ..messages import printable, warn_once
from ..routing.statistics import LayerStatistics
from ..storage.staging import write_files
from .layout import TENSOR_NAME, layers_of_tensors

CARD_FILE = "README.md"

_MAX_BYTES = 2**20
_MOST_TASKS = 64  # that are listed
_MARKER = re.compile(r"\n<!-- Written by rank-experts, [^\n]*: ([0-9a-f]{16}) -->\n")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_METHODS = {
    "token": ("smora", "SMoRA", "2501.15103", "A router activates {active} for every token."),
    "task": ("more", "MoRE", "2505.22694", "Every task chooses, layer by layer, how many of the {r} ranks it uses."),
    "dense": ("lora", "LoRA", "2106.09685", "All ranks are used for every token; there is no router."),
}
_TASK_TYPES = {
    "CAUSAL_LM": ("AutoModelForCausalLM", "text-generation"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", None),
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token-classification"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "question-answering"),
    "FEATURE_EXTRACTION": ("AutoModel", "feature-extraction"),
}
_WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # PEFT expects a trained head in the file of such an adapter


def model_card(config: RankExpertConfig, tensors: Mapping[str, Tensor]) -> str:
    """Return a model card: YAML front matter, method, tasks, a summary of the routing, and how to load the adapter.

    Args:
        config: The adapter's.
        tensors: The adapter's, by the names that `adapter_model.safetensors` gives them.

    Example:
        >>> print(model_card(config, tensors))  # doctest: +SKIP
    """
    # Of tensors that are spread over processes, or on no device, this process cannot see the values.
    whole = all(type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta for tensor in tensors.values())
    layers = layers_of_tensors(tensors, config, _MOST_TASKS) if whole else []
    num_layers = len({match["path"] for name in tensors if (match := TENSOR_NAME.fullmatch(name))})
    tag, name, paper, sentence = _METHODS[config.router]
    experts = f"{config.top_k} of {config.num_experts} experts" + (
        " (each of them one rank)" if config.expert_rank == 1 else f" of {config.expert_rank} ranks"
    )
    base = config.base_model_name_or_path
    sentence = sentence.format(active=experts, r=config.r)
    parts = [
        f"# {name} adapter" + (f" for {_code(base)}" if base else ""),
        f"{sentence} Method: [{name}](https://arxiv.org/abs/{paper}). Made with rank-experts, a PEFT-style library.",
        _routing(config, layers, num_layers),
        _loading(config),
    ]
    body = "\n\n".join(part for part in parts if part) + "\n"
    front = f"---\n{_front_matter(config, tag).to_yaml()}\n---\n"
    note = f"\n<!-- Written by rank-experts, replaced by the next save unless edited: {_digest(front, body)} -->\n"
    return f"{front}{note}\n{body}"


def is_unedited(text: str) -> bool:
    """Say whether a card is one of ours that nobody has changed since.

    Example:
        >>> is_unedited("# My model")
        False
    """
    match = _MARKER.search(text)
    return match is not None and match[1] == _digest(text[: match.start()], text[match.end() + 1 :])


def may_replace(file: Path) -> bool:
    """Say whether a card may be written in a file's place: there is none, or ours, unedited."""
    if not os.path.lexists(file):
        return True
    if file.is_symlink() or not file.is_file() or file.stat().st_size > _MAX_BYTES:
        return False
    try:
        # Bytes, because reading as text would hide changed line ends.
        return is_unedited(file.read_bytes().decode("utf-8"))
    except UnicodeDecodeError:
        return False


def write_card(folder: Path, config: RankExpertConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write the model card of an adapter that was just saved, unless the folder has somebody's own.

    Where the card cannot be written, for whatever reason, a warning says so: the adapter is saved and whole without it.
    """
    try:
        card = model_card(config, tensors).encode()
        write_files(folder, lambda: {CARD_FILE: [card]} if may_replace(folder / CARD_FILE) else {})
    except Exception as error:
        warn_once(f"The adapter is saved in {folder}, but its {CARD_FILE} could not be written: {error}.")


def _digest(front: str, body: str) -> str:
    return hashlib.sha256(f"{front}\0{body}".encode()).hexdigest()[:16]


def _front_matter(config: RankExpertConfig, tag: str) -> ModelCardData:
    base = config.base_model_name_or_path
    on_hub = bool(base) and _HUB_ID.fullmatch(str(base)) is not None and not os.path.exists(str(base))
    fields: dict[str, Any] = {"library_name": "peft", "tags": ["rank-experts", tag, "peft", "mixture-of-experts"]}
    if on_hub:
        # A folder of somebody's machine is no repository of the Hub's, which would refuse the card.
        fields["base_model"] = str(base)
        fields["tags"].append(f"base_model:adapter:{base}")
    if pipeline := _TASK_TYPES.get(_task_type(config), (None, None))[1]:
        fields["pipeline_tag"] = pipeline
    return ModelCardData(**fields)


def _routing(config: RankExpertConfig, layers: Sequence[LayerStatistics], num_layers: int) -> str:
    rows = [
        ("adapted layers", str(num_layers)),
        ("ranks r, alpha", f"{config.r}, {config.alpha:g}"),
    ]
    if config.router == "token":
        rows.append(("experts", f"{config.num_experts} of rank {config.expert_rank}, {config.top_k} active a token"))
        rows.append(("scores", f"{config.score_function}{', biased gates' if config.biased_gates else ''}"))
        biases = [float(layer.balance_bias.abs().max()) for layer in layers if layer.balance_bias is not None]
        rows.append(("balancing", config.load_balance + (f", largest bias {max(biases):.3f}" if biases else "")))
    parts = ["## Routing", _markdown_table(("", ""), rows)]
    chosen = [layer.chosen_rank for layer in layers if layer.chosen_rank is not None]
    if config.tasks and chosen:
        ranks = torch.stack(chosen).double()
        numbers = zip(config.tasks, ranks.mean(0).tolist(), ranks.amin(0).tolist(), ranks.amax(0).tolist())
        lines = [f"- {_code(task)}: {mean:.1f} ({low:g} to {high:g})" for task, mean, low, high in numbers]
        if (more := len(config.tasks) - _MOST_TASKS) > 0:
            lines.append(f"- and {more:,} more")
        parts += ["The tasks, and the rank that each chose, in the mean over the layers:", "\n".join(lines)]
    return "\n\n".join(parts)


def _loading(config: RankExpertConfig) -> str:
    named = (config.auto_mapping or {}).get("base_model_class", "AutoModel")
    auto_class = _TASK_TYPES.get(_task_type(config), (named, None))[0]
    if not str(auto_class).isidentifier():
        auto_class = "AutoModel"
    revision = f", revision={_literal(config.revision)}" if config.revision else ""
    routed = config.router == "task"
    lines = [
        f"from transformers import {auto_class}",
        f"from rank_experts import load_rank_experts{', use_task' if routed else ''}",
        "",
        f"model = {auto_class}.from_pretrained({_literal(config.base_model_name_or_path or '…')}{revision})",
        'model = load_rank_experts(model, "this-adapter")  # the folder, or huggingface_hub.snapshot_download(name)',
    ]
    if routed and config.tasks:
        lines += ["", f"with use_task(model, {_literal(config.tasks[0])}):", "    outputs = model(**inputs)"]
    code = "\n".join(lines)
    parts = ["## Loading", f"`pip install rank-experts=={__version__}` or newer.", f"```python\n{code}\n```"]
    if routed:
        parts.append(
            "Tasks may be mixed in a batch: `model(**inputs, task_ids=ids)`, a name or an id for each example."
        )
    if _task_type(config) not in _WITH_HEAD or config.modules_to_save:
        parts.append("After `import rank_experts`, PEFT loads it too: `PeftModel.from_pretrained(model, name)`.")
    return "\n\n".join(parts)


def _task_type(config: RankExpertConfig) -> str:
    # A member of PEFT's enum, or its value.
    task_type = config.task_type
    return "" if task_type is None else str(getattr(task_type, "value", task_type))


def _markdown_table(head: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"| {first} | {second} |" for first, second in [head, ("---", "---"), *rows])


# Names are other people's text, and nothing in them may become markup, a link or code.


def _code(text: object) -> str:
    # A code span, not escapes: renderers make links of what looks like an address, escaped or not. Not in a table,
    # where a pipe would end the cell.
    flat = printable(" ".join(str(text).split()))
    fence = "`" * (1 + max(map(len, re.findall("`+", flat)), default=0))
    pad = " " if "`" in (flat[:1], flat[-1:]) else ""
    return f"{fence}{pad}{flat}{pad}{fence}"


def _literal(text: object) -> str:
    # Of Python, without a backtick, which could end the block.
    return repr(str(text)).replace("`", "\\x60")
