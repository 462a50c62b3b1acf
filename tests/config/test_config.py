"""The configuration: presets, validation, and the way through JSON."""

from __future__ import annotations

import json

import pytest
from peft import PeftConfig

from rank_experts import RankExpertConfig


def test_presets_have_the_values_of_their_papers():
    assert RankExpertConfig.smora() == RankExpertConfig(router="token", r=64, top_k=8, alpha=16)
    more = RankExpertConfig.more(tasks=["a", "b"])
    assert more == RankExpertConfig(
        router="task", tasks=["a", "b"], r=8, alpha=32, rank_scaling="linear", contrastive_coef=0.1
    )
    assert more.contrastive_temperature == 0.05
    assert RankExpertConfig.lora() == RankExpertConfig(router="dense", r=8, alpha=16)
    mixture = RankExpertConfig.mixture()
    assert mixture == RankExpertConfig(router="token", r=64, expert_rank=8, top_k=2, alpha=16)
    assert mixture.num_experts == 8


def test_presets_change_sizes_and_the_router_alone():
    """A default is the same in the config and in its presets; only MoRE's paper names another alpha."""
    own = {"r", "router", "tasks", "top_k", "expert_rank"}
    defaults = RankExpertConfig().to_dict()
    for preset, more in (
        (RankExpertConfig.smora(), set()),
        (RankExpertConfig.mixture(), set()),
        (RankExpertConfig.lora(), set()),
        (RankExpertConfig.more(tasks=["a"]), {"alpha"}),
    ):
        differing = {name for name, value in preset.to_dict().items() if value != defaults[name]}
        assert differing <= own | more


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 17, "r": 16}, r"top_k=17 is outside 1…16"),
        ({"top_k": 3, "r": 16, "expert_rank": 8}, r"top_k=3 is outside 1…2"),
        ({"r": 10, "expert_rank": 4, "top_k": 1}, r"r=10 is not a multiple of expert_rank=4.*r=8 or r=12"),
        ({"r": 0}, r"r=0: expected at least 1"),
        ({"top_k": 0}, r"top_k=0: expected at least 1"),
        ({"router": "tokens"}, r"router='tokens': expected one of .*The nearest is 'token'"),
        ({"score_function": "relu"}, r"score_function='relu'"),
        ({"dropout": 1.0}, r"dropout=1.0: expected a number from 0 up to, not including, 1"),
        ({"alpha": float("nan")}, r"alpha=nan"),
        ({"alpha": float("inf")}, r"alpha=inf"),
        ({"contrastive_temperature": 0.0}, r"contrastive_temperature=0"),
        ({"tasks": ["a"]}, r"only the task router knows tasks"),
        ({"router": "task"}, r"needs a list of at least one task name"),
        ({"router": "task", "tasks": []}, r"needs a list of at least one task name"),
        ({"router": "task", "tasks": "rte"}, r"needs a list of at least one task name"),
        ({"router": "task", "tasks": ["a", "b", "a"]}, r"'a' stands there more than once"),
        ({"layers_pattern": "layers"}, r"needs layers_to_transform"),
        ({"target_modules": ".*q", "layers_to_transform": [0]}, r"cannot be used with target_modules"),
    ],
)
def test_values_out_of_range_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        RankExpertConfig(**changes)


@pytest.mark.parametrize(
    "changes",
    [{"r": 8.0}, {"r": True}, {"top_k": "8"}, {"alpha": "16"}, {"biased_gates": 1}, {"router": "task", "tasks": [1]}],
)
def test_values_of_the_wrong_type_are_refused(changes):
    with pytest.raises(TypeError, match=next(iter(changes))[:5] if "tasks" not in changes else "tasks"):
        RankExpertConfig(**changes)


def test_survives_peft_save_and_load(tmp_path):
    config = RankExpertConfig.more(tasks=["b", "a"], target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 4})
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, RankExpertConfig)
    assert loaded == config
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "RANK_EXPERTS"
