"""Starting a routed adapter from LoRAs that exist: several as the blocks of one, or one split into its ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..config.config import RankExpertConfig
from ..files.lora import LoraCheckpoint, read_lora
from ..layers.linear import adapted_layers
from ..tuner.injection import inject_rank_experts
from ..tuner.targets import find_targets
from .export import name_targets

_ZERO = 1e-10
"""Of the largest singular value: smaller ones are rounding, in float64, and nothing in the adapter's float32."""


def inject_loras(
    model: nn.Module,
    loras: Mapping[str, str | os.PathLike[str]],
    *,
    top_k: int | None = None,
    adapter_name: str = "default",
    **options: Any,
) -> nn.Module:
    """Make trained LoRAs the blocks of one token-routed adapter, and inject it, with a router to train.

    Every LoRA becomes an expert of `expert_rank` ranks, the largest rank among them; the ranks that a smaller one
    leaves over start at B = 0 and can be trained. Scales are in B, and alpha is 1: the adapter's output is the mean
    of the chosen LoRAs, weighed by the router, and exactly LoRA i where the router gives all its weight to block i
    (SMoRA, arXiv 2501.15103, section 3: a mixture of LoRAs is blocks of ranks that are switched together).

    Args:
        model: The base model that all of them were trained on; changed in place.
        loras: Name to folder, in the blocks' order. PEFT LoRA checkpoints of any ranks and alphas, on the same
            modules.
        top_k: Blocks active a token; None: 2, or 1 of one. With 1, the chosen block's gate is always 1, so that the
            task's loss teaches the router nothing; only balancing moves it.
        adapter_name: A name that the model does not have yet.
        **options: Further fields of `RankExpertConfig`, `dropout` or `load_balance` for instance.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: A folder or a file is missing.
        ValueError: LoRAs of different bases or on different modules, variants without an equivalent (DoRA, biases,
            modules to save, …), or LoRAs that do not fit the model. The model is untouched then.

    Example:
        >>> model = inject_loras(model, {"math": "loras/math", "code": "loras/code"})  # doctest: +SKIP
    """
    if not loras:
        raise ValueError("loras is empty: expected a name and a folder for each LoRA.")
    checkpoints = {name: read_lora(path) for name, path in loras.items()}
    _check_alike(checkpoints)
    first = next(iter(checkpoints.values()))
    expert_rank = max(A.shape[0] for one in checkpoints.values() for A, _, _ in one.layers.values())
    config = RankExpertConfig.mixture(
        num_experts=len(checkpoints),
        expert_rank=expert_rank,
        top_k=min(2, len(checkpoints)) if top_k is None else top_k,
        alpha=1,
        **_shared_options(model, first, options),
    )
    _check_fit(model, config, checkpoints)
    inject_rank_experts(model, config, adapter_name)
    blocks = {
        path: [
            (slice(i * expert_rank, i * expert_rank + len(A)), A, B * scale)
            for i, (A, B, scale) in enumerate(one.layers[path] for one in checkpoints.values())
        ]
        for path in first.layers
    }
    _fill(model, adapter_name, blocks)
    return model


def inject_lora(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    top_k: int | None = None,
    adapter_name: str = "default",
    **options: Any,
) -> nn.Module:
    """Split a trained LoRA into rank-one experts by its singular value decomposition, and inject them.

    ΔW = U S Vᵀ; expert j is √s_j u_j v_jᵀ √s_j, so that experts are orthogonal and ordered by weight. Alpha is top_k:
    every active expert counts in full. With all of them active and even gates (top_k = r and an untrained router of
    zero weights, which is how it starts then) the adapter is the LoRA.

    Args:
        model: The base model that it was trained on; changed in place.
        path: A PEFT LoRA checkpoint.
        top_k: Experts active a token; None: all, to be exact.
        adapter_name: A name that the model does not have yet.
        **options: Further fields of `RankExpertConfig`.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: The folder or a file is missing.
        ValueError: A variant without an equivalent, or a LoRA that does not fit the model, or top_k out of range.
            The model is untouched then.

    Example:
        >>> model = inject_lora(model, "loras/math", top_k=8)  # doctest: +SKIP
    """
    checkpoint = read_lora(path)
    r = max(A.shape[0] for A, _, _ in checkpoint.layers.values())
    top_k = r if top_k is None else top_k
    config = RankExpertConfig.smora(r=r, top_k=top_k, alpha=top_k, **_shared_options(model, checkpoint, options))
    _check_fit(model, config, {"": checkpoint})
    inject_rank_experts(model, config, adapter_name)
    blocks = {}
    for name, (A, B, scale) in checkpoint.layers.items():
        A, B = split_by_svd(A, B * scale)
        blocks[name] = [(slice(0, len(A)), A, B)]
    _fill(model, adapter_name, blocks)
    if top_k == r:
        for _, layer in adapted_layers(model):
            if adapter_name in layer.rank_experts:
                nn.init.zeros_(layer.rank_experts[adapter_name].router_weight)
    return model


