"""An adapter of one layer: one module that owns A, B and its gate's tensors.

    y = base(x) + s · (g ⊙ (x Aᵀ)) Bᵀ

Every tensor is a direct child, because PEFT strips an adapter's name only from the end of a key, and because
accelerate's hooks bring a module's own tensors from the CPU or the disk when the module is called: they are read within
`forward` alone, or within `offloading.onloaded`.

Shapes: N tokens, d_in and d_out features, r ranks, E experts, T tasks, e task-embedding width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..calls.asking import ask
from ..calls.scope import Place
from ..calls.telling import Balance, Contrast, Decision, tell
from ..ops import Base, rank_experts, task_gates
from ..routing.task import TaskGate
from ..routing.token import TokenGate


class AdapterSettings(NamedTuple):
    """What one adapter of one layer is made of and knows beside its tensors; see `RankExpertConfig`.

    Attributes:
        r: Ranks.
        alpha: The scale's numerator.
        router: "token", "task" or "dense".
        dropout: On the input of A.
        top_k: Active experts a token; token gate, as the next five.
        expert_rank: Ranks an expert.
        score_function: "sigmoid" or "softmax".
        biased_gates: The balancing bias enters the gates' values.
        load_balance: "bias", "loss" or "none".
        balance_rate: Step of the balancing bias.
        balance_coef: Weight of the balancing loss.
        num_tasks: T; task gate, as the next five.
        task_embedding_dim: e; None: d_in.
        rank_scaling: "linear", "quadratic" or "none".
        contrastive_coef: Weight of the contrastive loss.
        contrastive_temperature: Its temperature.
        pooling: "mean", "first" or "last".
    """

    r: int
    alpha: float
    router: str = "dense"
    dropout: float = 0.0
    top_k: int = 1
    expert_rank: int = 1
    score_function: str = "sigmoid"
    biased_gates: bool = False
    load_balance: str = "none"
    balance_rate: float = 0.0
    balance_coef: float = 0.0
    num_tasks: int = 1
    task_embedding_dim: int | None = None
    rank_scaling: str = "linear"
    contrastive_coef: float = 0.0
    contrastive_temperature: float = 0.05
    pooling: str = "mean"


def adapter_shapes(settings: AdapterSettings, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
    """Return name to shape of an adapter's tensors, which are what its file holds of a layer.

    Example:
        >>> adapter_shapes(AdapterSettings(r=4, alpha=4), d_in=16, d_out=8)
        {'A': (4, 16), 'B': (8, 4)}
    """
    r = settings.r
    shapes: dict[str, tuple[int, ...]] = {"A": (r, d_in), "B": (d_out, r)}
    if settings.router == "token":
        num_experts = r // settings.expert_rank
        shapes |= {"router_weight": (num_experts, d_in), "balance_bias": (num_experts,)}
    elif settings.router == "task":
        width = settings.task_embedding_dim or d_in
        shapes |= {"task_embedding": (settings.num_tasks, width), "gate_weight": (r, width), "gate_bias": (r,)}
        if width != d_in:
            shapes["projection"] = (width, d_in)
    return shapes


class RankExpertAdapter(nn.Module):
    """One adapter of one layer (SMoRA, arXiv 2501.15103; MoRE, 2505.22694; LoRA, 2106.09685).

    Args:
        place: Which adapter of which layer it is.
        in_features: d_in.
        out_features: d_out.
        settings: Ranks, gate, scale and losses.
        init_weights: See `reset_parameters`.

    Attributes:
        A: (r, d_in).
        B: (d_out, r).
        router_weight: (E, d_in) W_g; token gate.
        balance_bias: (E,) b, a buffer that stays float32 through every cast, for 0.5 + 1e-3 is 0.5 in bfloat16; token
            gate.
        task_embedding: (T, e); task gate.
        gate_weight: (r, e) W; task gate.
        gate_bias: (r,) c; task gate.
        projection: (e, d_in), for the contrastive loss; task gate where e ≠ d_in.
        only_new_task: Of the task embeddings only the last row gets gradients, as long as nothing else is trained.

    Example:
        >>> place = Place(RoutingScope(), "proj", "default")
        >>> adapter = RankExpertAdapter(place, 16, 8, AdapterSettings(r=4, alpha=4))
        >>> adapter(torch.randn(2, 16), Base(nn.Linear(16, 8).forward)).shape
        torch.Size([2, 8])
    """

    A: nn.Parameter
    B: nn.Parameter
    router_weight: nn.Parameter
    balance_bias: Tensor
    task_embedding: nn.Parameter
    gate_weight: nn.Parameter
    gate_bias: nn.Parameter
    projection: nn.Parameter | None

    def __init__(
        self, place: Place, in_features: int, out_features: int, settings: AdapterSettings, init_weights: bool = True
    ) -> None:
        super().__init__()
        self.place = place
        self.settings = settings
        self.only_new_task = False
        self.dropout = nn.Dropout(settings.dropout)
        shapes = adapter_shapes(settings, in_features, out_features)
        for name, shape in shapes.items():
            if name == "balance_bias":
                self.register_buffer(name, torch.empty(shape, dtype=torch.float32))
            else:
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        if settings.router == "task" and "projection" not in shapes:
            self.register_parameter("projection", None)
        self.reset_parameters(init_weights)

    def reset_parameters(self, init_weights: bool = True) -> None:
        """Draw the tensors anew.

        A and the gates Kaiming-uniform with a = √5, as `nn.Linear` draws its weight, task embeddings normal, as
        `nn.Embedding` does, the balancing bias zero.

        Args:
            init_weights: B zero, so that the adapter changes nothing; False: B random too, for tests.
        """
        if self.settings.router == "token":
            nn.init.kaiming_uniform_(self.router_weight, a=math.sqrt(5))
            nn.init.zeros_(self.balance_bias)
        elif self.settings.router == "task":
            nn.init.normal_(self.task_embedding)
            nn.init.kaiming_uniform_(self.gate_weight, a=math.sqrt(5))
            bound = 1 / math.sqrt(self.gate_weight.shape[1])
            nn.init.uniform_(self.gate_bias, -bound, bound)
            if self.projection is not None:
                nn.init.kaiming_uniform_(self.projection, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        if init_weights:
            nn.init.zeros_(self.B)
        else:
            nn.init.kaiming_uniform_(self.B, a=math.sqrt(5))

    @property
    def scale(self) -> float:
        """s: alpha / top_k for a token gate, alpha / r for the others (rank scaling is in the gates)."""
        return self.settings.alpha / (self.settings.top_k if self.settings.router == "token" else self.settings.r)

    @property
    def num_experts(self) -> int:
        """E of a token gate; r of the others."""
        return self.settings.r // self.settings.expert_rank

    def forward(self, x: Tensor, base: Base) -> Tensor:
        """Return base(x) + s · (g ⊙ (dropout(x) Aᵀ)) Bᵀ.

        Args:
            x: (…, d_in) the layer's input.
            base: The layer to whose output the update is added, as a function.

        Returns:
            (…, d_out) in the base's output dtype.

        Raises:
            ValueError: A task gate was not told the tasks, or they do not fit the input.
        """
        settings = self.settings
        asked = ask(self.place, x, by_task=settings.router == "task", trains=self.training and self._is_trained())
        gate: TokenGate | Tensor | None = None
        routing = None
        if settings.router == "token":
            gate = self.token_gate()
        elif asked.task_ids is not None:
            routing = self.task_gate().route(asked.task_ids) if asked.is_watched else None
            gate = task_gates(self.task_gate(), asked.task_ids) if routing is None else routing.gates
        y, indices, chosen = rank_experts(
            base,
            x,
            self.A,
            self.B,
            gate,
            scale=self.scale,
            dropped=self._dropped(x),
            want_routing=settings.router == "token" and self._wants_routing(asked.is_watched, asked.counts),
        )
        if asked.counts or asked.is_watched:
            tell(self.place, asked, Decision(x, y, indices, routing or chosen), self._loss())
        return y

    def _is_trained(self) -> bool:
        return self.A.requires_grad or any(parameter.requires_grad for parameter in self.parameters())

    def _dropped(self, x: Tensor) -> Tensor | None:
        if not self.training or not self.dropout.p:
            return None
        return self.dropout(x if torch.is_autocast_enabled(x.device.type) else x.to(self.A.dtype))

    def _wants_routing(self, is_watched: bool, counts: bool) -> bool:
        # Beyond the choice itself: the probabilities, for the balancing loss or for whoever watches.
        return is_watched or (counts and self.settings.load_balance == "loss")

    def _loss(self) -> Balance | Contrast | None:
        settings = self.settings
        if settings.router == "token" and settings.load_balance != "none":
            return Balance(settings.load_balance, settings.balance_coef, self.num_experts)
        if settings.router == "task" and settings.contrastive_coef and settings.num_tasks > 1:
            coef, temperature, pooling = settings.contrastive_coef, settings.contrastive_temperature, settings.pooling
            return Contrast(coef, temperature, pooling, self._trained_embedding(), self.projection)
        return None

    def token_gate(self) -> TokenGate:
        """Return the token gate over this adapter's tensors."""
        settings = self.settings
        constants = (settings.top_k, settings.expert_rank, settings.score_function, settings.biased_gates)
        return TokenGate(self.router_weight, self.balance_bias, *constants)

    def task_gate(self) -> TaskGate:
        """Return the task gate over this adapter's tensors."""
        return TaskGate(self._trained_embedding(), self.gate_weight, self.gate_bias, self.settings.rank_scaling)

    def _trained_embedding(self) -> Tensor:
        # No hook on the parameter does this: copies and shards of a model would lose it.
        embedding = self.task_embedding
        if not (self.only_new_task and torch.is_grad_enabled() and embedding.requires_grad):
            return embedding
        if any(parameter.requires_grad for parameter in self.parameters() if parameter is not embedding):
            return embedding  # The adapter was unfrozen since.
        return torch.cat([embedding[:-1].detach(), embedding[-1:]])

    def gate_parameters(self) -> list[nn.Parameter]:
        """Return the gate's parameters, none for a dense adapter."""
        return [parameter for name, parameter in self.named_parameters() if name not in ("A", "B")]

    def delta(self, task_id: int | None = None) -> Tensor:
        """Return ΔW = s · B diag(g) A, (d_out, d_in), in float32 or better.

        Args:
            task_id: Whose gate, for an adapter that routes by task.

        Raises:
            ValueError: The adapter routes by token, and has no static form; or no task is named where one must be.
        """
        A, B = self.factors(task_id)
        return B @ A

    def factors(self, task_id: int | None = None) -> tuple[Tensor, Tensor]:
        """Return A (r, d_in) and s · B diag(g) (d_out, r), in float32 or better; see `delta`."""
        self.check_static()
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        B = self.B.to(dtype) * self.scale
        if self.settings.router == "task":
            if task_id is None:
                raise ValueError(
                    f"{self.place.path}: adapter {self.place.adapter!r} routes by task; a merged weight serves one. "
                    "Name it: merge_rank_experts(model, task=...) with one of "
                    f"{list(self.place.scope.tasks[self.place.adapter])}."
                )
            B = B * self.task_gate().route(torch.tensor([task_id], device=B.device)).gates.to(dtype)
        return self.A.to(dtype), B

    def check_static(self) -> None:
        """Refuse an adapter that routes by token, whose update is no static matrix, with a `ValueError`."""
        if self.settings.router == "token":
            raise ValueError(
                f"{self.place.path}: adapter {self.place.adapter!r} routes by token, so its update differs from token "
                "to token and has no exact static form. Either keep the router (save_rank_experts), or export the best "
                "static LoRA for given data with export_lora(model, path, calibration=dataloader)."
            )

    def _apply(self, fn, recurse: bool = True):
        before = self.balance_bias if self.settings.router == "token" else None
        super()._apply(fn, recurse)
        if before is not None:
            after = self.balance_bias
            # From the value before the cast, where there is one: casting down and up again would round it.
            keep = after if before.is_meta or after.is_meta else before
            self.balance_bias = keep.to(device=after.device, dtype=torch.float32)
        return self

    def extra_repr(self) -> str:
        """Show what `repr` of the model prints."""
        settings = self.settings
        shown = {"r": settings.r, "alpha": settings.alpha, "router": settings.router}
        if settings.router == "token":
            shown |= {"num_experts": self.num_experts, "top_k": settings.top_k, "expert_rank": settings.expert_rank}
        elif settings.router == "task":
            shown |= {"num_tasks": settings.num_tasks, "rank_scaling": settings.rank_scaling}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())
