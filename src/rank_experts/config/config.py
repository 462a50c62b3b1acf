"""The adapter's configuration: data with the papers' values, its validation, and presets.

SMoRA: arXiv 2501.15103. MoRE: arXiv 2505.22694. Fields that PEFT's users know from `LoraConfig` (target_modules,
rank_pattern, modules_to_save, …) mean here what they mean there. What depends on the model (whether a module
matches, whether top_k fits a layer whose rank a pattern changes) is checked at injection, in `tuner/targets.py`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from peft import PeftConfig

from ..messages import nearest
from ..storage.pair import CONFIG_FILE, read_pair
from .checks import (
    MAX_FLOAT,
    as_list,
    check_count,
    check_experts,
    check_expression,
    check_names,
    check_number,
    check_number_of_names,
    check_patterns,
    check_text,
    check_token_indices,
)
from .method import peft_type
from .reading import FORMAT_VERSION, read_fields

_CHOICES = {
    "router": ("token", "task", "dense"),
    "score_function": ("sigmoid", "softmax"),
    "load_balance": ("bias", "loss", "none"),
    "rank_scaling": ("linear", "quadratic", "none"),
    "pooling": ("mean", "first", "last"),
    "bias": ("none", "all", "rank_experts_only"),
}

# What PEFT makes of a name before it matches a module with it.
_WITHIN = {"layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.", "modules_to_save": r"(^|.*\.){}($|\..*)"}

_MOST_NAMES = 100_000  # each of which is looked for in each module's


@dataclass
class RankExpertConfig(PeftConfig):
    """Configuration of a rank-expert adapter.

    Args:
        router: "token" (SMoRA: every token activates its top_k experts), "task" (MoRE: every task uses its first
            r_t ranks) or "dense" (LoRA: all ranks, no router).
        r: Ranks in all.
        alpha: The scale's numerator: the update is multiplied by alpha / top_k (token) or alpha / r (task, dense).
        dropout: Dropout probability on the input of A. The router sees the input without dropout.
        top_k: Active experts a token, at most `r // expert_rank`. Token router only.
        expert_rank: Ranks an expert. 1: every rank is an expert; larger: blocks of ranks, which are a mixture of
            LoRAs (SMoRA, section 3). Token router only.
        score_function: "sigmoid" (the paper) or "softmax". Token router only.
        biased_gates: Let the balancing bias enter the gates' values, as the published SMoRA code does. False: it
            only selects, as the paper and loss-free balancing (arXiv 2408.15664) have it.
        load_balance: "bias" (`update_router_bias` after each optimiser step), "loss" (Switch Transformer's auxiliary
            loss, arXiv 2101.03961, equation 4) or "none". Token router only.
        balance_rate: The step of the bias.
        balance_coef: The weight of the auxiliary loss.
        tasks: Task names, in the order of their ids. Task router only.
        task_embedding_dim: Width e of the task embeddings; None: the layer's d_in. Task router only.
        rank_scaling: What multiplies alpha / r for task t and rank j: "linear" r_t / T (the paper's), "quadratic"
            (j / r)² (the published code), "none" 1. Task router only.
        contrastive_coef: The weight of MoRE's contrastive loss; 0 turns it off.
        contrastive_temperature: Its temperature τ.
        pooling: What stands for an example in it: the "mean" over the non-padding tokens of a layer's input, the
            "first" or the "last" of them.
        init_weights: True: A Kaiming-uniform, B zero, so that a new adapter changes nothing. False: both random,
            for tests.
        target_modules: Names (suffixes) of the modules to adapt, a regular expression, or "all-linear". None: PEFT's
            default for LoRA on this architecture.
        target_parameters: Names (suffixes) of the parameters that hold a mixture's experts, for instance
            ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]: every expert of the base gets an adapter, and a
            token or task router, of its own. In addition to target_modules.
        exclude_modules: Names or a regular expression of modules to leave out.
        layers_to_transform: Indices of the layers to adapt.
        layers_pattern: The name of the model's list of layers, for `layers_to_transform`.
        rank_pattern: Ranks for some modules: a name or regular expression to r.
        alpha_pattern: Likewise for alpha.
        modules_to_save: Modules to train and save in full, a new classification head for instance.
        trainable_token_indices: Tokens whose embeddings are trained, and they alone: of the input embeddings, or a name
            of a layer to the tokens of each. PEFT's own wrapper does it.
        ensure_weight_tying: What is trained of an embedding (modules_to_save, trainable_token_indices) is trained of
            the layers that share its weight, too, and stays the same.
        bias: "none", "all" or "rank_experts_only" (the adapted layers'): which biases of the base are trained.
        format_version: Version of the files on disk.

    Raises:
        ValueError: A value is outside its range or its choices; the message names the field.
        TypeError: A value is of the wrong type.

    Example:
        >>> config = RankExpertConfig.smora(r=64, top_k=8, target_modules="all-linear")
        >>> config.num_experts
        64
    """

    router: str = field(default="token", metadata={"help": "'token' (SMoRA), 'task' (MoRE) or 'dense' (LoRA)."})
    r: int = field(default=64, metadata={"help": "Ranks in all."})
    alpha: float = field(default=16, metadata={"help": "The scale's numerator."})
    dropout: float = field(default=0.0, metadata={"help": "Dropout on the input of A."})
    top_k: int = field(default=8, metadata={"help": "Active experts a token."})
    expert_rank: int = field(default=1, metadata={"help": "Ranks an expert."})
    score_function: str = field(default="sigmoid", metadata={"help": "'sigmoid' or 'softmax'."})
    biased_gates: bool = field(default=False, metadata={"help": "Let the balancing bias enter the gates' values."})
    load_balance: str = field(default="bias", metadata={"help": "'bias', 'loss' or 'none'."})
    balance_rate: float = field(default=1e-3, metadata={"help": "The step of the balancing bias."})
    balance_coef: float = field(default=0.01, metadata={"help": "The weight of the balancing loss."})
    tasks: list[str] | None = field(default=None, metadata={"help": "Task names, in the order of their ids."})
    task_embedding_dim: int | None = field(default=None, metadata={"help": "Width of task embeddings; None: d_in."})
    rank_scaling: str = field(default="linear", metadata={"help": "'linear', 'quadratic' or 'none'."})
    contrastive_coef: float = field(default=0.1, metadata={"help": "The weight of the contrastive loss."})
    contrastive_temperature: float = field(default=0.05, metadata={"help": "Its temperature."})
    pooling: str = field(default="mean", metadata={"help": "'mean', 'first' or 'last'."})
    init_weights: bool = field(default=True, metadata={"help": "A Kaiming-uniform and B zero; False: both random."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names of modules to adapt, a regular expression, or 'all-linear'."}
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Names of a mixture's expert parameters to adapt."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or a regular expression of modules to leave out."}
    )
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layers to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "Module name to r."})
    alpha_pattern: dict[str, float] = field(default_factory=dict, metadata={"help": "Module name to alpha."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train and save in full."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Tokens whose embeddings are trained; or a layer's name to them."}
    )
    ensure_weight_tying: bool = field(default=False, metadata={"help": "Train tied embeddings as one."})
    bias: str = field(default="none", metadata={"help": "'none', 'all' or 'rank_experts_only'."})
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Version of the files on disk."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        self.modules_to_tie: set[str] | None = None  # PEFT's, filled in while it injects; no field of the file
        for entry in fields(self):
            check_text(entry.name, getattr(self, entry.name))
        self._check_version()
        self._check_values()
        self._check_tasks()
        self._check_targets()
        self._check_patterns()
        self._check_description()

    @classmethod
    def smora(cls, r: int = 64, top_k: int = 8, alpha: float = 16, **kwargs: Any) -> RankExpertConfig:
        """SMoRA: 64 ranks, 8 of them active a token (arXiv 2501.15103, section 4).

        On eight conflicting languages and on GLUE `alpha=8`, a scale alpha / top_k of 1, came out as good or better
        (docs/choose.md).
        """
        return cls(router="token", r=r, top_k=top_k, alpha=alpha, **kwargs)

    @classmethod
    def more(cls, tasks: list[str], r: int = 8, alpha: float = 32, **kwargs: Any) -> RankExpertConfig:
        """MoRE: ranks 1 to 8 to choose from, a task, scaled by r_t / T (arXiv 2505.22694, section 4).

        `alpha=16, rank_scaling="none", contrastive_coef=0.01`, a LoRA's scale and a tenth of the contrastive loss,
        came out better on GLUE and level on eight conflicting languages (docs/choose.md).
        """
        return cls(router="task", tasks=tasks, r=r, alpha=alpha, **kwargs)

    @classmethod
    def lora(cls, r: int = 8, alpha: float = 16, **kwargs: Any) -> RankExpertConfig:
        """Plain LoRA: all ranks, no router (arXiv 2106.09685)."""
        return cls(router="dense", r=r, alpha=alpha, **kwargs)

    @classmethod
    def mixture(
        cls, num_experts: int = 8, expert_rank: int = 8, top_k: int = 2, alpha: float = 16, **kwargs: Any
    ) -> RankExpertConfig:
        """Build a mixture of `num_experts` LoRAs of `expert_rank` ranks each, `top_k` of them active a token.

        A scale alpha / top_k of 1 to 2, that of a LoRA of rank 8, came out better than larger ones, `alpha=4` for
        top_k = 2 (docs/choose.md). With top_k = 1 a token's one gate is 1 whatever its score, so the task loss does
        not train the router.
        """
        r = num_experts * expert_rank
        return cls(router="token", r=r, expert_rank=expert_rank, top_k=top_k, alpha=alpha, **kwargs)

    @property
    def num_experts(self) -> int:
        """Experts of a layer whose rank no pattern changes."""
        return self.r // self.expert_rank

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
        """Read the fields from an `adapter_config.json`; PEFT calls this too.

        The weights beside the file, where there are any, tell whether it is the config that they were saved with:
        where a save was cut off between the two files, the config that was being saved is returned.

        Args:
            path_json_file: The file.
            **kwargs: Ignored, as PEFT does.

        Returns:
            Field to value, for `RankExpertConfig(**fields)`.

        Raises:
            FileNotFoundError: There is none.
            ValueError: Not JSON, another method's, a newer format, an unknown field, or a value that is not the one
                that was saved within the weights.
        """
        file = Path(path_json_file)
        config, saved_config, _ = read_pair(file.parent, header_only=True)
        return read_fields(cls, file, config, saved_config)

    @classmethod
    def from_bytes(cls, file: Path, config: bytes, saved_config: bytes | None = None) -> RankExpertConfig:
        """Build the config from the bytes of an `adapter_config.json`; see `read_fields`."""
        return cls(**read_fields(cls, file, config, saved_config))

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json` as PEFT does, with patterns in their order: the first that matches counts."""
        super().save_pretrained(save_directory, **kwargs)
        file = Path(save_directory, CONFIG_FILE)
        values = json.loads(file.read_bytes())
        values |= {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}
        file.write_text(json.dumps(values, indent=2), encoding="utf-8")

    def _check_version(self) -> None:
        version = self.format_version
        if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            raise ValueError(
                f"format_version={version!r}: this version of rank-experts reads 1 to {FORMAT_VERSION}. "
                "For a newer one, upgrade rank-experts."
            )

    def _check_values(self) -> None:
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                hint = nearest(str(value), choices)
                raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}.{hint}")
        for name in ("r", "top_k", "expert_rank", "task_embedding_dim"):
            if name != "task_embedding_dim" or self.task_embedding_dim is not None:
                check_count(name, getattr(self, name))
        limits = {
            "alpha": MAX_FLOAT,
            "dropout": 1,
            "balance_rate": MAX_FLOAT,
            "balance_coef": MAX_FLOAT,
            "contrastive_coef": MAX_FLOAT,
            "contrastive_temperature": MAX_FLOAT,
        }
        for name, high in limits.items():
            check_number(name, getattr(self, name), high)
        if self.contrastive_temperature == 0:
            raise ValueError("contrastive_temperature=0: expected more than 0; the paper's value is 0.05.")
        for name in ("biased_gates", "init_weights", "inference_mode", "ensure_weight_tying"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name}={value!r}: expected True or False, found {type(value).__name__}.")
        if self.router == "token":
            check_experts(self.r, self.expert_rank, self.top_k, where="RankExpertConfig")

    def _check_tasks(self) -> None:
        if self.router != "task":
            if self.tasks is not None:
                raise ValueError(
                    f"tasks={self.tasks!r} with router={self.router!r}: only the task router knows tasks. "
                    "Leave tasks out, or use RankExpertConfig.more(tasks=[...])."
                )
            return
        if isinstance(self.tasks, str) or not isinstance(self.tasks, (list, tuple)) or not self.tasks:
            raise ValueError(
                f"tasks={self.tasks!r}: the task router needs a list of at least one task name, in the order of "
                'their ids, for instance tasks=["cola", "mnli", "rte"].'
            )
        self.tasks = list(self.tasks)
        for name in self.tasks:
            if not isinstance(name, str) or not name:
                raise TypeError(f"tasks={self.tasks!r}: expected non-empty strings, found {name!r}.")
        if twice := sorted(name for name, times in Counter(self.tasks).items() if times > 1):
            raise ValueError(f"tasks={self.tasks!r}: {', '.join(map(repr, twice))} stands there more than once.")

    def _check_targets(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            check_names(name, getattr(self, name), a_name_alone=True)
        for name in ("target_parameters", "modules_to_save"):
            check_names(name, getattr(self, name), a_name_alone=False)
        for name in ("target_modules", "exclude_modules"):
            # As LoraConfig: sets make membership tests cheap, and PEFT writes them as lists.
            if isinstance(value := getattr(self, name), (list, tuple)):
                setattr(self, name, set(value))
            elif isinstance(value, str):
                check_expression(name, value)
        for name in ("target_modules", "exclude_modules", "target_parameters", "layers_to_transform", *_WITHIN):
            value = getattr(self, name)
            if value is not None and not isinstance(value, (int, str)):
                check_number_of_names(name, value, _MOST_NAMES)
        for name, within in _WITHIN.items():
            value = getattr(self, name) or ()
            for part in [value] if isinstance(value, str) else value:
                check_expression(name, part, within)
        if (layers := self.layers_to_transform) is not None:
            for layer in [layers] if isinstance(layers, int) else as_list("layers_to_transform", layers):
                if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
                    raise TypeError(f"layers_to_transform={layers!r}: expected numbers of layers, found {layer!r}.")
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} cannot be used with target_modules={self.target_modules!r}, a regular expression: "
                        "write the layers into the expression, or give target_modules as a list."
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern={self.layers_pattern!r} needs layers_to_transform=[...] beside it.")

        check_token_indices(self.trainable_token_indices)

    def _check_patterns(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(self, name)
            if pattern is not None and not isinstance(pattern, dict):
                raise TypeError(f"{name}={pattern!r}: expected a dict of module name to value.")
            setattr(self, name, dict(pattern or {}))
            check_patterns(name, getattr(self, name))
            for key, value in getattr(self, name).items():
                if name == "rank_pattern":
                    check_count(f"{name}[{key!r}]", value)
                else:
                    check_number(f"{name}[{key!r}]", value, MAX_FLOAT)

    def _check_description(self) -> None:
        for name in ("base_model_name_or_path", "revision", "peft_version"):
            if (value := getattr(self, name)) is not None and not isinstance(value, (str, os.PathLike)):
                raise TypeError(f"{name}={value!r}: expected text, found {type(value).__name__}.")
        mapping = self.auto_mapping
        if mapping is not None and not (
            isinstance(mapping, dict) and all(isinstance(text, str) for pair in mapping.items() for text in pair)
        ):
            raise TypeError(f"auto_mapping={mapping!r}: expected a dict of text to text.")
