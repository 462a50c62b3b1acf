"""What a layer computes with when it is served, against what the adapted layer computes. Needs no vLLM."""

from __future__ import annotations

import pytest
import torch

from helpers import CONFIGS, TASKS, dense_config, task_config, token_config
from models import llama, mixtral
from rank_experts import inject_rank_experts, save_rank_experts, use_task
from rank_experts.files.reading import read_adapter_files
from rank_experts.integrations.vllm.served import served_layers, split_task
from rank_experts.integrations.vllm.slots import SlotGates

LAYER = "model.layers.0.mlp.up_proj"
KINDS = {
    "dense": (dense_config(alpha_pattern={"up_proj": 5}, rank_pattern={"up_proj": 3}), None),
    "token": (token_config(), None),
    "softmax": (token_config(score_function="softmax"), None),
    "biased": (token_config(biased_gates=True, alpha_pattern={"up_proj": 5}), None),
    "blocks": (CONFIGS["blocks"](), None),
    **{f"task, {scaling}": (task_config(rank_scaling=scaling), "mnli") for scaling in ("linear", "quadratic", "none")},
    "projected": (task_config(task_embedding_dim=8), "rte"),
}


def saved(folder, config, model=llama):
    model = inject_rank_experts(model(), config).eval()
    torch.manual_seed(1)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "balance_bias" in name or "gate_bias" in name:
            tensor.data.uniform_(-0.2, 0.2)
    save_rank_experts(model, folder)
    return model


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_served_layer_computes_what_the_adapted_layer_does(kind, tmp_path):
    config, task = KINDS[kind]
    model = saved(tmp_path, config)
    served = served_layers(read_adapter_files(tmp_path), task)
    assert len(served) == 14
    A, B, gate = served[LAYER]
    x = torch.randn(33, 32)
    u = x @ A.t()
    if gate is not None:
        slots = SlotGates(slots=1, slices=1, d_in=32, max_rank=16)
        slots.set(0, [gate])
        u = u * slots(x, torch.zeros(33, dtype=torch.int64))[0]
    layer = model.get_submodule(LAYER)
    if task is None:
        expected = layer(x)
    else:
        with use_task(model, task):
            expected = layer(x)
    update = expected - layer.base_layer(x)
    assert update.abs().max() > 0.1
    torch.testing.assert_close(u @ B.t(), update, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_task_keeps_the_ranks_that_it_uses(tmp_path):
    model = saved(tmp_path, task_config())
    ranks = {}
    for task in TASKS:
        layer = served_layers(read_adapter_files(tmp_path), task)[LAYER]
        ranks[task] = len(layer.A)
        assert layer.B.shape[1] == len(layer.A)
        assert layer.B.abs().amin() > 0
    assert len(set(ranks.values())) > 1, "the test needs tasks of different ranks"
    assert model is not None


def test_the_tasks_name_comes_after_the_folder():
    assert split_task("a/b?task=rte") == ("a/b", "rte")
    assert split_task("a/b") == ("a/b", None)
    assert split_task("a?b?task=c?task=d") == ("a?b", "c?task=d")


@pytest.mark.parametrize(
    ("config", "task", "message"),
    [
        (task_config(), None, r"is routed by task\. It knows \['cola', 'mnli', 'rte'\]: ask .*\?task=cola"),
        (task_config(), "", "is routed by task"),
        (task_config(), "rta", r"has no task 'rta'\. The nearest is 'rte'\. It knows"),
        (token_config(), "rte", "is routed by 'token' and knows no tasks"),
        (dense_config(), "rte", "is routed by 'dense' and knows no tasks"),
        (token_config(modules_to_save=["norm"]), None, r"has modules of its own \(modules_to_save=\['norm'\]\)"),
        (token_config(bias="rank_experts_only"), None, r"has trained biases \(bias='rank_experts_only'\)"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(config, task, message, tmp_path):
    saved(tmp_path, config)
    with pytest.raises(ValueError, match=message):
        served_layers(read_adapter_files(tmp_path), task)


def test_a_mixtures_experts_are_refused_by_name(tmp_path):
    saved(tmp_path, token_config(target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"]), mixtral)
    with pytest.raises(ValueError, match="adapts the experts of a mixture"):
        served_layers(read_adapter_files(tmp_path), None)


def test_embeddings_beside_the_adapter_are_refused_by_name(tmp_path):
    saved(tmp_path, token_config())
    files = read_adapter_files(tmp_path)
    resized = {"base_model.model.model.embed_tokens.weight": torch.zeros(70, 32)}
    with pytest.raises(ValueError, match=r"holds base_model\.model\.model\.embed_tokens\.weight, no adapter's"):
        served_layers(files._replace(others=resized), None)
    frozen = {f"base_model.model.{LAYER}.base_layer.weight": torch.zeros(48, 32)}
    assert served_layers(files._replace(others=frozen), None)


def test_the_only_task_may_be_left_out(tmp_path):
    saved(tmp_path, task_config(tasks=["rte"]))
    assert served_layers(read_adapter_files(tmp_path), None)
