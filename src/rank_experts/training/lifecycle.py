"""An adapter after its first training: tasks that join it, and inputs that come without a task's name.

Both rest on MoRE's task embeddings (arXiv 2505.22694, section 3): a new task is a new row of them, and the
contrastive loss has drawn each row near the inputs of its task, so that the nearest row names the task of an input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calls.call import current_call
from ..calls.padding import token_mask
from ..config.config import RankExpertConfig
from ..layers.experts import ExpertProjection
from ..layers.linear import RankExpertLinear, adapted_layers
from ..layers.offloading import check_in_place
from ..messages import nearest
from ..routing.pooling import pool_examples


def add_task(
    model: nn.Module,
    task: str,
    like: str | None = None,
    *,
    train: str = "embedding",
    adapter_name: str = "default",
) -> None:
    """Teach a task-routed adapter a new task, in place: few-shot transfer to a task that it was not trained on.

    Every layer's task embedding grows by one row; the new task's id is the last. The other tasks compute what they
    did: where rank_scaling="linear" divides by the number of tasks, alpha grows by the same factor (in the config too).
    Save and load as ever. Make the optimiser after this call, since the embeddings are new parameters.

    Args:
        model: With the adapter, wrapped in a `PeftModel` or not.
        task: The new task's name.
        like: Start from this task's embedding, and so from its ranks; None: draw a new one, as at initialisation.
        train: "embedding": of all that holds the adapter only the new rows are trained, so that no other task
            changes; a classifier's heads around it stay as they are. Where more of the adapter is unfrozen later
            (`set_adapter` does it), all rows are trained again. The new rows' gradients alone are not zero; give
            `task_embedding` no weight decay (`RankExpertTrainer` gives it none), which would shrink the others' rows.
            "adapter": the whole adapter is trained.
        adapter_name: Which adapter.

    Raises:
        ValueError: The adapter is not there, does not route by task, is merged, knows the task already or not the
            one named in `like`; nothing changes then.

    Example:
        >>> add_task(model, "scitail", like="rte")  # doctest: +SKIP
        >>> with use_task(model, "scitail"):  # doctest: +SKIP
        ...     model(**batch).loss.backward()
    """
    config, layers = _task_layers(model, adapter_name)
    known = list(config.tasks or ())
    if train not in ("embedding", "adapter"):
        raise ValueError(
            f"train={train!r}: expected 'embedding' or 'adapter'.{nearest(train, ['embedding', 'adapter'])}"
        )
    if task in known:
        raise ValueError(f"Adapter {adapter_name!r} knows the task {task!r} already; its tasks are {known}.")
    if like is not None and like not in known:
        raise ValueError(f"like={like!r} is unknown to adapter {adapter_name!r}: {known}.{nearest(like, known)}")
    if merged := [layer.path for layer in layers if adapter_name in layer.merged_adapters]:
        raise ValueError(f"{merged[0]}: adapter {adapter_name!r} is merged. Call unmerge_rank_experts(model) first.")
    check_in_place((layer.path, layer.rank_experts) for layer in layers)
    # Validated before anything changes: the config refuses names that are no names.
    grown = [*known, task]
    RankExpertConfig.more(tasks=grown)
    factor = len(grown) / len(known) if config.rank_scaling == "linear" else 1.0
    for layer in layers:
        _grow(layer, adapter_name, None if like is None else known.index(like))
        adapter = layer.rank_experts[adapter_name]
        alpha = adapter.settings.alpha * factor
        adapter.settings = adapter.settings._replace(alpha=alpha, num_tasks=len(grown))
        layer.scope.tasks[adapter_name] = tuple(grown)
    config.tasks = grown
    config.alpha = config.alpha * factor
    config.alpha_pattern = {name: alpha * factor for name, alpha in config.alpha_pattern.items()}
    config.inference_mode = False
    _choose_trained(model, layers, adapter_name, train)


def _grow(layer: RankExpertLinear, adapter_name: str, like: int | None) -> None:
    adapter = layer.rank_experts[adapter_name]
    old = adapter.task_embedding.detach()
    row = torch.empty_like(old[:1]).normal_() if like is None else old[like : like + 1]
    adapter.task_embedding = nn.Parameter(torch.cat([old, row]))


def _choose_trained(model: nn.Module, layers: list[RankExpertLinear], adapter_name: str, train: str) -> None:
    if train == "adapter":
        for layer in layers:
            layer.rank_experts[adapter_name].only_new_task = False
            layer.set_requires_grad(adapter_name, requires_grad=True)
        return
    # What holds the adapter, not what stands around it: a classifier's heads are its own affair.
    _owner(model, adapter_name).requires_grad_(False)
    for layer in layers:
        adapter = layer.rank_experts[adapter_name]
        adapter.task_embedding.requires_grad_(True)
        adapter.only_new_task = True


class TaskGuess(NamedTuple):
    """What `identify_task` found.

    Attributes:
        names: The nearest task of each example.
        scores: (B, T) the tasks' shares, adding up to 1; `scores.max(-1)` is how sure the guess is.
    """

    names: list[str]
    scores: Tensor


@torch.no_grad()
def identify_task(model: nn.Module, inputs: Mapping[str, Any], adapter_name: str = "default") -> TaskGuess:
    """Name the nearest task of inputs that come without one.

    A task's score is the contrastive loss's own softmax, softmax_t(cos(h, e_t) / τ), with the logits averaged over
    the adapted layers; h is the pooled input of a layer. What a layer below computes depends on the task that it is
    told, so the model is run once for every task, and task t is scored by the run that was told t.

    Args:
        model: With a task-routed adapter that was trained with the contrastive loss.
        inputs: The model's own, `input_ids` and `attention_mask` for instance; without `task_ids` and `labels`.
        adapter_name: Which adapter.

    Returns:
        `TaskGuess`.

    Raises:
        ValueError: The adapter is not there, does not route by task, adapts a mixture's experts alone, or
            contrastive_coef is 0, so that its embeddings were never drawn to their tasks' inputs.

    Example:
        >>> guess = identify_task(model, tokenizer("A man inspects a uniform.", return_tensors="pt"))  # doctest: +SKIP
        >>> with use_task(model, guess.names):  # doctest: +SKIP
        ...     model.generate(**inputs)
    """
    config, layers = _task_layers(model, adapter_name)
    if config.contrastive_coef == 0:
        raise ValueError(
            f"Adapter {adapter_name!r} was trained with contrastive_coef=0: its task embeddings say nothing of "
            "inputs. Train it with contrastive_coef > 0, 0.01 by default."
        )
    layers = [layer for layer in layers if not isinstance(layer.base_layer, ExpertProjection)]
    if not layers:
        raise ValueError(
            f"Adapter {adapter_name!r} adapts a mixture's experts alone, whose inputs are tokens from all over the "
            "batch. Name linear layers in target_modules too, the attention's for instance."
        )
    tasks = list(config.tasks or ())
    given = {name: value for name, value in inputs.items() if name not in ("task_ids", "labels")}
    model_config: Any = getattr(model, "config", None)
    if getattr(model_config, "is_encoder_decoder", False) and "decoder_input_ids" not in given:
        ids = given["input_ids"]
        given["decoder_input_ids"] = torch.full_like(ids[:, :1], model_config.decoder_start_token_id)
    was_training = model.training
    model.eval()
    try:
        columns = [_agreement(model, layers, given, t, adapter_name)[:, t] for t in range(len(tasks))]
    finally:
        model.train(was_training)
    scores = torch.stack(columns, -1).div(config.contrastive_temperature).softmax(-1)
    return TaskGuess([tasks[t] for t in scores.argmax(-1).tolist()], scores)


def _agreement(
    model: nn.Module, layers: list[RankExpertLinear], inputs: dict[str, Any], task_id: int, adapter_name: str
) -> Tensor:
    # (B, T) cosine of the layers' pooled inputs and the task embeddings, averaged over the layers that ran.
    example = next(value for value in inputs.values() if isinstance(value, Tensor))
    batch = len(example)
    found: list[Tensor] = []

    def observe(layer: RankExpertLinear, args: tuple[Any, ...]) -> None:
        adapter = layer.rank_experts[adapter_name]
        x = args[0]
        mask = token_mask(current_call(layer.scope), layer.path, x)
        examples = x.reshape(batch, -1, layer.in_features).float()
        mask = None if mask is None else mask.view(examples.shape[:2])
        pooled = pool_examples(examples, mask, adapter.settings.pooling)
        if adapter.projection is not None:
            pooled = F.linear(pooled, adapter.projection.float())
        cosine = F.normalize(pooled, dim=-1) @ F.normalize(adapter.task_embedding.float(), dim=-1).T
        found.append(cosine)

    handles = [layer.register_forward_pre_hook(observe) for layer in layers]
    try:
        model(**inputs, task_ids=torch.full((batch,), task_id, device=example.device))
    finally:
        for handle in handles:
            handle.remove()
    device = found[0].device
    return torch.stack([cosine.to(device) for cosine in found]).mean(0)


def _task_layers(model: nn.Module, adapter_name: str) -> tuple[RankExpertConfig, list[RankExpertLinear]]:
    layers = [layer for _, layer in adapted_layers(model) if adapter_name in layer.rank_experts]
    owner = _owner(model, adapter_name)
    config = None if owner is None else owner.peft_config[adapter_name]
    if config is not None:
        if config.router != "task":
            raise ValueError(
                f"Adapter {adapter_name!r} has router={config.router!r}: only a task router knows tasks "
                "(RankExpertConfig.more)."
            )
        return config, layers
    names = sorted({name for _, layer in adapted_layers(model) for name in layer.rank_experts})
    raise ValueError(f"The model has no rank-expert adapter {adapter_name!r}; it has {names}.")


def _owner(model: nn.Module, adapter_name: str) -> Any:
    # The outermost module that knows the adapter's config: a PeftModel, or the model that it was injected into.
    configs = ((module, getattr(module, "peft_config", None) or {}) for module in model.modules())
    return next((module for module, known in configs if isinstance(known.get(adapter_name), RankExpertConfig)), None)
