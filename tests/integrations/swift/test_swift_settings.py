"""What `--model_kwargs` says of an adapter, and which arguments are refused. Needs no ms-swift."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rank_experts import RankExpertConfig
from rank_experts.integrations.swift.settings import check_arguments, check_rows, read_settings

SMORA = {"preset": "smora", "r": 16, "top_k": 4}
MORE = {"preset": "more", "tasks": ["cola", "rte"]}


def arguments(settings, **others):
    """The arguments that ms-swift has where nobody gives any."""
    defaults = dict(
        tuner_type="rank_experts",
        model_kwargs={} if settings is None else {"rank_experts": settings},
        adapters=[],
        resume_from_checkpoint=None,
        packing=False,
        padding_free=False,
        lora_rank=8,
        lora_alpha=32.0,
        lora_dropout=0.05,
        lora_bias="none",
        lora_dtype=None,
        lorap_lr_ratio=None,
        use_rslora=False,
        use_dora=False,
        init_weights=True,
    )
    return SimpleNamespace(**(defaults | others))


def test_each_preset_is_the_librarys():
    for settings, config in [
        (SMORA, RankExpertConfig.smora(r=16, top_k=4)),
        (MORE, RankExpertConfig.more(tasks=["cola", "rte"])),
        ({"preset": "mixture", "num_experts": 4}, RankExpertConfig.mixture(num_experts=4)),
        ({"preset": "lora", "rank_pattern": {"q_proj": 4}}, RankExpertConfig.lora(rank_pattern={"q_proj": 4})),
    ]:
        assert read_settings({"rank_experts": settings}).config() == config


def test_without_the_key_there_are_no_settings():
    assert read_settings(None) is None
    assert read_settings({"max_pixels": 1}) is None


def test_what_swift_has_options_for_joins_the_config():
    config = read_settings({"rank_experts": SMORA}).config(target_modules=["q_proj"], task_type="CAUSAL_LM")
    assert (config.target_modules, config.task_type, config.r) == ({"q_proj"}, "CAUSAL_LM", 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ('{"preset": "smora"}', "expected an object"),
        ({"r": 16}, "has no preset: expected one of 'smora', 'more', 'mixture', 'lora'"),
        ({"preset": "smorra"}, "preset='smorra': expected one of .* The nearest is 'smora'"),
        ({"preset": ["smora"]}, r"preset=\['smora'\]"),
        ({"preset": "register"}, "preset='register'"),
        (SMORA | {"top_kk": 4}, "has top_kk, which is no field of the preset 'smora'. The nearest is 'top_k'"),
        (SMORA | {"num_experts": 4}, "no field of the preset 'smora'"),
        ({"preset": "mixture", "r": 16}, "has r, which is no field of the preset 'mixture'"),
        (SMORA | {"router": "dense"}, "has router, which is not for users to set"),
        (SMORA | {"peft_type": "LORA"}, "has peft_type, which is not for users to set"),
        (SMORA | {"target_modules": ["q_proj"]}, "write --target_modules"),
        (SMORA | {"modules_to_save": ["lm_head"]}, "write --modules_to_save"),
        (SMORA | {"top_k": 17}, "'rank_experts': RankExpertConfig: top_k=17 is outside"),
        (SMORA | {"r": "16"}, "'rank_experts': r='16': expected a whole number"),
        ({"preset": "more"}, "lacks tasks"),
        (MORE | {"tasks": []}, "'rank_experts': tasks="),
        (SMORA | {"tasks": ["cola"]}, "only the task router knows tasks"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message) as refusal:
        check_arguments(arguments(settings))
    assert str(refusal.value).startswith("--model_kwargs, 'rank_experts'")


def test_good_arguments_pass():
    for settings in (SMORA, MORE):
        check_arguments(arguments(settings))
    check_arguments(arguments(SMORA, packing=True, padding_free=True))
    check_arguments(arguments(None, tuner_type="lora", lora_rank=16, packing=True))


@pytest.mark.parametrize("option", ["packing", "padding_free"])
def test_rows_of_several_tasks_are_refused(option):
    with pytest.raises(ValueError, match=f"--{option} true .* several tasks"):
        check_arguments(arguments(MORE, **{option: True}))
    with pytest.raises(ValueError, match=f"--{option} true"):
        check_rows(arguments(None, **{option: True}), ["cola"])


def test_the_tuner_needs_settings_unless_it_goes_on_with_an_adapter():
    with pytest.raises(ValueError, match="without 'rank_experts' in --model_kwargs"):
        check_arguments(arguments(None))
    check_arguments(arguments(None, resume_from_checkpoint="out/checkpoint-3"))
    check_arguments(arguments(None, adapters=["out/checkpoint-3"]))


def test_settings_need_the_tuner():
    with pytest.raises(ValueError, match="--tuner_type lora: expected --tuner_type rank_experts"):
        check_arguments(arguments(SMORA, tuner_type="lora"))


@pytest.mark.parametrize(
    ("option", "value", "instead"),
    [
        ("lora_rank", 16, "write 'r'"),
        ("lora_alpha", 16.0, "write 'alpha'"),
        ("lora_dropout", 0.0, "write 'dropout'"),
        ("lora_bias", "all", "write 'bias'"),
        ("init_weights", "pissa", "write 'init_weights'"),
        ("use_dora", True, "leave it out"),
        ("use_rslora", True, "leave it out"),
        ("lorap_lr_ratio", 4.0, "leave it out"),
        ("lora_dtype", "float16", "leave it out"),
    ],
)
def test_options_of_lora_are_refused_rather_than_ignored(option, value, instead):
    with pytest.raises(ValueError, match=f"--{option} {value}: has no effect on rank experts; {instead}"):
        check_arguments(arguments(SMORA, **{option: value}))


def test_settings_are_compared_with_the_adapter_that_training_goes_on_with():
    settings = read_settings({"rank_experts": SMORA})
    settings.check_same(RankExpertConfig.smora(r=16, top_k=4, target_modules=["q_proj"]), "out")
    for found, message in [
        (RankExpertConfig.smora(r=16, top_k=2), "says top_k=4, and the adapter of out has top_k=2"),
        (RankExpertConfig.more(tasks=["cola"], r=16), "says router='token', .* router='task'"),
    ]:
        with pytest.raises(ValueError, match=message):
            settings.check_same(found, "out")
    with pytest.raises(ValueError, match="expert_rank=8"):
        read_settings({"rank_experts": {"preset": "mixture"}}).check_same(RankExpertConfig.smora(), "out")
