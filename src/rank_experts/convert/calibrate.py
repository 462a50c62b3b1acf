"""The static LoRA that comes closest to a token-routed adapter on given data.

A token gate has no exact static form. Over calibration tokens x with gates g, the rank-r map M x that is nearest to
g ⊙ (A x) in least squares is

    M = E[(g ⊙ A x) xᵀ] (E[x xᵀ] + εI)⁻¹

and s B M is then the matrix nearest to the adapter's output s B (g ⊙ A x). For fewer ranks, s B M is truncated in the
metric of the inputs: with E[x xᵀ] + εI = L Lᵀ, by the singular value decomposition of s B M L (reduced-rank
regression; Izenman 1975). Everything is accumulated and solved in float64.

Shapes: N tokens, d_in and d_out features, r ranks of the adapter, q ranks of the static LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calls.call import current_call
from ..calls.padding import token_mask
from ..layers.linear import RankExpertLinear, adapted_layers
from ..layers.offloading import device_of, onloaded
from .passes import Batches, check_batches, run_batches

METHODS = ("least-squares", "mean-gate", "no-gate")
"""Ways to make a token gate static; the last two are there to compare with."""

_RIDGE = 1e-6
_ROWS = 8192


class Factors(NamedTuple):
    """A static LoRA of one layer, y = W0 x + B A x, with every scale and gate in B.

    Attributes:
        A: (q, d_in).
        B: (d_out, q).
    """

    A: Tensor
    B: Tensor


@dataclass(frozen=True)
class LayerFit:
    """How well a static LoRA stands for one layer's adapter.

    Attributes:
        path: The layer.
        tokens: Calibration tokens that it saw, padding left out.
        inputs: d_in. With few tokens an input, the fit is better on the calibration set than elsewhere.
        energy: Mean of ‖s B (g ⊙ A x)‖² over those tokens.
        residual: Mean of the squared distance between that and the static LoRA's output.
    """

    path: str
    tokens: int
    inputs: int
    energy: float
    residual: float

    @property
    def explained(self) -> float:
        """Share of the energy that the static LoRA explains: 1 is all; below 0 is worse than no adapter."""
        return 1 - self.residual / self.energy if self.energy else 1.0


@dataclass(frozen=True)
class CalibrationReport:
    """What a calibrated export gives up. A static LoRA never equals a token gate; this says by how much it differs.

    Attributes:
        method: See `METHODS`.
        r: Ranks of the static LoRA.
        layers: One `LayerFit` each, in the model's order.
        loss_before: The model's mean loss on the calibration set with the routed adapter; None without labels.
        loss_after: The same with the static LoRA.
    """

    method: str
    r: int
    layers: tuple[LayerFit, ...]
    loss_before: float | None
    loss_after: float | None

    @property
    def explained(self) -> float:
        """Share of the adapter's output energy, added up over layers, that the static LoRA explains."""
        energy = sum(layer.energy for layer in self.layers)
        return 1 - sum(layer.residual for layer in self.layers) / energy if energy else 1.0

    def __str__(self) -> str:
        width = max(len(layer.path) for layer in self.layers)
        lines = [
            f"Static approximation of a token-routed adapter ({self.method}, r={self.r}); it is not exact.",
            f"{'layer':<{width}}  {'tokens':>9}  {'energy':>10}  explained",
            *(
                f"{layer.path:<{width}}  {layer.tokens:>9}  {layer.energy:>10.4g}  {layer.explained:>9.1%}"
                for layer in self.layers
            ),
            f"{'all layers':<{width}}  {'':>9}  {sum(layer.energy for layer in self.layers):>10.4g}  "
            f"{self.explained:>9.1%}",
        ]
        if self.loss_before is not None and self.loss_after is not None:
            lines.append(f"loss on the calibration set: {self.loss_before:.4f} routed, {self.loss_after:.4f} static")
        if few := [layer for layer in self.layers if layer.tokens < 4 * layer.inputs]:
            lines.append(
                f"{few[0].path} and {len(few) - 1} more layers saw fewer than four tokens an input feature: the shares "
                "above are too good. Calibrate with more data."
                if len(few) > 1
                else f"{few[0].path} saw fewer than four tokens an input feature: its share above is too good."
            )
        return "\n".join(lines)


