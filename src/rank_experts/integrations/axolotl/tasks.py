"""A dataset's `type:` that keeps the task of each row: `type: rank_experts.integrations.axolotl.tasks`.

axolotl drops the data's columns when it makes tokens of a row. This type makes the tokens by another one of axolotl's
(`rank_experts.prompt`, "completion" unless told otherwise) and adds `task_ids`, which the collators pad into (B,) and
hand to the model.
"""

from __future__ import annotations

from typing import Any

from axolotl import prompt_strategies

from .settings import Settings, read_settings, task_id


class TaskStrategy:
    """One of axolotl's ways to make tokens of rows, with the rows' task ids beside them.

    Args:
        inner: That way.
        settings: Names the column and the tasks.
    """

    supports_batched = True

    def __init__(self, inner: Any, settings: Settings) -> None:
        self.inner = inner
        self.settings = settings

    def __getattr__(self, name: str) -> Any:
        if name in ("inner", "settings"):  # Not there yet, while it is unpickled.
            raise AttributeError(name)
        return getattr(self.inner, name)

    def tokenize_prompt(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Return columns of tokens; a text that is cut into several has one task.

        Raises:
            ValueError: A row does not name its task.
        """
        found: dict[str, list[Any]] = {}
        for values in zip(*rows.values(), strict=True):
            row = dict(zip(rows, values))
            own = task_id(row, self.settings)
            if self.inner.supports_batched:
                columns = self.inner.tokenize_prompt({name: [value] for name, value in row.items()})
            else:
                columns = {name: [value] for name, value in self.inner.tokenize_prompt(row).items()}
            columns = dict(columns) | {"task_ids": [own] * len(columns["input_ids"])}
            for name, column in columns.items():
                found.setdefault(name, []).extend(column)
        return found


def load(tokenizer: Any, cfg: Any, ds_cfg: Any = None, processor: Any = None) -> TaskStrategy:
    """Return the strategy for a dataset; what axolotl calls."""
    settings = read_settings(cfg.rank_experts)
    inner = prompt_strategies.load(settings.prompt, tokenizer, cfg, ds_cfg, processor)
    if inner is None:
        raise ValueError(f"rank_experts.prompt is {settings.prompt!r}: axolotl has no dataset type of that name.")
    return TaskStrategy(inner, settings)
