"""The command line, end to end on tiny models."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainerCallback

from rank_experts import load_rank_experts, merge_rank_experts
from rank_experts.assemble import build_trainer
from rank_experts.heads import load_classifier
from rank_experts.report import inspect_adapter
from rank_experts.tasks import TaskSampler
from rank_experts_cli import main
from recipes import write_recipe


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path)


def inputs():
    return {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}


def test_train_evaluate_inspect_and_merge_a_classifier(recipe, capsys):
    folder = recipe.parent
    out = folder / "out"
    assert main(["train", str(recipe)]) == 0
    trained = capsys.readouterr().out
    assert "mean" in trained
    assert {"adapter_config.json", "heads.json", "tokenizer.json", "recipe.yaml"} <= set(os.listdir(out))

    assert main(["evaluate", str(recipe), "--json", str(folder / "metrics.json")]) == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    assert f"mean   {metrics['eval_mean']:.4f}" in trained

    capsys.readouterr()
    assert main(["inspect", str(out)]) == 0
    report = inspect_adapter(out)
    assert capsys.readouterr().out == report.to_text()
    assert report.facts["head first"] == "no, yes"
    assert main(["inspect", str(out), "--json", "--html", str(folder / "page.html")]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(report.to_dict()))
    assert (folder / "page.html").read_text() == report.to_html()

    merged = folder / "merged"
    assert main(["merge", str(out), str(merged), "--task", "last"]) == 0
    base = load_rank_experts(AutoModel.from_pretrained(folder / "model"), out)
    adapted = load_classifier(base, out).eval()
    plain = load_classifier(AutoModel.from_pretrained(merged), merged).eval()
    ids = torch.tensor([1])
    torch.testing.assert_close(plain(**inputs(), task_ids=ids).logits, adapted(**inputs(), task_ids=ids).logits)
    assert not torch.equal(plain(**inputs(), task_ids=ids).logits, adapted(**inputs(), task_ids=ids * 0).logits)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_train_and_evaluate_text(tmp_path, kind, capsys):
    recipe = write_recipe(tmp_path, kind, "smora")
    assert main(["train", str(recipe)]) == 0
    first = capsys.readouterr().out
    assert "exact_match" in first
    assert main(["evaluate", str(recipe)]) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("first", "last", "mean"))]
    assert len(shown) == 3
    assert all(line in first for line in shown)


def test_export_a_lora(tmp_path, capsys):
    recipe = write_recipe(tmp_path, "causal")
    assert main(["train", str(recipe)]) == 0
    lora = tmp_path / "lora"
    assert main(["export", str(tmp_path / "out"), str(lora), "--task", "first"]) == 0
    exported = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), lora).eval()
    model = load_rank_experts(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "out")
    merge_rank_experts(model.eval(), task="first")
    torch.testing.assert_close(exported(**inputs()).logits, model(**inputs()).logits)


def test_a_token_router_is_exported_with_calibration_and_not_merged(tmp_path, capsys):
    recipe = write_recipe(tmp_path, "causal", "smora")
    assert main(["train", str(recipe)]) == 0
    capsys.readouterr()
    assert main(["merge", str(tmp_path / "out"), str(tmp_path / "merged")]) == 2
    assert "routes by token" in capsys.readouterr().err
    (tmp_path / "calibration.txt").write_text("w1 w2 w3 w4\n" * 40)
    command = ["export", str(tmp_path / "out"), str(tmp_path / "lora")]
    assert main([*command, "--calibration", str(tmp_path / "calibration.txt")]) == 0
    assert (tmp_path / "lora" / "adapter_config.json").exists()
    (tmp_path / "empty.txt").write_text(" \n\n")
    assert main([*command[:2], str(tmp_path / "none"), "--calibration", str(tmp_path / "empty.txt")]) == 2
    assert "empty.txt holds no text to calibrate with" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_dry_run_shows_the_job_and_trains_nothing(recipe, capsys, monkeypatch):
    monkeypatch.setattr(Trainer, "train", None)
    assert main(["train", str(recipe), "--dry-run", "training.max_steps=-1", "training.num_train_epochs=2"]) == 0
    shown = capsys.readouterr().out
    assert "first: 16 to train on, 8 to validate on" in shown
    assert "w5 w8 w11 w14 w17  →  no" in shown
    sampler = TaskSampler([0] * 16 + [1] * 16, 4)
    assert f"an epoch: {sampler.batches_per_epoch} steps of 4 examples: first 16, last 16" in shown
    assert f"the job: {2 * sampler.batches_per_epoch} steps" in shown
    assert not (recipe.parent / "out").exists()


def test_the_dry_run_counts_what_training_trains(recipe, capsys):
    assert main(["train", str(recipe), "--dry-run"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("adapter:"))
    assert main(["train", str(recipe), "training.max_steps=1"]) == 0
    capsys.readouterr()
    main(["inspect", str(recipe.parent / "out"), "--json"])
    trained = json.loads(capsys.readouterr().out)["facts"]["parameters"].split()[0]
    assert line.startswith(f"adapter: {trained} parameters to train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adapter.rr=4"], "override 'adapter.rr=4': adapter.rr: unknown key"),
        (["tasks.first.text={sentense}"], "no column 'sentense'"),
        (["model.name=./nowhere"], "model.name './nowhere' cannot be loaded"),
        (["training.per_device_train_batch_size=0"], "training.per_device_train_batch_size: expected at least 1"),
        (["training.eval_strategy=sometimes"], "train: training: sometimes is not a valid IntervalStrategy"),
        (["--resume"], "holds no checkpoint to resume from"),
    ],
)
def test_mistakes_end_with_a_message(recipe, arguments, message, capsys):
    assert main(["train", str(recipe), *arguments]) == 2
    assert message in capsys.readouterr().err


class PressCtrlC(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)


def test_interrupt_and_resume(recipe, capsys, monkeypatch):
    options = ["training.max_steps=6", "training.lr_scheduler_type=constant"]

    def build(*args, **kwargs):
        trainer = build_trainer(*args, **kwargs)
        trainer.add_callback(PressCtrlC())
        return trainer

    with monkeypatch.context() as patched:
        patched.setattr("rank_experts.assemble.build_trainer", build)
        assert main(["train", str(recipe), *options]) == 130
    assert "Interrupted after step 3; saved. Go on with: rank-experts train" in capsys.readouterr().out
    assert main(["train", str(recipe), *options]) == 2
    assert "Go on with --resume" in capsys.readouterr().err
    assert main(["train", str(recipe), *options, "--resume"]) == 0
    other = recipe.parent / "other"
    assert main(["train", str(recipe), *options, f"training.output_dir={other}"]) == 0
    resumed, whole = (load_file(folder / "adapter_model.safetensors") for folder in (recipe.parent / "out", other))
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())


def test_arguments_that_are_no_overrides_are_refused(recipe, capsys):
    with pytest.raises(SystemExit):
        main(["train", str(recipe), "--dry-run", "--resumee"])
    with pytest.raises(SystemExit):
        main(["inspect", str(recipe), "adapter.r=4"])
    assert "unrecognized arguments: adapter.r=4" in capsys.readouterr().err


HELP = """
import sys
from rank_experts_cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    print("status", end.code)
print(*sorted({"torch", "transformers", "peft", "rank_experts"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--help"], 0, "train|evaluate|merge|export|inspect|demo"),
        *(([name, "--help"], 0, f"usage: rank-experts {name}") for name in ("train", "evaluate", "merge", "inspect")),
        (["export", "--help"], 0, "token-routed"),
        ([], 2, "the following arguments are required: COMMAND"),
        (["trian"], 2, "invalid choice: 'trian'"),
        (["merge", "adapter"], 2, "the following arguments are required: OUT"),
        (["inspect", "adapter", "--jsn"], 2, "unrecognized arguments: --jsn"),
    ],
    ids=str,
)
def test_help_and_mistyped_arguments_are_answered_without_the_library(arguments, status, message):
    result = subprocess.run([sys.executable, "-c", HELP, *arguments], capture_output=True, text=True, check=True)
    for part in message.split("|"):
        assert part in result.stdout + result.stderr
    assert result.stdout.endswith(f"status {status}\n\n"), "nothing heavy was imported"


def test_what_is_wrong_with_a_disk_or_a_target_is_said_too(recipe, capsys, monkeypatch):
    for error in (OSError(28, "No space left on device"), TypeError("model.norm is a LayerNorm")):
        monkeypatch.setattr(
            "rank_experts.report.inspect_adapter", lambda *args, error=error: (_ for _ in ()).throw(error)
        )
        assert main(["inspect", str(recipe.parent)]) == 2
        assert f"rank-experts inspect: {error}" in capsys.readouterr().err
        with pytest.raises(type(error)):
            main(["inspect", str(recipe.parent), "--traceback"])


@pytest.mark.parametrize("missing", ["ruamel.yaml", "datasets"])
def test_an_extra_that_is_missing_is_named(recipe, capsys, monkeypatch, missing):
    for name in ("recipe", "recipe_yaml", "prepare", "assemble"):
        monkeypatch.delitem(sys.modules, f"rank_experts.{name}", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["train", str(recipe), "--dry-run"]) == 2
    shown = capsys.readouterr().err
    assert missing in shown
    assert "pip install 'rank-experts[train]'" in shown