def calibrate(
    model: nn.Module,
    batches: Batches,
    adapter_name: str = "default",
    *,
    r: int | None = None,
    method: str = "least-squares",
    max_memory_gb: float = 8.0,
    progress: bool = True,
) -> tuple[dict[str, Factors], CalibrationReport]:
    """Fit a static LoRA to a token-routed adapter. The model is left as it is.

    One pass over the batches gathers, for every layer, E[x xᵀ] (d_in²) and E[(g ⊙ A x) xᵀ] (r · d_in) in float64 on
    the layer's device: 8 · d_in · (d_in + r) bytes, 134 MB for d_in = 4096. Where all layers together need more than
    `max_memory_gb`, they are taken in groups, one pass each. One more pass measures the loss where there are labels.

    Args:
        model: With the adapter active, and no other.
        batches: A `DataLoader` or a list of batches that the model takes as keyword arguments. Tokens that a 2-D
            `attention_mask` marks as padding do not count.
        adapter_name: Which adapter.
        r: Ranks of the static LoRA; None: the adapter's own.
        method: "least-squares", or to compare: "mean-gate" (B diag(E[g]) A), "no-gate" (B A).
        max_memory_gb: For the accumulators, in 10⁹ bytes.
        progress: Show progress bars.

    Returns:
        (layer path to `Factors` in float64, report).

    Raises:
        ValueError: The adapter does not route by token, another one is active beside it or it is merged, the set is
            empty, all padding or has non-finite activations, or r is out of range.
        TypeError: The set is an iterator, which can be read only once, or its batches are no mappings.

    Example:
        >>> factors, report = calibrate(model, loader)  # doctest: +SKIP
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: expected one of {', '.join(map(repr, METHODS))}.")
    if r is not None and r < 1:
        raise ValueError(f"r={r}: expected at least 1.")
    check_batches(batches, "calibration")
    layers = _token_layers(model, adapter_name)
    factors: dict[str, Factors] = {}
    fits: list[LayerFit] = []
    loss_before = None
    groups = _group(layers, max_memory_gb * 1e9)
    for number, group in enumerate(groups, 1):
        part = f" {number} of {len(groups)}" if len(groups) > 1 else ""
        moments = {path: Moments(path, layer, adapter_name) for path, layer in group.items()}
        with ExitStack() as stack:
            for path, layer in group.items():
                handle = layer.register_forward_pre_hook(moments[path].observe, with_kwargs=True)
                stack.callback(handle.remove)
            loss_before = run_batches(model, batches, f"Calibration{part}", progress)
        for path in list(moments):
            own = moments.pop(path)
            factors[path] = own.fit(method, r)
            fits.append(own.compare(factors[path]))
    ranks = max(own.A.shape[0] for own in factors.values())
    loss_after = None
    if loss_before is not None:
        with static_adapter(model, factors):
            loss_after = run_batches(model, batches, "Loss of the static LoRA", progress)
    return factors, CalibrationReport(method, r or ranks, tuple(fits), loss_before, loss_after)


def _token_layers(model: nn.Module, adapter_name: str) -> dict[str, RankExpertLinear]:
    layers = {path: layer for path, layer in adapted_layers(model) if adapter_name in layer.rank_experts}
    if not layers:
        known = sorted({name for _, layer in adapted_layers(model) for name in layer.rank_experts})
        raise ValueError(f"{type(model).__name__} has no rank-expert adapter {adapter_name!r}; it has {known}.")
    for path, layer in layers.items():
        if layer.rank_experts[adapter_name].settings.router != "token":
            raise ValueError(
                f"{path}: adapter {adapter_name!r} does not route by token; its static form is exact and needs no "
                "calibration. Leave calibration out."
            )
    for path, layer in adapted_layers(model):
        if layer.merged or layer.disable_adapters or (active := list(layer.active_adapters)) != [adapter_name]:
            state = "merged" if layer.merged else "disabled" if layer.disable_adapters else f"with {active} active"
            raise ValueError(
                f"{path} is {state}: calibration needs adapter {adapter_name!r} active alone. Call "
                f"set_adapter({adapter_name!r}), and unmerge_rank_experts(model) where it is merged."
            )
    return layers


def _group(layers: dict[str, RankExpertLinear], max_bytes: float) -> list[dict[str, RankExpertLinear]]:
    groups: list[dict[str, RankExpertLinear]] = [{}]
    used = 0.0
    for path, layer in layers.items():
        size = (
            8
            * layer.in_features
            * (layer.in_features + max(adapter.settings.r for adapter in layer.rank_experts.values()))
        )
        if groups[-1] and used + size > max_bytes:
            groups.append({})
            used = 0.0
        groups[-1][path] = layer
        used += size
    return groups


class Moments:
    """The second moments of one layer's inputs x and gated ranks u = g ⊙ (A x), added up over calibration tokens.

    Args:
        path: The layer's, for messages.
        layer: With a token-routed adapter.
        adapter_name: Which.

    Attributes:
        tokens: N so far.
        xx: (d_in, d_in) Σ x xᵀ, float64.
        ux: (r, d_in) Σ u xᵀ.
        uu: (r, r) Σ u uᵀ.
        gates: (r,) Σ g.
    """

    def __init__(self, path: str, layer: RankExpertLinear, adapter_name: str) -> None:
        self.path = path
        self.layer = layer
        self.adapter_name = adapter_name
        adapter = layer.rank_experts[adapter_name]
        with onloaded(adapter):
            # Apple's GPUs have no float64.
            device = torch.device("cpu") if adapter.A.device.type == "mps" else adapter.A.device
            self.A = adapter.A.detach().to(device, torch.float64)
            self.B = adapter.B.detach().to(device, torch.float64) * adapter.scale
        r, d_in = self.A.shape
        self.tokens = 0
        self.xx = torch.zeros(d_in, d_in, dtype=torch.float64, device=device)
        self.ux = torch.zeros(r, d_in, dtype=torch.float64, device=device)
        self.uu = torch.zeros(r, r, dtype=torch.float64, device=device)
        self.gates = torch.zeros(r, dtype=torch.float64, device=device)

    def observe(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add the tokens of one forward: a forward pre-hook of the layer.

        Raises:
            ValueError: An activation is not finite.
        """
        x = args[0] if args else next(iter(kwargs.values()))
        mask = token_mask(current_call(self.layer.scope), self.layer.path, x)
        rows = x.reshape(-1, x.shape[-1])
        rows = rows if mask is None else rows[mask]
        if not torch.isfinite(rows).all():
            raise ValueError(
                f"{self.path}: the calibration set leads to activations that are not finite here. Look for a "
                "damaged batch, or load the model in bfloat16 or float32 where it overflows float16."
            )
        adapter = self.layer.rank_experts[self.adapter_name]
        with onloaded(adapter):
            gate = adapter.token_gate()
            for part in rows.split(_ROWS):
                self.add(part, gate.route(part).gates)

    def add(self, x: Tensor, gates: Tensor) -> None:
        """Add tokens x (N, d_in) with their gates (N, r)."""
        x = x.to(self.xx)
        gates = gates.to(self.xx)
        u = gates * (x @ self.A.T)
        self.tokens += len(x)
        self.xx.addmm_(x.T, x)
        self.ux.addmm_(u.T, x)
        self.uu.addmm_(u.T, u)
        self.gates += gates.sum(0)

    def fit(self, method: str, r: int | None) -> Factors:
        """Return the static LoRA of at most r ranks; see `METHODS`.

        Raises:
            ValueError: There were no tokens.
        """
        if self.tokens == 0:
            raise ValueError(f"{self.path} saw no token that is not padding: the calibration set is empty.")
        gram = self.xx / self.tokens
        # Relative to the inputs' mean energy; the absolute term serves a layer whose inputs are all zero.
        gram.diagonal().add_(_RIDGE * gram.diagonal().mean() + 1e-30)
        cholesky = torch.linalg.cholesky(gram)
        if method == "least-squares":
            A, B = torch.cholesky_solve((self.ux / self.tokens).T, cholesky).T, self.B
        elif method == "mean-gate":
            A, B = self.A, self.B * (self.gates / self.tokens)
        else:
            A, B = self.A, self.B
        if r is None or r >= len(A):
            return Factors(A, B)
        # B (A L) = Q (R A L) = Q U S Vᵀ; the best q ranks are Q U_q S_q and V_qᵀ L⁻¹.
        Q, R = torch.linalg.qr(B)
        U, S, Vh = torch.linalg.svd(R @ A @ cholesky, full_matrices=False)
        root = S[:r].sqrt()
        A = torch.linalg.solve_triangular(cholesky, root[:, None] * Vh[:r], upper=False, left=False)
        return Factors(A, Q @ U[:, :r] * root)

    def compare(self, factors: Factors) -> LayerFit:
        """Return how far a static LoRA is from the adapter on the tokens seen."""
        A, B = factors
        energy = ((self.B.T @ self.B) * self.uu).sum()
        crossed = ((self.B.T @ B) * (self.ux @ A.T)).sum()
        static = ((B.T @ B) * (A @ self.xx @ A.T)).sum()
        residual = (energy - 2 * crossed + static).clamp(min=0)
        return LayerFit(
            self.path, self.tokens, self.A.shape[1], float(energy) / self.tokens, float(residual) / self.tokens
        )


@contextmanager
def static_adapter(model: nn.Module, factors: dict[str, Factors]) -> Iterator[None]:
    """Let static LoRAs stand in for the adapters of a model for a block.

    Args:
        model: With adapters.
        factors: Layer path to the static LoRA; other adapted layers run without adapters.
    """
    with ExitStack() as stack:
        for path, layer in adapted_layers(model):
            stack.callback(setattr, layer, "_disable_adapters", layer.disable_adapters)
            layer._disable_adapters = True
            if path in factors:
                adapter = next(iter(layer.rank_experts.values()))
                dtype = torch.promote_types(adapter.A.dtype, torch.float32)
                hook = _AddStatic(Factors(*(factor.to(device_of(adapter), dtype) for factor in factors[path])))
                stack.callback(layer.base_layer.register_forward_hook(hook).remove)
        yield


class _AddStatic:
    def __init__(self, factors: Factors) -> None:
        self.factors = factors

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        update = F.linear(F.linear(args[0].to(self.factors.A.dtype), self.factors.A), self.factors.B)
        return (output + update).to(output.dtype)
