"""An adapter as part of the model, in a real vLLM: compiled, with two processes, and what is refused."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from vllm_models import PROMPTS, TASKS, assert_same, by_transformers, generate, make_adapter, make_base, start

from rank_experts import RankExpertConfig

pytestmark = pytest.mark.vllm


def loaded(folder, adapter, **kwargs):
    extra = {} if adapter is None else {"adapter": f"{folder}/{adapter}"}
    return start(folder, load_format="rank_experts", model_loader_extra_config=extra, **kwargs)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("token", {}),  # compiled
        ("task?task=rte", {"enforce_eager": True}),
        ("blocks", {"model_impl": "transformers", "enforce_eager": True}),
    ],
)
def test_every_request_gets_the_adapter(name, options, folder, expected):
    llm = loaded(folder, name, **options)
    try:
        assert_same(generate(llm, folder, [None], PROMPTS)[0], expected(name))
    finally:
        llm.llm_engine.engine_core.shutdown()


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_two_processes(kind, folder, expected, monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    if kind == "phi3":
        config = RankExpertConfig.smora(r=16, top_k=4, target_modules="all-linear", init_weights=False)
        make_adapter(make_base(tmp_path / "base", kind), tmp_path / "biased", config)
    home = folder if kind == "llama" else tmp_path
    llm = loaded(home, "biased", tensor_parallel_size=2, enforce_eager=True)
    try:
        wanted = expected("biased") if kind == "llama" else by_transformers(home, "biased", PROMPTS)
        assert_same(generate(llm, home, [None], PROMPTS)[0], wanted)
    finally:
        llm.llm_engine.engine_core.shutdown()


def test_what_does_not_fit_is_refused_before_the_model_is_built(folder):
    from vllm.config.load import LoadConfig

    from rank_experts.integrations.vllm.loader import RankExpertsLoader

    def refused(extra, message):
        with pytest.raises(ValueError, match=message):
            RankExpertsLoader(LoadConfig(load_format="rank_experts", model_loader_extra_config=extra))

    refused({}, "needs the adapter's folder")
    refused({"adapter": f"{folder}/task"}, "is routed by task")
    refused({"adapter": f"{folder}/token", "unknown": 1}, "unknown")
    assert RankExpertsLoader(LoadConfig(model_loader_extra_config={"adapter": f"{folder}/task?task={TASKS[0]}"})).served


def test_layers_that_are_not_served_are_refused_by_name(folder, capfd):
    with pytest.raises(Exception, match="Engine core initialization failed"):
        loaded(folder, "head?task=rte", enforce_eager=True)
    assert "head adapts lm_head, no linear layers of LlamaForCausalLM in vLLM" in "".join(capfd.readouterr())
