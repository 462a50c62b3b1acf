"""Training rank experts with axolotl: `adapter: rank_experts` and a block `rank_experts:` in its YAML file.

    plugins:
      - rank_experts.integrations.axolotl.RankExpertsPlugin
    adapter: rank_experts
    rank_experts: {preset: smora, r: 16, top_k: 4}

The files, from the ground: `settings.py` (the block → a config), `tasks.py` (a column of the data → task ids),
`arguments.py` (the block as a part of axolotl's own schema), `plugin.py` (what axolotl calls). The first imports
nothing of axolotl, and nothing else of the library imports the others.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "RankExpertsPlugin":
        from .plugin import RankExpertsPlugin  # here, because it imports axolotl

        return RankExpertsPlugin
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
