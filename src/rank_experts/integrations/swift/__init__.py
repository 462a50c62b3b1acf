"""Training rank experts with ms-swift: what `swift sft --external_plugins` loads.

ms-swift takes a file's path there. `python -m rank_experts.integrations.swift` prints the one of the installed package:

    swift sft --tuner_type rank_experts --external_plugins "$(python -m rank_experts.integrations.swift)" \
        --model_kwargs '{"rank_experts": {"preset": "smora", "r": 16, "top_k": 4}}' ...

The files, from the ground: `settings.py` (what `--model_kwargs` says → a config), `channels.py` (a row's channel → its
task), `tuner.py` (a model with an adapter), `trainer.py` (ms-swift's arguments and trainer with both), and
`plugin/rank_experts_swift.py` (the file to name). It lies in a folder of its own because ms-swift puts the file's
folder before all others on the import path. The first two import nothing of ms-swift.
"""

from __future__ import annotations

from pathlib import Path

TUNER = "rank_experts"
"""What `--tuner_type` calls it."""


def plugin_file() -> Path:
    """Return the file for `--external_plugins`.

    Example:
        >>> plugin_file().name
        'rank_experts_swift.py'
    """
    return Path(__file__).parent / "plugin" / "rank_experts_swift.py"


def register() -> None:
    """Register the tuner and its trainer with ms-swift; doing it again changes nothing.

    Raises:
        RuntimeError: Another plugin has put its own trainer in the place that ours takes.
    """
    from . import trainer, tuner  # here, because they import ms-swift

    tuner.register()
    trainer.register()
