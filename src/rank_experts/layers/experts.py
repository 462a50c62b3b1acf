"""Mixture-of-experts bases: an adapter for every expert of the base, tokens as the base routes them.

transformers keeps a layer's experts in one module with 3-D parameters, a slice of each for every expert. Each slice is
taken for a linear layer (`ExpertProjection`) and adapted by a `RankExpertLinear` of its own, so that gates, losses,
loads, files, merging and reports are those of any adapted layer. What is left to say here is how tokens reach them:

    y_n = Σ_m w_nm · down_m(activation(up_m(x_n)))        the sum over the experts m that the base chose for token n
    up_m(x) = W_m x + s · (g_m ⊙ (x A_mᵀ)) B_mᵀ           and down_m likewise, with its own A_m, B_m and gate g_m

A token gate has its own router W_g for every expert of the base, and counts the tokens that the base sent there. The
loop follows transformers' "eager" implementation step by step, so that both compute the same bits.

Shapes: N tokens, M experts of the base, K of them for each token, n of the tokens at one expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calls.boundary import UNCOMPILED
from ..calls.call import Call, Gathered, current_call
from ..calls.padding import token_mask
from ..calls.scope import RoutingScope
from ..calls.tasks import examples_of_tokens
from .linear import RankExpertLinear
from .offloading import onloaded

_CONVENTION = ("num_experts", "has_gate", "has_bias", "is_transposed")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ExpertProjection(nn.Module):
    """One expert's slice of a 3-D parameter, as a linear layer. It owns nothing; the experts' module does.

    Args:
        experts: transformers' module of experts.
        parameter_name: "gate_up_proj", "up_proj" or "down_proj".
        index: Which expert.
    """

    def __init__(self, experts: nn.Module, parameter_name: str, index: int) -> None:
        super().__init__()
        self._experts = (experts,)  # in a tuple, so that it does not become a submodule a second time
        self.parameter_name = parameter_name
        self.index = index
        self.out_features, self.in_features = self.weight.shape

    @property
    def experts(self) -> Any:
        """The module that holds the parameter."""
        return self._experts[0]

    @property
    def weight(self) -> Tensor:
        """(d_out, d_in), a view of the parameter: writing to it changes the expert."""
        stacked = getattr(self.experts, self.parameter_name)[self.index]
        return stacked.T if self.experts.is_transposed else stacked

    def forward(self, x: Tensor) -> Tensor:
        """Project tokens (n, d_in) to (n, d_out), as transformers' "eager" implementation does."""
        stacked = getattr(self.experts, self.parameter_name)[self.index]
        y = x @ stacked if self.experts.is_transposed else F.linear(x, stacked)
        return y + getattr(self.experts, f"{self.parameter_name}_bias")[self.index] if self.experts.has_bias else y

    def extra_repr(self) -> str:
        """Show what `repr` of the model prints."""
        return f"{self.parameter_name}[{self.index}], in_features={self.in_features}, out_features={self.out_features}"


