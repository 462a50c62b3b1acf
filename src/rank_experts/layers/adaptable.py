"""Which modules can be adapted, and what is said of those that cannot."""

from __future__ import annotations

import ast
import inspect
import textwrap

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

# Mixers of transformers that hand these layers' weights to a fused kernel, at least on a GPU, and layers whose weights
# go to torch's attention. Named, because nothing of the modules themselves tells.
_READ_BY = {
    "MambaMixer": ("x_proj", "dt_proj", "out_proj"),
    "FalconMambaMixer": ("x_proj", "dt_proj", "out_proj"),
    "JambaMambaMixer": ("dt_proj",),
    "Mamba2Mixer": ("out_proj",),
    "FalconH1Mixer": ("out_proj",),
    "NemotronHMamba2Mixer": ("out_proj",),
    "BambaMixer": ("out_proj",),
    "Zamba2MambaMixer": ("out_proj",),
    "GraniteMoeHybridMambaLayer": ("out_proj",),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
}


def in_out_features(module: nn.Module, path: str) -> tuple[int, int]:
    """Return d_in and d_out of a layer that the library can adapt.

    Args:
        module: The base layer.
        path: Its place in the model, for the message.

    Raises:
        TypeError: It is not a linear layer.

    Example:
        >>> in_out_features(nn.Linear(16, 8), "proj")
        (16, 8)
    """
    if isinstance(module, Conv1D):
        d_in, d_out = module.weight.shape
        return int(d_in), int(d_out)
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(module, nn.Linear) or (all(isinstance(size, int) for size in sizes) and _takes_one_input(module)):
        return sizes  # type: ignore[return-value]
    if stacked := stacked_experts(module):
        names = [f"{path.rpartition('.')[2]}.{name}" for name in stacked]
        raise TypeError(
            f"{path} is a {type(module).__name__}, a mixture of experts with the 3-D parameters {stacked}, which are "
            f"no linear layers. Leave it out of target_modules, and name its parameters: target_parameters={names}."
        )
    raise TypeError(
        f"{path} is a {type(module).__name__}: rank experts adapt nn.Linear, transformers' Conv1D, and layers of other "
        "libraries that have in_features and out_features and are called with one input. Leave it out of "
        "target_modules, or put it into exclude_modules."
    )


def why_unusable(module: nn.Module, name: str, parent: nn.Module) -> str:
    """Say why an adapter of a linear layer would never be used, or could not be; "" where nothing is known against it.

    Args:
        module: The layer.
        name: What its parent calls it.
        parent: The module that holds it.

    Example:
        >>> attention = nn.MultiheadAttention(8, 2)
        >>> why_unusable(attention.out_proj, "out_proj", attention)
        'MultiheadAttention reads its weight and never calls it'
    """
    if isinstance(module, NonDynamicallyQuantizableLinear) or name in _READ_BY.get(type(parent).__name__, ()):
        return f"{type(parent).__name__} reads its weight and never calls it"
    if isinstance(module, nn.Linear) and _returns_tuple(type(module)):
        return f"{type(module).__name__} returns several values"
    return ""


def _returns_tuple(kind: type[nn.Module]) -> bool:
    if kind.forward is nn.Linear.forward:
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    except (OSError, TypeError, SyntaxError):  # compiled, or written at a prompt
        return False
    return any(isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple) for node in ast.walk(tree))


def stacked_experts(module: nn.Module) -> list[str]:
    """Return the names of a module's own 3-D parameters: how transformers keeps a mixture's experts.

    Example:
        >>> stacked_experts(nn.Linear(2, 2))
        []
    """
    return [name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3]


def _takes_one_input(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    required = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return len(required) <= 1
