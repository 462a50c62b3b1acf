"""What the plugin replaces in vLLM: that it is there, what is said where it is not, and what vLLM's options forbid."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("vllm")

import vllm
from vllm.config.lora import LoRAConfig
from vllm.lora import utils
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.worker_manager import WorkerLoRAManager

from rank_experts.files.reading import read_adapter_files
from rank_experts.integrations.vllm import hooks
from rank_experts.integrations.vllm.fitting import check_limits
from rank_experts.integrations.vllm.served import served_layers

pytestmark = pytest.mark.vllm


@pytest.fixture(autouse=True)
def _installed():
    hooks.install()


def test_every_name_is_there():
    hooks.check_names()
    assert {hook.module.partition(".")[0] for hook in (*hooks.REPLACED, *hooks.RELIED_ON)} == {"vllm"}


@pytest.mark.parametrize(
    ("place", "name", "said"),
    [
        (utils, "_all_lora_classes", r"vllm\.lora\.utils\._all_lora_classes"),
        (WorkerLoRAManager, "_load_adapter", r"WorkerLoRAManager\._load_adapter"),
        (BaseLinearLayerWithLoRA, "_apply_lora_to_output", r"BaseLinearLayerWithLoRA\._apply_lora_to_output"),
    ],
)
def test_a_name_that_has_gone_is_said(place, name, said, monkeypatch):
    monkeypatch.delattr(place, name)
    with pytest.raises(RuntimeError, match=f"lacks what its plugin needs: .*{said}.*RANK_EXPERTS_VLLM=0"):
        hooks.install()


def test_an_attribute_that_has_gone_is_said(monkeypatch):
    from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

    monkeypatch.setattr(PunicaWrapperBase, "__init__", lambda self: None)
    with pytest.raises(RuntimeError, match=r"the attribute _token_lora_indices of vllm\..*PunicaWrapperBase"):
        hooks.check_names()


def test_an_untested_version_gets_one_warning(monkeypatch, recwarn):
    hooks.check_version()
    assert not recwarn
    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    with pytest.warns(UserWarning, match=r"tested with vllm 0\.32 up to, not including, 0\.33; found 0\.33\.1"):
        hooks.check_version()
    hooks.check_version()
    assert not recwarn


def test_installing_twice_changes_nothing():
    before = (utils._all_lora_classes, WorkerLoRAManager._load_adapter)
    hooks.install()
    assert (utils._all_lora_classes, WorkerLoRAManager._load_adapter) == before
    assert [cls.__name__ for cls in utils._all_lora_classes].count("GatedMergedQKV") == 1


def test_the_switch_leaves_vllm_as_it_is():
    code = "from vllm.plugins import load_general_plugins; load_general_plugins(); from vllm.lora import utils; "
    code += "print([cls.__name__ for cls in utils._all_lora_classes if cls.__module__.startswith('rank_experts')])"
    found = {}
    for switch in ("0", "1"):
        environment = os.environ | {"RANK_EXPERTS_VLLM": switch}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        found[switch] = done.stdout.splitlines()[-1]
    assert found["0"] == "[]"
    assert "GatedRow" in found["1"]


def limits(folder, name, **kwargs):
    files = read_adapter_files(folder / name.partition("?")[0])
    config = LoRAConfig(**(dict(max_lora_rank=16, max_loras=1, max_cpu_loras=1, lora_dtype=torch.float32) | kwargs))
    return lambda: check_limits(files, served_layers(files, name.partition("=")[2] or None), config)


def test_options_that_would_skip_a_gate_are_refused_by_name(folder, monkeypatch):
    for name in ("token", "task?task=rte", "dense"):
        limits(folder, name)()
    with pytest.raises(ValueError, match=r"routed by token, which --fully-sharded-loras does not allow"):
        limits(folder, "token", fully_sharded_loras=True)()
    with pytest.raises(ValueError, match=r"rank 16, more than max_lora_rank=8"):
        limits(folder, "token", max_lora_rank=8)()
    routed = limits(folder, "blocks")
    # These are plain LoRAs to vLLM, whatever its path.
    plain = [limits(folder, name, fully_sharded_loras=True) for name in ("task?task=rte", "dense")]
    monkeypatch.setenv("VLLM_LORA_ENABLE_DUAL_STREAM", "1")  # which vLLM itself allows with CUDA alone
    with pytest.raises(ValueError, match=r"VLLM_LORA_ENABLE_DUAL_STREAM=1 computes LoRA on a path that has no gate"):
        routed()
    for check in plain:
        check()
