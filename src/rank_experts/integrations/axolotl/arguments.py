"""The block `rank_experts:` as a part of axolotl's schema."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, model_validator

from .settings import check


class RankExpertsArgs(BaseModel):
    """`rank_experts: {preset: smora, r: 64, top_k: 8}`: a preset's name, its fields, `task_column` and `prompt`."""

    rank_experts: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _checked(cls, data: Any) -> Any:
        if isinstance(data, dict):
            check(
                data | {kind: [_plain(each) for each in data.get(kind) or []] for kind in ("datasets", "test_datasets")}
            )
        return data


def _plain(dataset: Any) -> Any:
    # axolotl may have read a dataset's entry already.
    return dataset.model_dump() if isinstance(dataset, BaseModel) else dataset