class RankExpertExperts(nn.Module):
    """A base's module of experts with an adapter for each expert.

    Args:
        base_layer: transformers' module of experts.
        path: Its place in the model, for messages.
        scope: Shared by the model's adapted layers.

    Attributes:
        gate_up_proj, up_proj, down_proj: A `RankExpertLinear` for every expert of the base; empty where no adapter
            targets that parameter. "up_proj" only where the base has it.
    """

    def __init__(self, base_layer: nn.Module, path: str, scope: RoutingScope) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.path = path
        self.scope = scope
        scope.adapts_experts = True
        # Already now, because PEFT adds adapters while it walks through the modules.
        for name in expert_parameters(base_layer):
            self.add_module(name, nn.ModuleList())

    def adapted(self, parameter_name: str) -> list[RankExpertLinear]:
        """Return one parameter's adapted layers, an expert of the base each; made at the first call."""
        layers = cast(nn.ModuleList, getattr(self, parameter_name))
        if not layers:
            for index in range(self.base_layer.num_experts):
                projection = ExpertProjection(self.base_layer, parameter_name, index)
                layers.append(RankExpertLinear(projection, f"{self.path}.{parameter_name}.{index}", self.scope))
        return cast(list[RankExpertLinear], list(layers))

    def layers(self) -> Iterator[RankExpertLinear]:
        """Yield the adapted layers of all parameters."""
        for name in expert_parameters(self.base_layer):
            yield from cast(nn.ModuleList, getattr(self, name))  # type: ignore[misc]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Apply the experts that the base chose, with the active adapters.

        Args:
            hidden_states: (N, d) tokens.
            top_k_index: (N, K) int64, the base's experts.
            top_k_weights: (N, K), their weights.

        Returns:
            (N, d) in the dtype of `hidden_states`.

        Raises:
            ValueError: The inputs have other shapes, or the tasks do not fit them.
            RuntimeError: Within `torch.export`.
        """
        if torch.compiler.is_exporting():
            raise RuntimeError(
                f"{self.path}: adapted experts of a mixture cannot be exported, because which tokens reach an expert "
                "is known only when they run. Merge the adapter first (merge_rank_experts), or leave the experts out "
                "of target_parameters."
            )
        return self._forward(hidden_states, top_k_index, top_k_weights)

    @torch.compiler.disable(reason=UNCOMPILED)
    def _forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if not self._is_active():
            return self.base_layer(hidden_states, top_k_index, top_k_weights)
        if (
            hidden_states.dim() != 2
            or top_k_index.shape != top_k_weights.shape
            or len(top_k_index) != len(hidden_states)
        ):
            raise ValueError(
                f"{self.path}: expected tokens (N, d) with K experts each, found inputs of shapes "
                f"{tuple(hidden_states.shape)}, {tuple(top_k_index.shape)} and {tuple(top_k_weights.shape)}."
            )
        with onloaded(self.base_layer):
            return self._sum(hidden_states, top_k_index, top_k_weights)

    def _sum(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        call = current_call(self.scope)
        calls = None if call is None else _CallsOfExperts(call, hidden_states, self.path)
        result = torch.zeros_like(hidden_states)
        for expert, tokens, slots in dispatch(top_k_index, self.base_layer.num_experts):
            # In training an expert without tokens runs too: its gradients are zero then, not missing.
            if not self.training and not len(tokens):
                continue
            x = hidden_states[tokens]
            if calls is None:
                y = self._expert(expert, x)
            else:
                with calls.at(tokens):
                    y = self._expert(expert, x)
            y = y * top_k_weights[tokens, slots, None]
            result.index_add_(0, tokens, y.to(result.dtype))
        return result

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        base = self.base_layer
        up = self._projection("gate_up_proj" if base.has_gate else "up_proj", expert)(x)
        y = self._projection("down_proj", expert)(base._apply_gate(up) if base.has_gate else base.act_fn(up))
        return base.post_expert_norm(y) if getattr(base, "has_post_expert_norm", False) else y

    def _projection(self, parameter_name: str, expert: int) -> nn.Module:
        layers = cast(nn.ModuleList, getattr(self, parameter_name))
        return layers[expert] if layers else ExpertProjection(self.base_layer, parameter_name, expert)

    def _is_active(self) -> bool:
        # Whether a layer has anything to add, or to refuse (a merged one checks its task).
        call = current_call(self.scope)
        for layer in self.layers():
            if layer.disable_adapters:
                if layer.merged:
                    layer.unmerge()
            elif layer.merged or any(name in layer.rank_experts for name in _names(layer, call)):
                return True
        return False

    def get_base_layer(self) -> nn.Module:
        """Return transformers' module."""
        return self.base_layer

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge every expert's adapters; see `RankExpertLinear.merge`."""
        for layer in self.layers():
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def unmerge(self) -> None:
        """Put the base's weights back, bit by bit."""
        for layer in self.layers():
            layer.unmerge()


def _names(layer: RankExpertLinear, call: Call | None) -> list[str]:
    return list(call.adapter_names) if call is not None and call.adapter_names else list(layer.active_adapters)


