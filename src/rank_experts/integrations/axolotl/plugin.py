"""What axolotl calls: its interface for adapters of plugins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftModel, get_peft_model

from ...config.equality import check_same
from ...files.loading import read_config
from ...training.callbacks import RankExpertCallback
from .settings import ADAPTER, read_settings


class RankExpertsPlugin(BasePlugin):
    """`adapter: rank_experts` in axolotl's YAML file."""

    def get_input_args(self) -> str:
        """Return where the block's schema is."""
        return "rank_experts.integrations.axolotl.arguments.RankExpertsArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        """Say which adapter the plugin makes."""
        return [AdapterCapabilities(name=ADAPTER)]

    def load_adapter(self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False) -> Any:
        """Put a new adapter into the model, or the one in `lora_model_dir`; None for other adapters.

        Raises:
            ValueError: The block is wrong, or the folder's adapter computes something else than it says.
        """
        if cfg.adapter != ADAPTER:
            return None
        config = read_settings(cfg.rank_experts).config()
        if config_only:
            return None, config
        if cfg.lora_model_dir:
            folder = Path(cfg.lora_model_dir)
            if folder.is_dir():
                check_same(folder, read_config(folder), config, "default")
            model = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference)
        else:
            model = get_peft_model(model, config)
        model.print_trainable_parameters()
        return model, config

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """Return the callback that balances the experts of a token router."""
        return [RankExpertCallback()] if cfg.adapter == ADAPTER else []
