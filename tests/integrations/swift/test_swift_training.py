"""ms-swift's command lines: `sft`, resuming, `infer` and `export`. `make works-with-swift` runs this."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rank_experts import load_rank_experts

pytestmark = pytest.mark.trainers
pytest.importorskip("swift")

from swift_runs import (  # noqa: E402
    MORE,
    SMORA,
    TASKS,
    VOCAB,
    load_base,
    logged,
    make_base,
    passed,
    refused,
    sft,
    sft_arguments,
    swift,
    write_rows,
)

IDS = torch.arange(4, 4 + 24).reshape(4, 6) % VOCAB
TASK_IDS = torch.tensor([0, 1, 1, 0])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    return {
        "mixed": write_rows(folder / "mixed.jsonl", channels=TASKS),
        "without": write_rows(folder / "without.jsonl", count=4),
        "some_without": write_rows(folder / "some_without.jsonl", channels=["upper", "lower", None]),
        "upper": write_rows(folder / "upper.jsonl", channels=["upper"]),
        "unknown": write_rows(folder / "unknown.jsonl", channels=["upper", "title"]),
    }


@pytest.fixture(scope="module")
def smora(base, rows, tmp_path_factory):
    return sft(base, rows["mixed"], tmp_path_factory.mktemp("smora"), SMORA)


@pytest.fixture(scope="module")
def more(base, rows, tmp_path_factory):
    options = dict(val_dataset=rows["mixed"], eval_strategy="steps", eval_steps=3)
    return sft(base, rows["mixed"], tmp_path_factory.mktemp("more"), MORE, **options)


@torch.no_grad()
def logits(model, **inputs):
    return model(input_ids=IDS, **inputs).logits


def infer(checkpoint, rows, out, *options):
    """Generate greedily; return each row's answer and its log-probabilities."""
    arguments = ["--load_data_args", "false", "--val_dataset", rows, "--max_new_tokens", 6, "--temperature", 0]
    arguments += ["--result_path", out, "--max_batch_size", 4, "--logprobs", "true", *options]
    passed(swift("infer", "--adapters", checkpoint, *arguments))
    return [json.loads(line) for line in out.read_text().splitlines()]


def assert_generates(answers, model, task_ids=None):
    """What was inferred is what the model generates, log-probabilities included."""
    for i, answer in enumerate(answers):
        prompt = answer["messages"][-2]["content"]
        ids = torch.tensor([[int(word[1:]) for word in prompt.split()]])
        routed = {} if task_ids is None else {"task_ids": task_ids[i : i + 1]}
        with torch.no_grad():
            own = model(input_ids=ids, **routed).logits[0, -1].log_softmax(-1)
        first = answer["logprobs"]["content"][0]
        assert first["token"].strip() == f"w{own.argmax().item()}"
        assert first["logprob"] == pytest.approx(own.max().item(), abs=1e-4)


def test_a_token_gate_is_trained_and_balanced_and_loads_both_ways(base, smora):
    losses = [entry["loss"] for entry in logged(smora) if "loss" in entry]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert all("load_cv" in entry for entry in logged(smora) if "loss" in entry)
    biases = [value for name, value in load_file(smora / "adapter_model.safetensors").items() if "balance_bias" in name]
    assert len(biases) == 14
    assert all(bias.abs().max() > 0.005 for bias in biases)
    ours = logits(load_rank_experts(load_base(base), smora).eval())
    assert torch.equal(ours, logits(PeftModel.from_pretrained(load_base(base), smora).eval()))
    assert not torch.allclose(ours, logits(load_base(base)), atol=1e-3)


def test_a_task_gate_is_trained_by_channel_and_loads_both_ways(base, more):
    assert all("auxiliary_loss" in entry for entry in logged(more) if "loss" in entry)
    assert [entry["step"] for entry in logged(more) if "eval_loss" in entry] == [3, 6]
    own = load_rank_experts(load_base(base), more).eval()
    ours = logits(own, task_ids=TASK_IDS)
    theirs = PeftModel.from_pretrained(load_base(base), more).eval()
    assert torch.equal(ours, logits(theirs, task_ids=TASK_IDS))
    assert not torch.allclose(ours, logits(own, task_ids=1 - TASK_IDS), atol=1e-4)