def split_by_svd(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors (r, d_in), (d_out, r) of the same B A whose ranks are orthogonal, the heaviest first.

    What rounding leaves of a singular value that is zero is zero.

    Example:
        >>> A, B = split_by_svd(torch.randn(2, 5), torch.randn(4, 2))
        >>> (A @ A.T).round(decimals=4).count_nonzero()
        tensor(2)
    """
    Q, R = torch.linalg.qr(B.double())
    P, T = torch.linalg.qr(A.double().T)
    U, S, Vh = torch.linalg.svd(R @ T.T)
    root = torch.where(S.max() * _ZERO < S, S, 0).sqrt()
    return (root[:, None] * (Vh @ P.T)).to(A.dtype), ((Q @ U) * root).to(B.dtype)


@contextmanager
def force_expert(model: nn.Module, expert: int, adapter_name: str = "default") -> Iterator[None]:
    """Route every token to one expert alone for a block of calls: the update is then alpha · B_i A_i x.

    For an adapter of `inject_loras`, whose alpha is 1, the model computes exactly what LoRA i does.

    Args:
        model: With a token-routed adapter.
        expert: Its index, 0 … E − 1.
        adapter_name: Which adapter.

    Raises:
        ValueError: The adapter does not route by token, or there is no such expert.

    Example:
        >>> with force_expert(model, 0):  # doctest: +SKIP
        ...     model(**batch)
    """
    layers = [(path, layer) for path, layer in adapted_layers(model) if adapter_name in layer.rank_experts]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no rank-expert adapter {adapter_name!r}.")
    adapters = [(path, layer.rank_experts[adapter_name]) for path, layer in layers]
    for path, adapter in adapters:
        if adapter.settings.router != "token":
            raise ValueError(f"{path}: adapter {adapter_name!r} does not route by token.")
        if not 0 <= expert < adapter.num_experts:
            raise ValueError(f"{path} has experts 0…{adapter.num_experts - 1}: there is no {expert}.")
    kept = [(adapter, adapter.settings, adapter.balance_bias) for _, adapter in adapters]
    try:
        for adapter, settings, bias in kept:
            # s · g is alpha · score / Σ score, whatever top_k is: of one expert, alpha.
            adapter.settings = settings._replace(top_k=1)
            adapter.balance_bias = torch.zeros_like(bias).index_fill(0, torch.tensor(expert, device=bias.device), 1e30)
        yield
    finally:
        for adapter, settings, bias in kept:
            adapter.settings, adapter.balance_bias = settings, bias


def _shared_options(model: nn.Module, checkpoint: LoraCheckpoint, options: dict[str, Any]) -> dict[str, Any]:
    names = [name for name, _ in model.named_modules()]
    return {
        "target_modules": name_targets(checkpoint.layers, names),
        "task_type": checkpoint.task_type,
        "base_model_name_or_path": checkpoint.base,
    } | options


def _check_alike(checkpoints: dict[str, LoraCheckpoint]) -> None:
    (name, first), *others = checkpoints.items()
    for other, checkpoint in others:
        if first.base and checkpoint.base and first.base != checkpoint.base:
            raise ValueError(
                f"{name!r} was trained on {first.base!r} and {other!r} on {checkpoint.base!r}: LoRAs of different base "
                "models do not fit together."
            )
        if differing := sorted(first.layers.keys() ^ checkpoint.layers.keys()):
            raise ValueError(
                f"{name!r} and {other!r} adapt different modules, {differing[0]} for instance "
                f"({len(differing)} in all). Expected LoRAs on the same target_modules."
            )


def _check_fit(model: nn.Module, config: RankExpertConfig, checkpoints: dict[str, LoraCheckpoint]) -> None:
    modules = dict(model.named_modules())
    for name, checkpoint in checkpoints.items():
        who = f"{name!r} ({checkpoint.path})" if name else str(checkpoint.path)
        for path in checkpoint.layers:
            if path not in modules:
                raise ValueError(f"{who} adapts {path}, which {type(model).__name__} does not have.")
    targets = find_targets(model, config)
    for name, checkpoint in checkpoints.items():
        who = f"{name!r} ({checkpoint.path})" if name else str(checkpoint.path)
        for path, (A, B, _) in checkpoint.layers.items():
            target = targets[path]
            if (A.shape[1], B.shape[0]) != (target.d_in, target.d_out):
                raise ValueError(
                    f"{who}: {path} has lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)}, for {A.shape[1]} inputs "
                    f"and {B.shape[0]} outputs; the model's layer has {target.d_in} and {target.d_out}. Is this the "
                    "base model that it was trained on?"
                )


@torch.no_grad()
def _fill(model: nn.Module, adapter_name: str, blocks: dict[str, list[tuple[slice, Tensor, Tensor]]]) -> None:
    # A of unused ranks keeps its random start, so that B = 0 there can be trained away from zero.
    for path, layer in adapted_layers(model):
        if adapter_name not in layer.rank_experts:
            continue
        A, B = layer.rank_experts[adapter_name].A, layer.rank_experts[adapter_name].B
        B.zero_()
        for ranks, own_A, own_B in blocks[path]:
            # Rank by rank: where both factors are zero (an export's padding), no gradient would reach either.
            is_used = (own_A != 0).any(1) | (own_B != 0).any(0)
            used = torch.arange(ranks.start, ranks.stop)[is_used]
            A[used], B[:, used] = own_A[is_used].to(A), own_B[:, is_used].to(B)
