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

from helpers import task_config
from rank_experts import inject_rank_experts, load_rank_experts, merge_rank_experts, save_rank_experts
from rank_experts.recipes.adapted import load_adapted
from rank_experts.recipes.assemble import build_trainer
from rank_experts.reports.report import inspect_adapter
from rank_experts.training.heads import load_classifier
from rank_experts.training.mixtures import TaskSampler
from rank_experts_cli import main
from recipe_files import write_recipe


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
    capsys.readouterr()
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "loras")]) == 2
    assert "knows the tasks ['first', 'last']: choose one with --task, or" in capsys.readouterr().err
    assert not (tmp_path / "loras").exists()
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "loras"), "--all-tasks"]) == 0
    assert "a LoRA for each task" in capsys.readouterr().out
    assert (tmp_path / "loras/first/adapter_model.safetensors").read_bytes()
    assert sorted(folder.name for folder in (tmp_path / "loras").iterdir()) == ["first", "last"]


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
        (["model.name=./nowhere"], "override 'model.name=./nowhere': model.name: './nowhere' cannot be loaded"),
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
        patched.setattr("rank_experts.recipes.assemble.build_trainer", build)
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


COMMANDS = ("diagnose", "train", "evaluate", "merge", "inspect")


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--help"], 0, "diagnose|train|evaluate|merge|export|inspect"),
        *(([name, "--help"], 0, f"usage: rank-experts {name}") for name in COMMANDS),
        (["export", "--help"], 0, "token-routed"),
        ([], 2, "the following arguments are required: COMMAND"),
        (["diagnose", "recipe.yaml", "--seeds", "few"], 2, "argument --seeds: invalid int value"),
        (["trian"], 2, "invalid choice: 'trian'"),
        (["export", "a", "out", "--task", "rte", "--all-tasks"], 2, "not allowed with argument --task"),
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


CODE = """
from pathlib import Path
from transformers import BertConfig, BertModel

Path({marker!r}).write_text("run")

class OwnConfig(BertConfig):
    model_type = "own"

class OwnModel(BertModel):
    config_class = OwnConfig
"""