class _CallsOfExperts:
    # Makes, for each expert of the base, the call that says whose its tokens are.

    def __init__(self, call: Call, hidden_states: Tensor, path: str) -> None:
        self.call = call
        self.mask = token_mask(call, path, hidden_states)
        self.num_examples, self.examples = examples_of_tokens(call, path, hidden_states)

    def at(self, tokens: Tensor) -> Call:
        mask = None if self.mask is None else self.mask[tokens]
        gathered = Gathered(tokens, self.examples[tokens], self.num_examples, mask)
        own = self.call.fork(gathered=gathered, memory=None, memory_mask=None)
        if len(tokens):
            own.loads, own.losses = self.call.loads, self.call.losses
        else:
            own.observers = ()  # An expert without tokens has nothing to report.
        return own


def dispatch(top_k_index: Tensor, num_experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield for every expert of the base its number, its tokens (n,) and which of a token's K choices it was (n,).

    The order is that of transformers' "eager" implementation, and the host waits for an accelerator once.

    Args:
        top_k_index: (N, K) int64; a number beyond the experts stands for one on another device, and is left out.
        num_experts: M.

    Example:
        >>> [(m, tokens.tolist(), slots.tolist()) for m, tokens, slots in dispatch(torch.tensor([[1], [0], [1]]), 2)]
        [(0, [1], [0]), (1, [0, 2], [0, 0])]
    """
    num_tokens = len(top_k_index)
    flat = top_k_index.T.reshape(-1)
    counts = torch.bincount(flat, minlength=num_experts)[:num_experts].tolist()
    order = flat.argsort(stable=True)[: sum(counts)]
    for expert, rows in enumerate(order.split(counts)):
        yield expert, rows % num_tokens, rows // num_tokens


def expert_parameters(module: nn.Module) -> list[str]:
    """Return which of a module's parameters hold a linear projection for each expert; none where it is no such module.

    Known are the modules that follow transformers' convention (`use_experts_implementation`): Mixtral's, Qwen3-MoE's,
    gpt-oss's and some sixty others.

    Example:
        >>> expert_parameters(nn.Linear(2, 2))
        []
    """
    if not all(hasattr(module, name) for name in _CONVENTION):
        return []
    wanted = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    own = dict(module.named_parameters(recurse=False))
    if not all(name in own and own[name].dim() == 3 and len(own[name]) == module.num_experts for name in wanted):
        return []
    return wanted


def check_expert_parameter(module: nn.Module, parameter_name: str, path: str, bias: str) -> tuple[int, int]:
    """Return d_in and d_out of the experts' projections in one parameter, or refuse it.

    Args:
        module: What holds the parameter.
        parameter_name: Its name there.
        path: The module's place in the model, for messages.
        bias: The config's.

    Raises:
        TypeError: It is no parameter of a mixture's experts that the library knows, or is quantised.
        ValueError: The experts are spread over devices, or their biases are to be trained.
    """
    parameter: Any = getattr(module, parameter_name)
    where = f"{path}.{parameter_name}"
    if parameter_name not in (known := expert_parameters(module)):
        what = f"Its experts' projections are called {known}." if known else "Name linear layers in target_modules."
        raise TypeError(
            f"{where} is a parameter of shape {tuple(parameter.shape)} of a {type(module).__name__}: target_parameters "
            "adapts the experts of a mixture, one 3-D parameter for all of them, in modules that follow transformers' "
            f"use_experts_implementation. {what}"
        )
    if parameter.dtype not in _DTYPES:
        raise TypeError(
            f"{where} holds {parameter.dtype}: quantised experts cannot be adapted. Load the model in bfloat16, or "
            "leave the experts out of target_parameters."
        )
    if getattr(module, "_is_expert_parallel", False):
        raise ValueError(
            f"{path} holds a part of the experts only (expert parallelism), which cannot be adapted. Load the model "
            "without it, or leave the experts out of target_parameters."
        )
    if bias != "none" and module.has_bias:
        raise ValueError(f'{path} has a bias for each expert, which cannot be trained: bias={bias!r}. Use bias="none".')
    rows, columns = parameter.shape[1:]
    return (rows, columns) if module.is_transposed else (columns, rows)
