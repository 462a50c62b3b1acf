"""A row's `channel`, ms-swift's own name for what part of the data it is from, is its task.

Imports nothing of ms-swift.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...messages import nearest

DEFAULT = "RANK_EXPERTS_TASK"
"""The environment variable that names the task of requests without a channel, and of merging.

ms-swift sets it for `--model_kwargs '{"rank_experts_task": "rte"}'`.
"""


def channel_ids(channels: Sequence[str | None] | None, tasks: Sequence[str], rows: int) -> list[int]:
    """Return the ids of the tasks that a batch's channels name.

    Args:
        channels: One a row; None: no row has any. Where there is one task, a row need not name it.
        tasks: The adapter's, in the order of their ids.
        rows: How many rows the batch has.

    Raises:
        ValueError: A row has no channel, or one that is no task.

    Example:
        >>> channel_ids(["rte", "cola"], ["cola", "rte"], rows=2)
        [1, 0]
    """
    given = [None] * rows if channels is None else list(channels)
    if len(given) != rows:
        raise ValueError(f"{len(given)} channels for {rows} rows: expected one a row. Packed rows hold several tasks.")
    return [_task_id(channel, tasks) for channel in given]


def _task_id(channel: str | None, tasks: Sequence[str]) -> int:
    if channel is None and len(tasks) == 1:
        return 0
    listed = ", ".join(map(repr, tasks))
    if channel is None:
        raise ValueError(f'A row has no "channel", which names its task: expected one of {listed}.')
    if channel not in tasks:
        hint = nearest(channel, tasks) if isinstance(channel, str) else ""
        raise ValueError(f'A row has "channel": {channel!r}, which is no task: expected one of {listed}.{hint}')
    return tasks.index(channel)


def check_dataset(dataset: Any, tasks: Sequence[str]) -> None:
    """Check all rows of a dataset that ms-swift has loaded; a stream is checked as it comes.

    Raises:
        ValueError: A row has no channel, or one that is no task.
    """
    rows = getattr(dataset, "dataset", dataset)  # ms-swift's LazyLLMDataset encodes the rows of another one
    if not hasattr(rows, "unique"):
        return
    for channel in rows.unique("channel") if "channel" in rows.column_names else [None]:
        _task_id(channel, tasks)


def default_task(name: str, tasks: Sequence[str]) -> str | None:
    """Check the task that `DEFAULT` names; an empty name is none.

    Raises:
        ValueError: There is no such task.
    """
    if name and name not in tasks:
        listed = ", ".join(map(repr, tasks)) or "no tasks: the adapter does not route by task"
        raise ValueError(f"{DEFAULT}={name!r}: expected one of {listed}.{nearest(name, tasks)}")
    return name or None


def generate_by_channel(generate: Callable[..., Any], tasks: Sequence[str], default: str | None) -> Callable[..., Any]:
    """Return a model's `generate` that takes ms-swift's `channel`, one a row, and routes by it.

    ms-swift hands a request's channel on to `generate`, where no model knows it.

    Args:
        generate: The model's own.
        tasks: The adapter's; none: the channels do not matter.
        default: The task of rows without a channel.
    """

    @functools.wraps(generate)
    def routed(*args: Any, channel: Sequence[str | None] | None = None, **kwargs: Any) -> Any:
        if tasks and kwargs.get("task_ids") is None:
            kwargs["task_ids"] = _ids_of_requests(channel, tasks, default, _rows(args, kwargs))
        return generate(*args, **kwargs)

    return routed


def _ids_of_requests(
    channels: Sequence[str | None] | None, tasks: Sequence[str], default: str | None, rows: int
) -> Tensor:
    given = [None] * rows if channels is None else list(channels)
    try:
        return torch.tensor(channel_ids([channel or default for channel in given], tasks, rows))
    except ValueError as error:
        raise ValueError(
            f'{error} Give the rows a "channel", or name one task for all that have none: '
            f'--model_kwargs \'{{"{DEFAULT.lower()}": "{tasks[0]}"}}\', or {DEFAULT}={tasks[0]} in the environment.'
        ) from None


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    inputs = [*args[:1], *(kwargs.get(name) for name in ("input_ids", "inputs_embeds", "inputs", "attention_mask"))]
    return next(len(tensor) for tensor in inputs if isinstance(tensor, Tensor))
