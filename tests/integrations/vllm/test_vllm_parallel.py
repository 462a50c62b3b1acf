"""Two tensor-parallel processes, fused projections and vLLM's other backend, with adapters as requests name them."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("vllm")

from vllm_models import (
    ADAPTERS,
    NAMES,
    PROMPTS,
    assert_same,
    by_transformers,
    generate,
    make_adapter,
    make_base,
    start_for_adapters,
)

from rank_experts import RankExpertConfig

pytestmark = pytest.mark.vllm
FUSED = {
    "token": RankExpertConfig.smora(r=16, top_k=4, alpha=8, target_modules="all-linear", init_weights=False),
    "blocks": RankExpertConfig.mixture(
        num_experts=4, expert_rank=4, top_k=2, target_modules=["qkv_proj", "gate_up_proj"], init_weights=False
    ),
}


@pytest.fixture
def two_processes(monkeypatch):
    # One core each; vLLM finds that many by itself only where the machine has as many memory nodes.
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    return {"tensor_parallel_size": 2}


@pytest.fixture
def start():
    engines = []

    def started(folder, **kwargs):
        engines.append(start_for_adapters(folder, **kwargs))
        return engines[-1]

    yield started
    for engine in engines:
        engine.llm_engine.engine_core.shutdown()


def test_two_processes_compute_the_same_and_refuse_together(folder, expected, start, two_processes):
    llm = start(folder, **two_processes)
    for name, found in zip([None, *NAMES], generate(llm, folder, [None, *NAMES], PROMPTS), strict=True):
        assert_same(found, expected(name))
    make_adapter(folder / "base", folder / "other layers", ADAPTERS["token"])
    config = folder / "other layers" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    make_adapter(folder / "base", folder / "head by token", RankExpertConfig.smora(r=16, target_modules=["lm_head"]))
    for _ in range(2):
        # What one process says against it must not be left for the next call.
        with pytest.raises(Exception, match="lm_head is routed by token"):
            generate(llm, folder, ["head by token"], PROMPTS[:1])
        assert_same(
            generate(llm, folder, ["other layers"], PROMPTS[:1])[0],
            by_transformers(folder, "other layers", PROMPTS[:1]),
        )
        assert llm.llm_engine.list_loras()


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    """A base whose q, k and v are one layer on the disk as well, as are gate and up."""
    folder = tmp_path_factory.mktemp("fused")
    make_base(folder / "base", "phi3")
    for name, config in FUSED.items():
        make_adapter(folder / "base", folder / name, config)
    return folder


@pytest.mark.parametrize("processes", [1, 2])
def test_projections_that_are_fused_on_the_disk(processes, fused, start, monkeypatch):
    if processes == 2:
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    llm = start(fused, tensor_parallel_size=processes)
    names = [None, *FUSED]
    for name, found in zip(names, generate(llm, fused, names, PROMPTS), strict=True):
        assert_same(found, by_transformers(fused, name, PROMPTS))


def test_the_transformers_backend_with_one_slot(folder, expected, start):
    # With one slot, vLLM's operators for CPUs would give base requests the adapter's update.
    llm = start(folder, model_impl="transformers", max_loras=1)
    for name in ("token", "biased", "task?task=rte"):
        base, own = generate(llm, folder, [None, name], PROMPTS)
        assert_same(base, expected(None))
        assert_same(own, expected(name))
