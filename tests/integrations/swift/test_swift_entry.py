"""The file that `--external_plugins` names; nothing of ms-swift is imported before it is. Needs no ms-swift."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from rank_experts.integrations.swift import plugin_file

NOTHING = """
import importlib.abc, sys

class Refused(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] != "swift", name

sys.meta_path.insert(0, Refused())
import rank_experts
import rank_experts.integrations.swift.settings, rank_experts.integrations.swift.channels
print("imported")
"""


def run(*command):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_command_prints_the_file_and_nothing_else():
    printed = run("-m", "rank_experts.integrations.swift")
    assert printed == f"{plugin_file()}\n"
    assert Path(printed.strip()).is_file()


def test_importing_the_settings_imports_no_swift():
    assert run("-c", NOTHING) == "imported\n"


def test_the_files_folder_hides_no_other_module():
    # ms-swift puts it before all others on the import path: a file vllm.py in it would be what `import vllm` finds.
    found = {path.stem for path in plugin_file().parent.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert found - {"__pycache__"} == {"__init__", "rank_experts_swift"}
