"""The adapter's configuration: data with the papers' values, its validation, and presets with measured ones.

SMoRA: arXiv 2501.15103. MoRE: arXiv 2505.22694. Fields that PEFT's users know from `LoraConfig` (target_modules,
rank_pattern, modules_to_save, …) mean here what they mean there. What depends on the model (whether a module
matches, whether top_k fits a layer whose rank a pattern changes) is checked at injection, in `model.py`.
"""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftType

from .checks import as_list, check_count, check_expression, check_names, check_number
from .storage import parse_json, read_pair

FORMAT_VERSION = 1
"""The version of the files on disk. A reader refuses a higher one."""

PEFT_TYPE = "RANK_EXPERTS"
"""Our entry in PEFT's registry and in `adapter_config.json`."""

_CHOICES = {
    "router": ("token", "task", "dense"),
    "score_function": ("sigmoid", "softmax"),
    "load_balance": ("bias", "loss", "none"),
    "rank_scaling": ("task", "rank", "none"),
    "pooling": ("mean", "first", "last"),
    "bias": ("none", "all", "rank_expert_only"),
}

# What a config says of itself; no adapter computes otherwise for it, so anyone may edit it on disk.
_DESCRIPTIVE = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "share_inputs",
    "task_type",
}


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " The nearest is 'x'." for an unknown name, or an empty string where nothing is near."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f" The nearest is {found[0]!r}." if found else ""


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
        rank_scaling: What multiplies alpha / r for task t and rank j: "task" r_t / T (the paper's linear scaling),
            "rank" (j / r)² (the published code), "none" 1. Task router only.
        contrastive_coef: The weight of MoRE's contrastive loss; 0 turns it off.
        contrastive_temperature: Its temperature τ.
        pooling: What stands for an example in it: the "mean" over the non-padding tokens of a layer's input, the
            "first" or the "last" of them.
        share_inputs: Compute the products of A and W_g with an input that several layers read (q, k, v; gate, up) for
            all of them at once, where that is faster. What the layers mean does not depend on it.
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
        bias: "none", "all" or "rank_expert_only" (the adapted layers'): which biases of the base are trained.
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
    rank_scaling: str = field(default="task", metadata={"help": "'task', 'rank' or 'none'."})
    contrastive_coef: float = field(default=0.1, metadata={"help": "The weight of the contrastive loss."})
    contrastive_temperature: float = field(default=0.05, metadata={"help": "Its temperature."})
    pooling: str = field(default="mean", metadata={"help": "'mean', 'first' or 'last'."})
    share_inputs: bool = field(default=True, metadata={"help": "One product for layers that read the same input."})
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
    bias: str = field(default="none", metadata={"help": "'none', 'all' or 'rank_expert_only'."})
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Version of the files on disk."})

    def __post_init__(self) -> None:
        super().__post_init__()
        # A member of PEFT's enum, as of every PEFT config; `registration` has added it by now.
        self.peft_type = PeftType(PEFT_TYPE)
        self._check_version()
        self._check_values()
        self._check_tasks()
        self._check_targets()
        self._check_patterns()
        self._check_description()

    @classmethod
    def smora(cls, r: int = 64, top_k: int = 8, alpha: float = 4, **kwargs: Any) -> RankExpertConfig:
        """SMoRA: 64 ranks, 8 of them active a token (arXiv 2501.15103, section 4).

        The scale alpha / top_k is 0.5. On GLUE, 0.5 to 2 came out level, and 0.25 worse (docs/results.md).
        """
        return cls(router="token", r=r, top_k=top_k, alpha=alpha, **kwargs)

    @classmethod
    def more(
        cls,
        tasks: list[str],
        r: int = 8,
        alpha: float = 16,
        rank_scaling: str = "none",
        contrastive_coef: float = 0.01,
        **kwargs: Any,
    ) -> RankExpertConfig:
        """MoRE: ranks 1 to 8 to choose from, a task (arXiv 2505.22694, section 4), with the scale of a LoRA.

        The paper scales by r_t / T and weighs the contrastive loss more: `alpha=32, rank_scaling="task",
        contrastive_coef=0.1`. With that GLUE came out worse (docs/results.md).
        """
        routed: dict[str, Any] = {"rank_scaling": rank_scaling, "contrastive_coef": contrastive_coef}
        return cls(router="task", tasks=tasks, r=r, alpha=alpha, **routed, **kwargs)

    @classmethod
    def lora(cls, r: int = 8, alpha: float = 16, **kwargs: Any) -> RankExpertConfig:
        """Plain LoRA: all ranks, no router (arXiv 2106.09685)."""
        return cls(router="dense", r=r, alpha=alpha, **kwargs)

    @classmethod
    def mixture(
        cls, num_experts: int = 8, expert_rank: int = 8, top_k: int = 2, alpha: float = 4, **kwargs: Any
    ) -> RankExpertConfig:
        """Build a mixture of `num_experts` LoRAs of `expert_rank` ranks each, `top_k` of them active a token.

        The scale alpha / top_k is 2, that of a LoRA of rank 8 with alpha = 16.
        With top_k = 1 a token's one gate is 1 whatever its score, so the task loss does not train the router.
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
        return read_fields(file, config, saved_config)

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
            "alpha": float("inf"),
            "dropout": 1,
            "balance_rate": float("inf"),
            "balance_coef": float("inf"),
            "contrastive_coef": float("inf"),
            "contrastive_temperature": float("inf"),
        }
        for name, high in limits.items():
            check_number(name, getattr(self, name), high)
        if self.contrastive_temperature == 0:
            raise ValueError("contrastive_temperature=0: expected more than 0; the paper's value is 0.05.")
        for name in ("biased_gates", "init_weights", "inference_mode", "share_inputs"):
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

    def _check_patterns(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(self, name)
            if pattern is not None and not isinstance(pattern, dict):
                raise TypeError(f"{name}={pattern!r}: expected a dict of module name to value.")
            setattr(self, name, dict(pattern or {}))
            for key, value in getattr(self, name).items():
                if not isinstance(key, str) or not key:
                    raise TypeError(f"{name}={pattern!r}: expected names of modules as keys, found {key!r}.")
                check_expression(name, key)
                if name == "rank_pattern":
                    check_count(f"{name}[{key!r}]", value)
                else:
                    check_number(f"{name}[{key!r}]", value, float("inf"))

    def _check_description(self) -> None:
        for name in ("base_model_name_or_path", "revision", "peft_version"):
            if (value := getattr(self, name)) is not None and not isinstance(value, (str, os.PathLike)):
                raise TypeError(f"{name}={value!r}: expected text, found {type(value).__name__}.")
        mapping = self.auto_mapping
        if mapping is not None and not (
            isinstance(mapping, dict) and all(isinstance(text, str) for pair in mapping.items() for text in pair)
        ):
            raise TypeError(f"auto_mapping={mapping!r}: expected a dict of text to text.")


def read_fields(file: Path, config: bytes, saved_config: bytes | None = None) -> dict[str, Any]:
    """Parse an `adapter_config.json` and check what can be checked before its values are.

    Args:
        file: Where it came from, for messages.
        config: Its bytes.
        saved_config: What was saved with the weights, where that is not `config`.

    Raises:
        ValueError: Not JSON, another method's, a newer format, an unknown field, or an edited one.
    """
    values = parse_json(file, config)
    if (found := values.get("peft_type")) != PEFT_TYPE:
        raise ValueError(
            f"{file} is of peft_type {found!r}: expected {PEFT_TYPE!r}. "
            "Load other methods' adapters with peft.PeftModel.from_pretrained."
        )
    version = values.get("format_version", FORMAT_VERSION)
    if isinstance(version, bool) or not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"{file} has format_version {version!r}; this version of rank-experts reads up to {FORMAT_VERSION}. "
            "Upgrade rank-experts."
        )
    known = {field.name for field in fields(RankExpertConfig)}
    if unknown := sorted(set(values) - known):
        raise ValueError(
            f"{file} has unknown fields {unknown}.{nearest(unknown[0], known)} "
            "It may come from a newer rank-experts or peft; upgrade them."
        )
    parsed = _build(file, values)
    if saved_config is not None:
        saved = _build(file, parse_json(file, saved_config))
        for name in sorted(known - _DESCRIPTIVE):
            if (found := getattr(parsed, name)) != (expected := getattr(saved, name)):
                raise ValueError(
                    f"{file} says {name}={found!r}, the weights beside it were saved with {name}={expected!r}. Restore "
                    "the file, or the weights that belong to it; to change a value, load the adapter, change it in "
                    "model.peft_config and save it again."
                )
    return values


def _build(file: Path, values: dict[str, Any]) -> RankExpertConfig:
    try:
        return RankExpertConfig(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


def check_experts(r: int, expert_rank: int, top_k: int, where: str) -> None:
    """Check that r ranks divide into experts and that top_k of them exist.

    Args:
        r: Ranks of the layer.
        expert_rank: Ranks an expert.
        top_k: Active experts a token.
        where: Names the layer or the config in the message.

    Raises:
        ValueError: They do not.

    Example:
        >>> check_experts(r=64, expert_rank=8, top_k=2, where="q_proj")
    """
    if r % expert_rank:
        raise ValueError(
            f"{where}: r={r} is not a multiple of expert_rank={expert_rank}. "
            f"Choose r={r - r % expert_rank or expert_rank} or r={r - r % expert_rank + expert_rank}, "
            "or an expert_rank that divides r."
        )
    if not 1 <= top_k <= r // expert_rank:
        raise ValueError(
            f"{where}: top_k={top_k} is outside 1…{r // expert_rank}, the number of experts "
            f"(r={r} / expert_rank={expert_rank}). Choose a top_k in that range, or a larger r."
        )
