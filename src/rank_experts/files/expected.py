"""Which tensors an adapter's file must hold for a model, which it may, and the comparison with what it does hold."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path

from peft.utils.other import AuxiliaryTrainingWrapper, _get_module_names_tied_with_embedding
from torch import Tensor, nn

from ..config.config import RankExpertConfig
from ..storage.pair import WEIGHTS_FILE, check_tensor, parse_weights, read_weights
from ..tuner.targets import Target
from .embeddings import embedding_weights
from .layout import PREFIX, tensor_shapes
from .state import without_adapter


def expected_tensors(
    model: nn.Module, config: RankExpertConfig, targets: dict[str, Target]
) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes that an adapter's file must hold for a model.

    Args:
        model: The base model.
        config: The adapter's.
        targets: From `find_targets`.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path, target in targets.items():
        own = tensor_shapes(config, target.r, target.d_in, target.d_out)
        shapes |= {f"{PREFIX}{path}.rank_experts.{name}": shape for name, shape in own.items()}
    shapes.update(_saved_modules(model, config))
    shapes.update(_trained_tokens(model, config))
    shapes.update(_biases(model, config, targets))
    return shapes


def optional_tensors(
    model: nn.Module, config: RankExpertConfig, targets: dict[str, Target]
) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes that PEFT may write beside the adapter's own.

    Whole embeddings, where a target is one of them or the vocabulary was resized, and with bias="all" a second copy
    of the biases within modules_to_save.

    Args:
        model: The base model.
        config: The adapter's.
        targets: From `find_targets`.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path, weight in embedding_weights(model):
        inner = "base_layer.weight" if path in targets else "weight"
        shapes[f"{PREFIX}{path}.{inner}"] = tuple(weight.shape)
    if config.bias == "all":
        for key, shape in _saved_modules(model, config).items():
            path, _, leaf = key.rpartition(".")
            if leaf == "bias":
                shapes |= {f"{path}.modules_to_save.bias": shape, f"{path}.original_module.bias": shape}
    return shapes


def integer_tensors(model: nn.Module, config: RankExpertConfig) -> set[str]:
    """Return which tensors of an adapter's file hold integers or truth values: buffers of modules_to_save."""
    return {key for key, tensor in _modules_to_save(model, config) if not tensor.is_floating_point()}


def _modules_to_save(model: nn.Module, config: RankExpertConfig) -> Iterator[tuple[str, Tensor]]:
    for path, module in model.named_modules():
        if any(path == name or path.endswith(f".{name}") for name in config.modules_to_save or ()):
            # Another adapter may have wrapped it already.
            original = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module
            for key, tensor in original.state_dict().items():
                yield f"{PREFIX}{path}.{key}", tensor


def _saved_modules(model: nn.Module, config: RankExpertConfig) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in _modules_to_save(model, config)}


def _trained_tokens(model: nn.Module, config: RankExpertConfig) -> dict[str, tuple[int, ...]]:
    # As PEFT's `set_additional_trainable_modules` wraps them: one delta for layers that are tied and train the same.
    if (tokens := config.trainable_token_indices) is None:
        return {}
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    paths = {path: module for path, module in model.named_modules() if not path.endswith(".token_adapter.base_layer")}
    source = next(path for path, module in paths.items() if module is embedding)
    wanted = tokens if isinstance(tokens, dict) else {source: tokens}
    found = {
        path: own
        for name, own in wanted.items()
        for path in paths
        if (path == name or path.endswith(f".{name}")) and ".original_module" not in path
    }
    tied = set(_get_module_names_tied_with_embedding(model)) if source in found else set()
    return {
        f"{PREFIX}{path}.token_adapter.trainable_tokens_delta": (len(own), paths[path].weight.shape[1])
        for path, own in found.items()
        if path not in tied or own != found[source]
    }


def _biases(model: nn.Module, config: RankExpertConfig, targets: dict[str, Target]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    if config.bias == "none":
        return shapes
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        if leaf == "bias" and (config.bias == "all" or path in targets):
            key = f"{path}.base_layer.bias" if path in targets else name
            shapes[PREFIX + key] = tuple(parameter.shape)
    return shapes


def read_tensors(
    folder: Path,
    expected: dict[str, tuple[int, ...]],
    config: RankExpertConfig,
    optional: dict[str, tuple[int, ...]] | None = None,
    integers: Collection[str] = (),
) -> dict[str, Tensor]:
    """Read an adapter's tensors and compare them with what is expected; see `check_tensors`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or does not hold what is expected.
    """
    weights = read_weights(folder, check=partial(check_shapes, folder, config, expected, optional or {}))
    return check_tensors(folder, weights, expected, config, optional, integers)


def check_tensors(
    folder: Path,
    weights: bytes,
    expected: dict[str, tuple[int, ...]],
    config: RankExpertConfig,
    optional: dict[str, tuple[int, ...]] | None = None,
    integers: Collection[str] = (),
) -> dict[str, Tensor]:
    """Parse a safetensors file and compare it with what is expected.

    Args:
        folder: Where it lies, for messages.
        weights: Its bytes.
        expected: Name to shape.
        config: The adapter's, for messages.
        optional: Name to shape of what may be there too.
        integers: Names of the tensors that are not floating-point.

    Returns:
        Name to tensor.

    Raises:
        ValueError: It is damaged, or tensors are missing, unexpected, of another shape or dtype, or not finite.
    """
    file = folder / WEIGHTS_FILE
    tensors = parse_weights(file, weights)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = check_shapes(folder, config, expected, optional or {}, found)
    tensors = {name: tensor for name, tensor in tensors.items() if name in expected}
    for name, shape in expected.items():
        check_tensor(f"{file}: {name}", tensors[name], shape, name not in integers)
    for name in tensors:
        copied = name.removesuffix(".modules_to_save.bias") + ".bias"
        if name.endswith(".modules_to_save.bias") and bool((tensors[name] != tensors[copied]).any()):
            raise ValueError(f"{file}: {name} and {copied} are two copies of one tensor and differ. Save it again.")
    return tensors


def check_shapes(
    folder: Path,
    config: RankExpertConfig,
    expected: dict[str, tuple[int, ...]],
    optional: dict[str, tuple[int, ...]],
    found: dict[str, tuple[int, ...]],
) -> dict[str, tuple[int, ...]]:
    """Return what is expected and, of the optional, what is there; `ValueError` where a file holds anything else."""
    file = folder / WEIGHTS_FILE
    trained_on = f" The adapter was trained on {config.base_model_name_or_path!r}: is this that model?"
    hint = trained_on if config.base_model_name_or_path else " Is this the model that the adapter was trained on?"
    if missing := sorted(expected.keys() - found.keys()):
        raise ValueError(f"{file} lacks {_few(missing)}.{hint}")
    expected = expected | {name: shape for name, shape in optional.items() if name in found}
    others = {name for name in found if without_adapter(name) not in expected}
    if unexpected := sorted(others - expected.keys()):
        raise ValueError(f"{file} holds unexpected tensors: {_few(unexpected)}.{hint}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise ValueError(f"{file}: {name} has shape {found[name]}, expected {shape}.{hint}")
    return expected


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