@pytest.mark.parametrize("preset", ["smora", "more"])
def test_resuming_ends_where_an_uninterrupted_training_does(preset, base, rows, request, tmp_path):
    whole = request.getfixturevalue(preset)
    settings = {"smora": SMORA, "more": None}[preset]  # they may be left out
    shutil.copytree(whole.parent / "checkpoint-3", tmp_path / "checkpoint-3")
    options = dict(resume_from_checkpoint=tmp_path / "checkpoint-3")
    if preset == "more":
        options |= dict(val_dataset=rows["mixed"], eval_strategy="steps", eval_steps=3)
    resumed = sft(base, rows["mixed"], tmp_path / "out", settings, **options)
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (whole, resumed))
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=0, msg=name)


def test_a_token_gate_infers(base, smora, rows, tmp_path):
    answers = infer(smora, rows["mixed"], tmp_path / "out.jsonl")
    assert_generates(answers, load_rank_experts(load_base(base), smora).eval())


def test_a_task_gate_infers_by_channel(base, more, rows, tmp_path):
    answers = infer(more, rows["mixed"], tmp_path / "out.jsonl")
    ids = torch.tensor([TASKS.index(answer["channel"]) for answer in answers])
    assert_generates(answers, load_rank_experts(load_base(base), more).eval(), ids)


def test_a_task_gate_infers_for_a_named_task(base, more, rows, tmp_path):
    answers = infer(more, rows["without"], tmp_path / "out.jsonl", "--model_kwargs", '{"rank_experts_task": "lower"}')
    ids = torch.ones(len(answers), dtype=torch.long)
    assert_generates(answers, load_rank_experts(load_base(base), more).eval(), ids)


def test_inferring_without_a_task_says_how_to_name_one(more, rows):
    arguments = ["--load_data_args", "false", "--val_dataset", rows["without"], "--max_new_tokens", 2]
    said = refused(swift("infer", "--adapters", more, *arguments))
    assert "expected one of 'upper', 'lower'" in said
    assert "rank_experts_task" in said


def test_exporting_merges_for_a_named_task(base, more, tmp_path):
    options = ["--merge_lora", "true", "--output_dir", tmp_path / "merged"]
    passed(swift("export", "--adapters", more, *options, "--model_kwargs", '{"rank_experts_task": "lower"}'))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    expected = logits(load_rank_experts(load_base(base), more).eval(), task_ids=torch.ones(4, dtype=torch.long))
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("preset", ["smora", "more"])
def test_exporting_what_has_no_static_form_is_refused(preset, request, tmp_path):
    options = ["--merge_lora", "true", "--output_dir", tmp_path / "merged"]
    said = refused(swift("export", "--adapters", request.getfixturevalue(preset), *options))
    assert {"smora": "no exact static form", "more": "task"}[preset] in said
    assert not (tmp_path / "merged").exists()


