"""Print the file for `--external_plugins`: `python -m rank_experts.integrations.swift`."""

from . import plugin_file

print(plugin_file())
