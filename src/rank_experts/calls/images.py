"""Whose images they are, in a model that reads text and images in one call.

An image tower's layers see images, or the patches of all images in one list, where the text's layers see rows. That
numbers coincide says nothing: three images for three texts may all be the first one's. Whose they are is taken from the
model's own inputs:

- one image a text, where the model has no image tokens (CLIP in training, BLIP, LayoutLM) and there are as many;
- else each text holds as many image tokens as its images take up, in the images' order: every image as many (LLaVA,
  PaliGemma, Gemma 3), or those of its grid (`image_grid_thw`: Qwen's).

Everything else is not known, and refused where tasks differ.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_PIXELS = ("pixel_values", "pixel_values_videos")
_OTHER_MODALITIES = (*_PIXELS, "input_features", "input_values", "audio_values")
_TOKENS = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id", "audio_token_index")


class Images(NamedTuple):
    """Whose the rows of an image tower's layers are.

    Attributes:
        owners: For each number of rows (the first dimension) that a layer of the tower may have, the row of the batch
            that each belongs to, int64.
        why_not: Why nothing is known, for messages; owners is empty then.
    """

    owners: tuple[tuple[int, Tensor], ...] = ()
    why_not: str = ""


def find_towers(model: nn.Module) -> tuple[str, ...]:
    """Return the paths of a model's parts that see images (or audio) and no text: its towers, and what connects them.

    A tower is a model of its own within the model. What stands beside it in the same module, and is neither text's nor
    the model's head, connects it: a projector.
    """
    names = {module: path for path, module in model.named_modules()}
    towers = {path for path, module in _parts(model, names) if _is_tower(module)}
    for modality in ("image", "video", "audio"):
        if (tower := _encoder(model, modality)) is not None and tower is not model and names.get(tower):
            towers.add(names[tower])
    towers = {path for path in towers if not any(path.startswith(f"{other}.") for other in towers)}
    texts = [path for path, module in _parts(model, names) if not _is_tower(module)]
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = None if get_head is None else get_head()
    connecting = set()
    for parent in {tower.rpartition(".")[0] for tower in towers}:
        for name, sibling in model.get_submodule(parent).named_children():
            path = f"{parent}.{name}" if parent else name
            is_text = any(f"{text}.".startswith(f"{path}.") for text in texts)
            holds_tower = any(f"{tower}.".startswith(f"{path}.") for tower in towers)
            if not is_text and not holds_tower and sibling is not head:
                connecting.add(path)
    return tuple(sorted(towers | connecting))


def _parts(model: nn.Module, names: dict[nn.Module, str]) -> list[tuple[str, nn.Module]]:
    # transformers' models within the model, which say themselves what they read.
    return [(path, module) for module, path in names.items() if path and hasattr(module, "input_modalities")]


def _is_tower(module: Any) -> bool:
    modalities = module.input_modalities
    modalities = (modalities,) if isinstance(modalities, str) else modalities
    main = getattr(module, "main_input_name", "input_ids")
    return "text" not in modalities or main in _OTHER_MODALITIES


def _encoder(model: Any, modality: str) -> nn.Module | None:
    try:
        found = model.get_encoder(modality=modality)
    except (AttributeError, TypeError):  # No transformers model, or one whose get_encoder knows one encoder only.
        return None
    return found if isinstance(found, nn.Module) else None


def images_of(module: nn.Module, given: dict[str, Any], num_rows: int) -> Images | None:
    """Return whose the images of a call are; None: the rows' own, one each, or there are none.

    Args:
        module: The model that was called.
        given: Its arguments by name.
        num_rows: R, of its text.
    """
    found = [name for name in _OTHER_MODALITIES if isinstance(given.get(name), Tensor)]
    if not found:
        return None
    config = getattr(module, "config", None)
    has_tokens = any(getattr(config, name, None) is not None for name in _TOKENS)
    if len(found) > 1:
        return Images(why_not=f"it was given {' and '.join(found)} at once")
    pixels = given[found[0]]
    if not has_tokens:
        if pixels.shape[0] == num_rows:
            return None
        return Images(why_not=f"{num_rows} texts came with {pixels.shape[0]} of {found[0]}, and no token says whose")
    kind = "image" if found[0] == "pixel_values" else "video"
    token = getattr(config, f"{kind}_token_id", None)
    token = getattr(config, f"{kind}_token_index", None) if token is None else token
    if found[0] not in _PIXELS or token is None or not isinstance(given.get("input_ids"), Tensor):
        return Images(why_not=f"whose {found[0]} they are is known only for images whose tokens are in input_ids")
    ends = (given["input_ids"] == token).reshape(num_rows, -1).sum(1).cumsum(0)
    if isinstance(grid := given.get(f"{kind}_grid_thw"), Tensor):
        return _of_grid(config, pixels, grid.to(ends.device), ends)
    if pixels.dim() != 4 or given.get("image_sizes") is not None or kind == "video":
        return Images(why_not=f"{found[0]} of shape {tuple(pixels.shape)} do not say which image is whose")
    return _of_equal_images(pixels.shape[0], ends)


def _of_equal_images(num_images: int, ends: Tensor) -> Images | None:
    # Every image takes up as many tokens. On an accelerator nothing is read back: a check there ends the process.
    if not num_images:
        return None
    each = ends[-1] // num_images
    fits = ((ends % each.clamp(min=1)) == 0).all() & (each * num_images == ends[-1]) & (each > 0)
    return _checked(fits, [(num_images, _owner(ends, torch.arange(num_images, device=ends.device) * each))])


def _of_grid(config: Any, pixels: Tensor, grid: Tensor, ends: Tensor) -> Images:
    merge = getattr(getattr(config, "vision_config", None), "spatial_merge_size", 1) ** 2
    num_patches = pixels.shape[0]
    patches = grid.prod(-1)
    tokens = patches // merge
    starts = tokens.cumsum(0) - tokens
    of_image = _owner(ends, starts)
    # An image's tokens end within the row in which they start.
    fits = (_owner(ends, starts + tokens - 1) == of_image).all() & (tokens.sum() == ends[-1])
    of_patch = of_image.repeat_interleave(patches, output_size=num_patches)
    # A merger sees merge² patches of an image as one row.
    return _checked(fits, [(num_patches, of_patch), (num_patches // merge, of_patch[::merge])])


def _owner(ends: Tensor, places: Tensor) -> Tensor:
    return torch.searchsorted(ends, places, right=True).clamp(max=ends.shape[0] - 1)


def _checked(fits: Tensor, owners: list[tuple[int, Tensor]]) -> Images:
    if torch.compiler.is_compiling():
        return Images(tuple(owners))
    if fits.device.type == "cpu":
        if not bool(fits):
            return Images(why_not="the image tokens in input_ids do not match the images")
    else:
        torch._assert_async(fits, "rank_experts: the image tokens in input_ids do not match the images")
    return Images(tuple(owners))