@pytest.fixture
def with_code(recipe, monkeypatch):
    """A trained adapter whose base model comes with code of its own, and the file that the code writes."""
    assert main(["train", str(recipe)]) == 0
    base, marker = recipe.parent / "model", recipe.parent / "marker"
    (base / "own.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}}
    (base / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked"))
    return recipe, marker


@pytest.mark.parametrize("command", ["merge", "export", "evaluate"])
def test_a_models_own_code_is_run_where_that_is_said_and_never_asked_for(with_code, command, capsys):
    recipe, marker = with_code
    folder = recipe.parent
    arguments = {
        "merge": ["merge", str(folder / "out"), str(folder / "merged"), "--task", "last"],
        "export": ["export", str(folder / "out"), str(folder / "lora"), "--task", "last"],
        "evaluate": ["evaluate", str(recipe)],
    }[command]
    assert main(arguments) == 2
    assert "trust_remote_code" in capsys.readouterr().err
    assert not marker.exists()
    trusted = "model.trust_remote_code=true" if command == "evaluate" else "--trust-remote-code"
    assert main([*arguments, trusted]) == 0
    assert marker.exists()


def test_a_merge_takes_along_what_belongs_to_the_model_and_nothing_else(recipe, capsys):
    folder, out = recipe.parent, recipe.parent / "out"
    assert main(["train", str(recipe)]) == 0
    (out / "tokenizer").mkdir()
    (out / "vocabulary of mine").write_text("not a tokenizer's")
    (folder / "merged").mkdir()
    (folder / "precious").write_text("mine")
    (folder / "merged/tokenizer.json").symlink_to(folder / "precious")
    assert main(["merge", str(out), str(folder / "merged"), "--task", "last"]) == 0
    expected = {"config.json", "model.safetensors", "heads.json", "heads.safetensors", "tokenizer.json"}
    assert set(os.listdir(folder / "merged")) == expected | {"tokenizer_config.json"}
    assert (folder / "precious").read_text() == "mine"


@pytest.mark.parametrize("name", ["vocab.txt", "heads.json", "tokenizer.json"])
@pytest.mark.parametrize("how", ["link", "folder", "pipe", "large"])
def test_a_merge_copies_nothing_from_elsewhere(recipe, capsys, monkeypatch, name, how):
    """And says so before it begins; nothing is written then."""
    folder, out = recipe.parent, recipe.parent / "out"
    save_rank_experts(inject_rank_experts(AutoModel.from_pretrained(folder / "model"), task_config()), out)
    (folder / "secret").write_text("{}")
    if how == "link":
        (out / name).symlink_to(folder / "secret")
    elif how == "folder":
        (out / name).mkdir()
    elif how == "pipe":
        os.mkfifo(out / name)
    else:
        (out / name).write_text("")
        os.truncate(out / name, 2**40)
    monkeypatch.setattr("rank_experts.recipes.adapted.load_adapted", lambda *args: pytest.fail("loaded"))
    assert main(["merge", str(out), str(folder / "merged"), "--task", "last"]) == 2
    said = {"link": "outside of the folder", "folder": "not a regular file", "pipe": "not a regular file"}
    assert f"{name} " in (error := capsys.readouterr().err)
    assert said.get(how, "expected at most") in error
    assert not (folder / "merged").exists()


@pytest.mark.parametrize("named", ["pipeline", "set_seed", "BertConfig", "os", 7])
def test_an_architecture_that_is_no_model_is_not_called(recipe, named):
    folder, out = recipe.parent, recipe.parent / "out"
    model = AutoModel.from_pretrained(folder / "model")
    save_rank_experts(inject_rank_experts(model, task_config()), out)
    config = json.loads((folder / "model/config.json").read_text())
    (folder / "model/config.json").write_text(json.dumps(config | {"architectures": [named]}))
    assert type(load_adapted(out)) is type(model)


def test_what_is_wrong_with_a_disk_or_a_target_is_said_too(recipe, capsys, monkeypatch):
    for error in (OSError(28, "No space left on device"), TypeError("model.norm is a LayerNorm")):
        monkeypatch.setattr(
            "rank_experts.reports.report.inspect_adapter", lambda *args, error=error: (_ for _ in ()).throw(error)
        )
        assert main(["inspect", str(recipe.parent)]) == 2
        assert f"rank-experts inspect: {error}" in capsys.readouterr().err
        with pytest.raises(type(error)):
            main(["inspect", str(recipe.parent), "--traceback"])


@pytest.mark.parametrize("missing", ["ruamel.yaml", "datasets"])
def test_an_extra_that_is_missing_is_named(recipe, capsys, monkeypatch, missing):
    for name in ("recipe", "yaml_lines", "prepare", "assemble"):
        monkeypatch.delitem(sys.modules, f"rank_experts.recipes.{name}", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["train", str(recipe), "--dry-run"]) == 2
    shown = capsys.readouterr().err
    assert missing in shown
    assert "pip install 'rank-experts[train]'" in shown


@pytest.mark.parametrize("missing", ["ruamel.yaml", "datasets", "pydantic"])
def test_merging_and_exporting_need_no_extra(recipe, monkeypatch, missing):
    folder, out = recipe.parent, recipe.parent / "out"
    save_rank_experts(inject_rank_experts(AutoModel.from_pretrained(folder / "model"), task_config()), out)
    for name in ("recipe", "yaml_lines", "prepare", "assemble", "adapted"):
        monkeypatch.delitem(sys.modules, f"rank_experts.recipes.{name}", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["merge", str(out), str(folder / "merged"), "--task", "rte", "--base", str(folder / "model")]) == 0
    assert main(["export", str(out), str(folder / "lora"), "--task", "rte", "--base", str(folder / "model")]) == 0
    assert main(["inspect", str(out)]) == 0