class TestInOneProcess:
    """What `sft_main`, which the command line calls, does: starting a process for each would take minutes."""

    @pytest.fixture
    def weightless(self, base, tmp_path):
        """A base model that cannot be loaded: what comes before that is refused in time."""
        return shutil.copytree(base, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))

    def sft(self, base, rows, out, settings, **options):
        from swift import sft_main

        sft_main([str(part) for part in sft_arguments(base, rows, out, settings, **options)])

    @pytest.mark.parametrize("mode", ["in_memory", "streaming"])
    def test_only_the_tasks_of_the_rows_are_trained(self, mode, base, rows, tmp_path):
        options = {"in_memory": {}, "streaming": {"streaming": "true", "dataset_shuffle": "false"}}[mode]
        self.sft(base, rows["upper"], tmp_path / "out", MORE | {"contrastive_coef": 0}, **options)
        before, after = (
            load_file(tmp_path / "out" / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (3, 6)
        )
        embeddings = [name for name in after if name.endswith("task_embedding")]
        assert len(embeddings) == 14
        for name in embeddings:
            assert not torch.equal(after[name][0], before[name][0])
            assert torch.equal(after[name][1], before[name][1])

    def test_auxiliary_losses_are_trained_where_swift_computes_the_loss(self, base, rows, tmp_path):
        for coef in (0.0, 10.0):
            options = dict(enable_channel_loss="true", max_steps=3)
            self.sft(base, rows["upper"], tmp_path / str(coef), MORE | {"contrastive_coef": coef}, **options)
        without, trained = (
            load_file(tmp_path / coef / "checkpoint-3" / "adapter_model.safetensors") for coef in ("0.0", "10.0")
        )
        # Only the contrastive loss reaches the embedding of a task that no row has.
        for name in (name for name in trained if name.endswith("task_embedding")):
            assert not torch.equal(trained[name][1], without[name][1])

    @pytest.mark.parametrize(
        ("settings", "options", "message"),
        [
            ({"preset": "smorra"}, {}, "preset='smorra'.*The nearest is 'smora'"),
            (SMORA | {"top_kk": 2}, {}, "has top_kk.*The nearest is 'top_k'"),
            (SMORA | {"top_k": 99}, {}, "top_k=99 is outside"),
            (None, {}, "without 'rank_experts' in --model_kwargs"),
            (SMORA, {"tuner_type": "lora"}, "expected --tuner_type rank_experts"),
            (SMORA, {"lora_rank": 16}, "--lora_rank 16: has no effect"),
            (MORE, {"packing": "true", "attn_impl": "flash_attention_2"}, "--packing true"),
            (MORE, {"padding_free": "true", "attn_impl": "flash_attention_2"}, "--padding_free true"),
        ],
    )
    def test_before_the_model_is_loaded(self, settings, options, message, weightless, rows, tmp_path):
        with pytest.raises(ValueError, match=message):
            self.sft(weightless, rows["mixed"], tmp_path / "out", settings, **options)

    @pytest.mark.parametrize(
        ("which", "message"),
        [
            ("without", "no \"channel\", .*expected one of 'upper', 'lower'"),
            ("some_without", 'no "channel"'),
            ("unknown", "'title', which is no task: expected one of 'upper', 'lower'"),
        ],
    )
    def test_rows_whose_task_is_not_known(self, which, message, base, rows, tmp_path):
        with pytest.raises(ValueError, match=message):
            self.sft(base, rows[which], tmp_path / "out", MORE)

    def test_rows_of_a_stream_whose_task_is_not_known(self, base, rows, tmp_path):
        with pytest.raises(ValueError, match="'title', which is no task"):
            self.sft(base, rows["unknown"], tmp_path / "out", MORE, streaming="true", dataset_shuffle="false")

    def test_resuming_an_adapter_that_the_settings_do_not_describe(self, base, rows, smora, tmp_path):
        checkpoint = smora.parent / "checkpoint-3"
        with pytest.raises(ValueError, match=r"says top_k=2, and the adapter of .*checkpoint-3 has top_k=4"):
            self.sft(
                base, rows["mixed"], tmp_path / "out", SMORA | {"top_k": 2}, resume_from_checkpoint=str(checkpoint)
            )

    def test_another_kind_of_training(self, base, rows, tmp_path):
        with pytest.raises(ValueError, match="'seq_cls': expected `swift sft`"):
            self.sft(base, rows["mixed"], tmp_path / "out", SMORA, task_type="seq_cls", num_labels=2)

    def test_another_plugins_trainer_is_not_replaced(self, monkeypatch):
        from swift.trainers import TrainerFactory

        from rank_experts.integrations.swift import register

        register()
        register()
        monkeypatch.setitem(TrainerFactory.TRAINER_MAPPING, "causal_lm", "theirs.Trainer")
        with pytest.raises(RuntimeError, match=r"Another plugin trains 'causal_lm' with theirs\.Trainer"):
            register()

    def test_another_tuner_trains_as_ever_beside_the_plugin(self, base, rows, tmp_path):
        self.sft(base, rows["without"], tmp_path / "out", None, tuner_type="lora")
        assert (tmp_path / "out" / "checkpoint-6" / "adapter_model.safetensors").exists()
