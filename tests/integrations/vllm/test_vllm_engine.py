"""Adapters of every gate in a real vLLM, against transformers; and what is refused while it lives on."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

pytest.importorskip("vllm")

from vllm_models import (
    ADAPTERS,
    NAMES,
    PROMPTS,
    SIZES,
    TASKS,
    assert_same,
    generate,
    make_adapter,
    make_base,
    request,
    sampling,
    start_for_adapters,
)

from rank_experts import RankExpertConfig, export_loras, load_rank_experts

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def llm(folder):
    # Fewer slots and fewer places in memory than adapters, so that both are given away and taken back.
    engine = start_for_adapters(folder, max_loras=3, max_cpu_loras=4)
    yield engine
    engine.llm_engine.engine_core.shutdown()


def answers(llm, folder, name, prompts=PROMPTS):
    return generate(llm, folder, [name], prompts)[0]


def lives(llm, folder, expected):
    assert_same(answers(llm, folder, "token", PROMPTS[:1]), expected("token")[:1])


def test_the_adapters_differ(expected):
    tokens = [[text.tokens for text in expected(name)] for name in (None, "lora", *NAMES)]
    assert all(tokens.count(own) == 1 for own in tokens)


def test_every_gate_in_one_call_beside_base_and_lora_requests(llm, folder, expected):
    names = [None, "token", "lora", *NAMES[1:]]
    for name, found in zip(names, generate(llm, folder, names, PROMPTS), strict=True):
        assert_same(found, expected(name))


def test_slots_and_prefixes_that_were_used_before(llm, folder, expected):
    prompts = [PROMPTS[2] * 4 + tail for tail in ([3], [4, 5])]  # longer than a block of the cache
    for name in ("token", None, "biased", "token", "softmax", "blocks", "lora", "dense", "token"):
        first, again = generate(llm, folder, [name, name], prompts)
        assert_same(again, first)
        assert_same(answers(llm, folder, name, PROMPTS[:2]), expected(name)[:2])


def test_a_prompt_in_several_pieces(llm, folder):
    from vllm_models import by_transformers

    prompts = [[(7 * i + 3 * j) % 127 + 1 for i in range(100)] for j in range(4)]  # together more than a batch
    for name in ("token", "task?task=rte"):
        assert_same(answers(llm, folder, name, prompts), by_transformers(folder, name, prompts))


def test_a_head_routed_by_task(llm, folder, expected):
    assert_same(answers(llm, folder, "head?task=cola"), expected("head?task=cola"))


def test_exported_loras(llm, folder, expected):
    """What `export_loras` writes needs no plugin: one LoRA a task, with an lm_head too."""
    for name in ("task", "head"):
        model = load_rank_experts(AutoModelForCausalLM.from_pretrained(folder / "base"), folder / name)
        export_loras(model, folder / f"{name} exported")
        for task in TASKS:
            found = answers(llm, folder, f"{name} exported/{task}")
            assert_same(found, expected(f"{name}?task={task}"))


def edited(folder, name, change):
    """A copy of the token-routed adapter, changed, and without the digest that would tell."""
    copy = folder / name
    shutil.copytree(folder / "token", copy)
    file = copy / "adapter_model.safetensors"
    tensors = load_file(file)
    change(copy, tensors)
    if file.exists():
        save_file(tensors, file)


def rewrite(copy, **values):
    file = copy / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def first(tensors, name):
    return next(key for key in sorted(tensors) if key.endswith(name))


def without_layer(copy, tensors):
    rewrite(copy, target_modules=["q_proj", "up_proj"])
    for key in [
        key for key in tensors if "layers.1.mlp.up_proj" in key or ("q_proj" not in key and "up_proj" not in key)
    ]:
        del tensors[key]


def renamed(copy, tensors):
    for key in sorted(tensors):
        tensors[key.replace("layers.1.", "layers.7.")] = tensors.pop(key)


BAD = {
    "not finite": (lambda copy, t: t[first(t, "A")].fill_(torch.nan), "values that are not finite"),
    "a wrong shape": (lambda copy, t: t.update({first(t, "B"): torch.zeros(3, 16)}), "which adapts|lacks|outputs"),
    "a missing tensor": (lambda copy, t: t.pop(first(t, "B")), "lacks B of"),
    "a missing layer": (without_layer, r"lacks model\.layers\.1\.mlp\.up_proj, which its config targets"),
    "an unknown layer": (renamed, r"adapts model\.layers\.7\..*, which is none of the layers"),
    "no JSON": (lambda copy, t: (copy / "adapter_config.json").write_text("{"), "is not JSON"),
    "no weights": (lambda copy, t: (copy / "adapter_model.safetensors").unlink(), "holds no adapter_model"),
    "unknown field": (lambda copy, t: rewrite(copy, colour="red"), r"unknown fields \['colour'\]"),
    "a newer format": (lambda copy, t: rewrite(copy, format_version=99), "format_version"),
    "top_k": (lambda copy, t: rewrite(copy, top_k=99), "top_k=99 is outside 1…16"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_adapter_is_refused_and_the_engine_lives(kind, llm, folder, expected):
    change, message = BAD[kind]
    edited(folder, kind, change)
    for _ in range(2):
        with pytest.raises(Exception, match=message):
            llm.generate({"prompt_token_ids": [1]}, sampling(), use_tqdm=False, lora_request=request(folder, kind))
    with pytest.raises(Exception, match=message):
        llm.llm_engine.add_lora(request(folder, kind))
    lives(llm, folder, expected)


UNSUITABLE = {
    "ranks": (
        RankExpertConfig.smora(r=24, target_modules=["q_proj"]),
        "rank 24, more than max_lora_rank=16.*at least 24",
    ),
    "lm_head": (RankExpertConfig.smora(r=16, target_modules=["lm_head"]), "lm_head is routed by token, and a Logits"),
    "saved": (RankExpertConfig.smora(r=16, target_modules=["q_proj"], modules_to_save=["lm_head"]), "modules_to_save"),
    "biases": (RankExpertConfig.smora(r=16, target_modules=["q_proj"], bias="all"), "trained biases"),
}


@pytest.mark.parametrize("kind", UNSUITABLE)
def test_an_unsuitable_adapter_is_refused_by_name_and_the_engine_lives(kind, llm, folder, expected):
    config, message = UNSUITABLE[kind]
    make_adapter(folder / "base", folder / kind, config)
    with pytest.raises(Exception, match=message):
        llm.generate({"prompt_token_ids": [1]}, sampling(), use_tqdm=False, lora_request=request(folder, kind))
    lives(llm, folder, expected)


def test_an_adapter_of_another_model_is_refused(llm, folder, expected, tmp_path):
    base = make_base(tmp_path / "base")
    LlamaForCausalLM(LlamaConfig(**(SIZES | {"intermediate_size": 256}))).save_pretrained(base)
    make_adapter(base, folder / "wider", ADAPTERS["token"])
    with pytest.raises(Exception, match=r"adapts model\.layers\.0.mlp.* 256 .*the model's has"):
        answers(llm, folder, "wider")
    lives(llm, folder, expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("task", r"is routed by task\. It knows \['cola', 'mnli', 'rte'\]"),
        ("task?task=rta", "has no task 'rta'. The nearest is 'rte'"),
        ("token?task=rte", "knows no tasks"),
        ("nowhere?task=rte", "nowhere"),
        ("nowhere", "No adapter found for"),
    ],
)
def test_a_task_or_folder_that_is_not_there_is_refused(name, message, llm, folder, expected):
    with pytest.raises(Exception, match=message):
        answers(llm, folder, name)
    lives(llm, folder, expected)


def test_one_bad_name_in_a_call_leaves_no_request_behind(llm, folder, expected):
    with pytest.raises(Exception, match="is routed by task"):
        generate(llm, folder, ["token", None, "task"], PROMPTS)
    assert not llm.llm_engine.has_unfinished_requests()
    lives(llm, folder, expected)


def test_a_folder_that_changes_while_it_is_served(llm, folder, expected):
    base, copy = folder / "base", folder / "changing"
    shutil.copytree(folder / "token", copy)
    assert_same(answers(llm, folder, "changing"), expected("token"))
    # The same weights again: served as before.
    shutil.rmtree(copy)
    shutil.copytree(folder / "token", copy, copy_function=shutil.copyfile)
    assert_same(answers(llm, folder, "changing"), expected("token"))
    # Others of the same layout, of another layout, bad ones, and none: only the first can do no harm.
    make_adapter(base, copy, ADAPTERS["token"], seed=9)
    answers(llm, folder, "changing")
    make_adapter(base, copy, ADAPTERS["biased"])
    with pytest.raises(Exception, match="holds another adapter than the one that was loaded as 'changing'"):
        answers(llm, folder, "changing")
    (copy / "adapter_config.json").write_text("{")
    with pytest.raises(Exception, match="is not JSON"):
        answers(llm, folder, "changing")
    shutil.rmtree(copy)
    with pytest.raises(Exception, match="has gone"):
        answers(llm, folder, "changing")
    for name in NAMES:  # until its place has gone to others
        assert_same(answers(llm, folder, name, PROMPTS[:1]), expected(name)[:1])
    shutil.copytree(folder / "token", copy)
    assert_same(answers(llm, folder, "changing"), expected("token"))
