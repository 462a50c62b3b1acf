"""What is asked of an architecture: a tiny model of it with PEFT's LoRA, with a token gate and with a task gate.

LoRA is the control: where it does not work either, nothing is asked of us. With a task gate a batch of mixed tasks must
equal each task alone, row by row, at lengths that are and are not multiples of the batch, the batch's own size among
them; or the mixture is refused by an error that names a module.
"""

from __future__ import annotations

import functools
import inspect
import re
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from rank_experts import (
    RankExpertConfig,
    inject_rank_experts,
    load_rank_experts,
    merge_rank_experts,
    save_rank_experts,
    use_task,
)
from rank_experts.layers import adapted_layers

from .shrink import VARIANTS, tiny_model

TASKS = ["a", "b", "c"]
LENGTHS = (6, 5, 3)  # a multiple of the batch, none, and the batch's own size
TOLERANCE = 2e-4

Steps = dict[str, str]


def check(model_type: str, class_name: str) -> dict[str, Any]:
    """Try an architecture; return step to "ok", "refused: …" or what went wrong, for LoRA and for both gates."""
    warnings.simplefilter("ignore")
    why = ""
    for variant in range(len(VARIANTS)):
        make = functools.partial(tiny_model, model_type, class_name, variant)
        try:
            inputs = batch(make(), LENGTHS[1])
            with torch.no_grad():
                outputs_of(make(), inputs)
            break
        except Exception as error:
            why = why or _said(error)
    else:
        return {"verdict": "not tried", "why": why}
    lora, unused = _lora(make, inputs)
    found = {"lora": lora, "token": _token(make, inputs, unused), "task": _task(make, inputs, unused)}
    return {"verdict": verdict(found), "unused": sorted(unused)[:1], "num_unused": len(unused), **found}


def verdict(found: dict[str, Steps]) -> str:
    """Say in a word how an architecture fares: "works", "works with a limit", "refused", "as LoRA" or "broken"."""
    ours = [step for gate in ("token", "task") for step in found[gate].values()]
    if all(step == "ok" for step in ours):
        return "works"
    if all(step == "ok" or step.startswith("refused") for step in ours):
        return "works with a limit" if found["task"].get("forward") == "ok" else "refused"
    return "as LoRA" if any(step != "ok" for step in found["lora"].values()) else "broken"


def batch(model: nn.Module, length: int, size: int = 3) -> dict[str, Tensor]:
    """Return inputs of a tiny model: `size` examples of `length` tokens, or of images or sounds."""
    names = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(length)
    config: Any = model.config
    main = getattr(model, "main_input_name", "input_ids")
    if main == "pixel_values" and "input_ids" not in names:
        return {"pixel_values": _images(config, size, generator)}
    if main in ("input_features", "input_values") and "input_ids" not in names:
        mels = getattr(config, "num_mel_bins", getattr(config, "feature_size", 16))
        frames = 2 * getattr(config, "max_source_positions", 40)
        shape = (size, mels, frames) if "decoder_input_ids" in names else (size, 40, mels)
        inputs = {main: torch.randn((size, 2000) if main == "input_values" else shape, generator=generator)}
    else:
        ids = torch.randint(4, 100, (size, length), generator=generator)
        inputs = {"input_ids": ids}
        if "attention_mask" in names:
            inputs["attention_mask"] = torch.ones_like(ids)
        if "pixel_values" in names and names["pixel_values"].default is inspect.Parameter.empty:
            inputs["pixel_values"] = _images(config, size, generator)
    if "decoder_input_ids" in names and getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.randint(4, 100, (size, 4), generator=generator)
    return inputs


def _images(config: Any, size: int, generator: torch.Generator) -> Tensor:
    vision = getattr(config, "vision_config", config)
    side = getattr(vision, "image_size", 32)
    side = side if isinstance(side, int) else side[0]
    return torch.randn((size, getattr(vision, "num_channels", 3), side, side), generator=generator)


def outputs_of(model: nn.Module, inputs: dict[str, Tensor], **kwargs: Any) -> Tensor:
    """Return a model's scores, (size, …)."""
    outputs = model(**inputs, **kwargs)
    for name in ("logits", "logits_per_image", "last_hidden_state", "prediction_logits"):
        if isinstance(found := getattr(outputs, name, None), Tensor):
            return found
    return next(value for value in outputs.values() if isinstance(value, Tensor) and value.is_floating_point())


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _try(steps: Steps, name: str, run: Callable[[], Any]) -> Any:
    try:
        result = run()
    except Exception as error:
        # Our refusals name a module or a field and say what to do; the rest is a fault.
        ours = isinstance(error, (ValueError, TypeError)) and "rank_experts" in _origin(error)
        steps[name] = ("refused: " if ours else "") + _said(error)
        return None
    steps.setdefault(name, "ok")
    return result


def _origin(error: BaseException) -> str:
    trace, last = error.__traceback__, ""
    while trace is not None:
        last, trace = trace.tb_frame.f_code.co_filename, trace.tb_next
    return last


def _train(model: nn.Module, inputs: dict[str, Tensor], **kwargs: Any) -> set[str]:
    # The layers whose adapters get no gradient.
    model.train()
    model.zero_grad()
    outputs_of(model, inputs, **kwargs).float().square().mean().backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.eval()
    return {re.split(r"\.(?:lora_[AB]|rank_experts)\.", name.removeprefix("base_model.model."))[0] for name in missing}


