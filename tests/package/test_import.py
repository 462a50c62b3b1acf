"""What importing the package pulls in, and what it offers."""

from __future__ import annotations

import subprocess
import sys

import rank_experts

HEAVY = ("transformers.trainer", "triton", "matplotlib", "datasets", "trl", "tensorboard", "pydantic", "sklearn")


def test_importing_stays_light():
    # Compared with peft, which the package cannot do without and which decides what itself imports.
    code = (
        "import sys, peft; before = set(sys.modules); import rank_experts; "
        f"print([name for name in {HEAVY!r} if name in set(sys.modules) - before])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


def test_importing_does_not_initialise_cuda():
    code = "import rank_experts, torch; print(torch.cuda.is_initialized())"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "False"
    )


def test_public_names_exist_and_are_documented():
    for name in rank_experts.__all__:
        assert getattr(rank_experts, name).__doc__ or name == "__version__", name


def test_a_config_needs_no_registration():
    """The package's `__init__`, which registers, is stepped around."""
    code = (
        "import importlib.util, sys, types; package = types.ModuleType('rank_experts'); "
        "package.__path__ = importlib.util.find_spec('rank_experts').submodule_search_locations; "
        "sys.modules['rank_experts'] = package; from rank_experts.config.config import RankExpertConfig; "
        "from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING; "
        "print(RankExpertConfig().peft_type, 'RANK_EXPERTS' in PEFT_TYPE_TO_TUNER_MAPPING)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (found.stdout.split(), found.returncode) == (["PeftType.RANK_EXPERTS", "False"], 0), found.stderr


def test_peft_knows_the_method_once():
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from rank_experts.registration import register

    register()
    assert PeftType("RANK_EXPERTS") is PeftType.RANK_EXPERTS
    assert list(PeftType).count(PeftType.RANK_EXPERTS) == 1
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.RANK_EXPERTS] is rank_experts.RankExpertConfig
