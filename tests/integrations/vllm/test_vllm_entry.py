"""How vLLM finds the plugin, and that nothing of vLLM is imported before it does. Needs no vLLM."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[3]


def run(code, **environment):
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_entry_point_names_what_is_there():
    from rank_experts.integrations import vllm

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["rank_experts"].partition(":")
    assert (module, name) == (vllm.__name__, "register")
    assert callable(vllm.register)


def test_the_extra_asks_for_the_versions_that_are_tested():
    from rank_experts.integrations.vllm.hooks import TESTED

    (extra,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["vllm"]
    assert extra == f"vllm>={TESTED[0]},<{TESTED[1]}"


NOTHING = """
import importlib.abc, sys

class Refused(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] != "vllm", name

sys.meta_path.insert(0, Refused())
import rank_experts
from rank_experts.integrations import vllm
import rank_experts.integrations.vllm.served, rank_experts.integrations.vllm.slots
print("imported")
%s
"""


def test_importing_the_library_and_the_plugin_imports_no_vllm():
    assert run(NOTHING % "") == "imported\n"


def test_the_switch_turns_it_off():
    assert run(NOTHING % "vllm.register(); print('off')", RANK_EXPERTS_VLLM="0") == "imported\noff\n"