def _check_trained(model: nn.Module, inputs: dict[str, Tensor], unused: set[str], **kwargs: Any) -> None:
    if more := sorted(_train(model, inputs, **kwargs) - unused):
        raise AssertionError(f"no gradient reaches {more[0]}, which one of LoRA's reaches ({len(more)} in all)")


def _lora(make: Callable[[], nn.Module], inputs: dict[str, Tensor]) -> tuple[Steps, set[str]]:
    # What does not take part in this forward (a global attention, an image tower) does so for LoRA neither.
    steps: Steps = {}
    unused: set[str] = set()
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = _try(steps, "injection", lambda: get_peft_model(make(), config))
    if model is not None:
        _try(steps, "forward", lambda: outputs_of(model, inputs))
        unused = _try(steps, "training", lambda: _train(model, inputs)) or set()
        if getattr(model, "supports_gradient_checkpointing", False):
            _try(steps, "checkpointing", lambda: _checkpointed(model, inputs, {}, unused))
    return steps, unused


def _token(make: Callable[[], nn.Module], inputs: dict[str, Tensor], unused: set[str]) -> Steps:
    config = RankExpertConfig.smora(r=8, top_k=2, target_modules="all-linear", init_weights=False)
    return _gate(make, inputs, config, {}, unused)


def _task(make: Callable[[], nn.Module], inputs: dict[str, Tensor], unused: set[str]) -> Steps:
    config = RankExpertConfig.more(TASKS, r=4, target_modules="all-linear", init_weights=False, contrastive_coef=0.0)
    steps = _gate(make, inputs, config, {"task_ids": "b"}, unused)
    if steps.get("forward") != "ok":
        return steps
    model = inject_rank_experts(make(), config).eval()
    for length in LENGTHS:
        _try(steps, f"mixed tasks, length {length}", lambda length=length: _mixed(make(), model, batch(model, length)))
    _try(steps, "generation", lambda: _generate(make(), model, inputs))
    _try(steps, "merging", lambda: _merge(model, inputs))
    return steps


@torch.no_grad()
def _mixed(base: nn.Module, model: nn.Module, inputs: dict[str, Tensor]) -> None:
    try:
        outputs_of(base, inputs)
    except Exception:
        return  # The control: not every model takes every length.
    together = outputs_of(model, inputs, task_ids=torch.arange(3))
    for row, task in enumerate(TASKS):
        _equal(together[row], outputs_of(model, inputs, task_ids=task)[row], f"row {row}")


@torch.no_grad()
def _generate(base: Any, model: Any, inputs: dict[str, Tensor]) -> None:
    if not getattr(model, "can_generate", lambda: False)() or "input_ids" not in inputs:
        return
    given = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    try:
        base.generate(**given, max_new_tokens=2, do_sample=False)
    except Exception:
        return  # The control: not every model generates so.
    with use_task(model, "b"):
        model.generate(**given, max_new_tokens=2, do_sample=False)


@torch.no_grad()
def _merge(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    expected = outputs_of(model, inputs, task_ids="b")
    merge_rank_experts(model, task="b")
    _equal(outputs_of(model, inputs, task_ids="b"), expected, "merged")


def _gate(
    make: Callable[[], nn.Module],
    inputs: dict[str, Tensor],
    config: RankExpertConfig,
    task: dict[str, str],
    unused: set[str],
) -> Steps:
    steps: Steps = {}
    model = _try(steps, "injection", lambda: inject_rank_experts(make(), config).eval())
    if model is None:
        return steps
    with torch.no_grad():
        expected = _try(steps, "forward", lambda: outputs_of(model, inputs, **task))
    _try(steps, "training", lambda: _check_trained(model, inputs, unused, **task))
    if getattr(model, "supports_gradient_checkpointing", False):
        _try(steps, "checkpointing", lambda: _checkpointed(model, inputs, task, unused))
    if expected is not None:
        _try(steps, "loading", lambda: _reloaded(model, make, inputs, expected, task))
    return steps


def _checkpointed(model: Any, inputs: dict[str, Tensor], task: dict[str, str], unused: set[str]) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        _check_trained(model, inputs, unused, **task)
    finally:
        model.gradient_checkpointing_disable()


@torch.no_grad()
def _reloaded(
    model: nn.Module,
    make: Callable[[], nn.Module],
    inputs: dict[str, Tensor],
    expected: Tensor,
    task: dict[str, str],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_rank_experts(model, folder)
        loaded = load_rank_experts(make(), folder).eval()
    assert any(True for _ in adapted_layers(loaded))
    _equal(outputs_of(loaded, inputs, **task), expected, "loaded")


def _equal(found: Tensor, expected: Tensor, what: str) -> None:
    finite = expected.isfinite()
    difference = float((found - expected)[finite].abs().max()) if bool(finite.any()) else 0.0
    size = max(1.0, float(expected[finite].abs().max()) if bool(finite.any()) else 1.0)
    if not difference <= TOLERANCE * size:
        raise AssertionError(f"{what} differs by {difference:.1e} of {size:.1e}")
