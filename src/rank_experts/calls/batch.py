"""How many rows a forward has and how long they are: read where it enters a model, from the model's own inputs.

A row is what a task holds for: an example, one of its choices, or, in `generate`, one of its beams or returned
sequences. Where an example has n rows, they are side by side, and whoever names B tasks means each for n of them.
Nowhere else may tasks be fewer than rows.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor, nn

from .images import Images, images_of
from .scope import RoutingScope

_TEXT = ("input_ids", "inputs_embeds")
_OTHERS = ("decoder_input_ids", "decoder_inputs_embeds", "pixel_values", "input_features", "input_values")
_EMBEDDED = ("inputs_embeds", "decoder_inputs_embeds")
_MEMORIES = ("encoder_outputs", "encoder_hidden_states")
_NO_INPUTS = (*_MEMORIES, "attention_mask", "labels", "task_ids")


class Batch(NamedTuple):
    """What a forward's own inputs say of the rows of its layers.

    Attributes:
        num_rows: R.
        lengths: L of the rows, and of what a decoder reads from its encoder; empty where no input says it.
        images: Whose the rows of an image tower's layers are; None: they are the batch's, as any other layer's.
        said_by: The model's class and the input that said it, for messages.
        shape: That input's.
        per_example: How many rows an example has: its choices, else 1; None: any number, in `generate`.
    """

    num_rows: int
    lengths: tuple[int, ...] = ()
    images: Images | None = None
    said_by: str = ""
    shape: tuple[int, ...] = ()
    per_example: int | None = 1

    def check(self, number: int, what: str) -> None:
        """Refuse a number of task ids, or of anything else that is named by example, that does not fit the rows.

        Raises:
            ValueError: It is neither 1, nor R, nor the number of examples.
        """
        if number in (1, self.num_rows):
            return
        if number and self.num_rows % number == 0 and self.per_example in (None, self.num_rows // number):
            return
        raise ValueError(
            f"{number} {what} for {self.num_rows} rows ({self.said_by} of shape {tuple(self.shape)}). Expected one for "
            "each row of the batch, or one for all; one for each example only where the rows of an example are known: "
            "its choices (batch, choices, length), and in `generate` its beams and returned sequences. Of packed rows, "
            "each holds several examples: packing cannot mix tasks; pad instead, or pack one task a row."
        )


def read_batch(module: nn.Module, scope: RoutingScope, given: dict[str, Any]) -> Batch | None:
    """Return what a forward's arguments say of its rows, or None where they say nothing.

    Args:
        module: Whose forward it is.
        scope: Knows the model's towers, and which of its layers put the sequence first.
        given: The arguments by name.
    """
    name, main = _main_input(module, given)
    if main is None:
        return None
    said_by = f"{type(module).__name__}'s {name}"
    shape, per_example = main.shape, 1
    if name in _EMBEDDED or (name not in _TEXT + _OTHERS and name != getattr(module, "main_input_name", None)):
        # Embeddings (R, L, d), or the first argument of a module that is no transformers model, (R, L, …) or (R, d).
        if main.dim() > 2 and name not in _EMBEDDED and scope.sequence_first:
            return _of_mask(given)  # Which of the first two dimensions is the batch, no name says.
        is_ids = main.dim() == 2 and not main.is_floating_point()
        lengths = (shape[1],) if main.dim() > 2 or is_ids else ()
        num_rows = shape[0]
    elif main.is_floating_point():  # Images, or audio.
        num_rows, lengths = shape[0], ()
    else:
        # Multiple choice has ids (B, choices, L); its rows are the choices.
        num_rows, lengths, per_example = math.prod(shape[:-1]), (shape[-1],), math.prod(shape[1:-1])
    images = images_of(module, given, num_rows) if scope.towers and name in _TEXT else None
    return Batch(num_rows, lengths + _memory_lengths(given), images, said_by, shape, per_example)


def _main_input(module: nn.Module, given: dict[str, Any]) -> tuple[str, Tensor | None]:
    # Text before all, because the tasks of a model that reads text and images are those of its texts.
    for name in (*_TEXT, getattr(module, "main_input_name", ""), *_OTHERS):
        if isinstance(value := given.get(name), Tensor) and value.dim():
            return name, value
    for name, value in given.items():
        if isinstance(value, Tensor) and value.dim() and name not in _NO_INPUTS:
            return name, value
    return "", None


def _of_mask(given: dict[str, Any]) -> Batch | None:
    mask = given.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    return Batch(mask.shape[0], (mask.shape[1],), None, "attention_mask", mask.shape)


def _memory_lengths(given: dict[str, Any]) -> tuple[int, ...]:
    for name in _MEMORIES:
        memory = given.get(name)
        if memory is not None and not isinstance(memory, Tensor):
            memory = memory[0]
        if isinstance(memory, Tensor) and memory.dim() == 3:
            return (memory.shape[1],)
    return ()
