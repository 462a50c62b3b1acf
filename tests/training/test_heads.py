"""A shared encoder with a head per task: losses, predictions, files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from safetensors.torch import load_file, save_file

import models
from helpers import assert_unchanged, fingerprint
from rank_experts import RankExpertConfig, inject_rank_experts
from rank_experts.files.heads import read_heads
from rank_experts.training.heads import HeadSpec, MultiTaskClassifier, load_classifier, regression_spec

HEADS = {
    "cola": HeadSpec(labels=["bad", "good"]),
    "stsb": HeadSpec(offset=2.5, scale=1.5),
    "nli": HeadSpec(["a", "b", "c"]),
}


def classifier(config=None, heads=None, **kwargs):
    encoder = models.bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).bert
    if config is not None:
        encoder = inject_rank_experts(encoder, config)
    torch.manual_seed(1)
    return MultiTaskClassifier(encoder, heads or HEADS, **kwargs)


def inputs(size=6):
    batch = models.batch("bert", size, labels=False)
    return batch | {"task_ids": torch.arange(size) % 3, "labels": torch.tensor([1.0, 3.7, 2.0, 0.0, 0.2, 1.0])[:size]}


def test_each_example_goes_through_its_tasks_head():
    model = classifier().eval()
    batch = inputs()
    outputs = model(**batch)
    hidden = model.encoder(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    losses = []
    for i, task in enumerate(batch["task_ids"].tolist()):
        pooled = hidden[i][batch["attention_mask"][i].bool()].mean(0)
        out = model.heads["head_" + list(HEADS)[task]](pooled)
        if task == 1:
            torch.testing.assert_close(outputs.logits[i, 0], out[0] * 1.5 + 2.5)
            losses.append((out[0] - (batch["labels"][i] - 2.5) / 1.5) ** 2)
        else:
            torch.testing.assert_close(outputs.logits[i, : len(out)], out)
            losses.append(F.cross_entropy(out, batch["labels"][i].long()))
        assert (outputs.logits[i, len(out) :] == float("-inf")).all()
    torch.testing.assert_close(outputs.loss, torch.stack(losses).mean())


def test_predictions_ignore_other_heads_columns():
    model = classifier()
    logits = torch.tensor([[0.2, 0.9, float("-inf")], [0.5, 0.1, float("-inf")]])
    assert model.predictions(logits, "cola").tolist() == [1, 0]
    assert model.predictions(logits, "stsb").tolist() == pytest.approx([0.2, 0.5])


def test_the_auxiliary_loss_is_part_of_the_loss():
    config = RankExpertConfig.more(tasks=list(HEADS), r=4, target_modules="all-linear", init_weights=False)
    model = classifier(config).train()
    outputs = model(**inputs())
    assert float(outputs.rank_expert_loss) > 0.01
    model.eval()
    torch.testing.assert_close(outputs.loss - outputs.rank_expert_loss, model(**inputs()).loss)
    outputs.loss.backward()
    embedding = model.encoder.encoder.layer[0].attention.self.query.rank_experts["default"].task_embedding
    assert embedding.grad.abs().sum() > 0


def test_tasks_must_be_named_and_known():
    model = classifier()
    batch = inputs()
    with pytest.raises(ValueError, match="task_ids are missing"):
        model(input_ids=batch["input_ids"])
    with pytest.raises(ValueError, match=r"task_ids contain 3: expected 0…2"):
        model(**batch | {"task_ids": torch.full((6,), 3)})
    single = classifier(heads={"cola": HEADS["cola"]})
    assert single(input_ids=batch["input_ids"]).logits.shape == (6, 2)


def test_clashing_labels_in_one_head_are_refused():
    heads = {"rte": HeadSpec(["yes", "no"], head="nli"), "mnli": HeadSpec(["yes", "maybe", "no"], head="nli")}
    with pytest.raises(ValueError, match=r"'rte' and 'mnli' share the head 'nli'.*clash"):
        classifier(heads=heads)
    with pytest.raises(ValueError, match=r"clash: \['yes', 'no'\] and numbers \(offset 0, scale 1\)"):
        classifier(heads={"rte": HeadSpec(["yes", "no"], head="nli"), "nli": HeadSpec()})
    with pytest.raises(ValueError, match="at least two"):
        classifier(heads={"rte": HeadSpec(["yes"])})
    shared = classifier(heads={"rte": HeadSpec(["yes", "no"], head="nli"), "wnli": HeadSpec(["yes", "no"], head="nli")})
    assert len(shared.heads) == 1


def test_heads_are_saved_and_loaded(tmp_path):
    model = classifier(pooling="first").eval()
    model.save_heads(tmp_path)
    other = load_classifier(models.bert().bert, tmp_path).eval()
    assert read_heads(tmp_path) == (HEADS, "first")
    torch.testing.assert_close(other(**inputs()).logits, model(**inputs()).logits)
    with pytest.raises(ValueError, match="has heads for the tasks"):
        classifier(heads={"cola": HEADS["cola"]}).load_heads(tmp_path)
    with pytest.raises(ValueError, match="does not fit the encoder"):
        load_classifier(models.bert(hidden_size=16).bert, tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        read_heads(tmp_path / "nowhere")
    (tmp_path / "heads.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no heads\.safetensors"):
        load_classifier(models.bert().bert, tmp_path)


SPEC = {"labels": ["no", "yes"], "head": None, "offset": 0.0, "scale": 1.0}
DAMAGED = {
    "no JSON": "{",
    "no object": "[]",
    "another key": {"cola": {"labls": []}},
    "labels that are a number": {"cola": SPEC | {"labels": 10**12}},
    "labels that are numbers": {"cola": SPEC | {"labels": [1, 2]}},
    "a head that is none": {"cola": SPEC | {"head": 3}},
    "an offset that is none": {"cola": SPEC | {"offset": "0"}},
    "a scale of infinity": {"cola": SPEC | {"scale": float("inf")}},
    "a scale of zero": {"cola": SPEC | {"scale": 0}},
    "no heads": {},
    "heads that the weights lack": {"cola": SPEC, "other": SPEC},
    "more labels than the weights have": {"cola": SPEC | {"labels": ["a", "b", "c"]}},
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_heads_are_refused_and_change_nothing(tmp_path, damage):
    model = classifier(heads={"cola": HeadSpec(labels=["no", "yes"])})
    model.save_heads(tmp_path)
    text = DAMAGED[damage]
    (tmp_path / "heads.json").write_text(
        text if isinstance(text, str) else json.dumps({"pooling": "mean", "heads": text})
    )
    before = fingerprint(model)
    for load in (model.load_heads, lambda folder: load_classifier(models.bert().bert, folder)):
        with pytest.raises(ValueError, match=r"heads\.(json|safetensors)"):
            load(tmp_path)
    assert_unchanged(model, before)


def test_heads_that_diverged_or_are_cut_are_refused(tmp_path):
    model = classifier()
    for name, damage in {
        "not finite": lambda file: save_file({n: t / 0 for n, t in load_file(file).items()}, file),
        "heads.safetensors is damaged": lambda file: file.write_bytes(file.read_bytes()[:-10]),
        "its tensors are not those that were saved": lambda file: file.write_bytes(file.read_bytes()[:-4] + b"abcd"),
        "outside of the folder": lambda file: (file.rename(tmp_path / "elsewhere"), file.symlink_to("../elsewhere")),
    }.items():
        folder = tmp_path / name
        model.save_heads(folder)
        damage(folder / "heads.safetensors")
        before = fingerprint(model)
        with pytest.raises(ValueError, match=name):
            model.load_heads(folder)
        assert_unchanged(model, before)


def test_heads_that_diverged_are_not_saved(tmp_path):
    model = classifier()
    model.save_heads(tmp_path)
    before = (tmp_path / "heads.safetensors").read_bytes()
    model.heads["head_nli"].bias.data[1] = float("nan")
    with pytest.raises(ValueError, match=r"head_nli\.bias.*training diverged"):
        model.save_heads(tmp_path)
    assert (tmp_path / "heads.safetensors").read_bytes() == before


def test_heads_of_a_save_that_was_cut_off_between_the_files_count(tmp_path):
    classifier(heads={"cola": HeadSpec(labels=["no", "yes"])}).save_heads(tmp_path)
    old = (tmp_path / "heads.json").read_bytes()
    classifier().save_heads(tmp_path)
    (tmp_path / "heads.json").write_bytes(old)
    assert read_heads(tmp_path)[0] == HEADS


def test_a_head_can_be_added():
    model = classifier()
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.add_head("rte", HeadSpec(["yes", "no"]))
    assert model.tasks == ["cola", "stsb", "nli", "rte"]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    assert model(**inputs() | {"task_ids": torch.full((6,), 3), "labels": None}).logits.shape == (6, 3)
    with pytest.raises(ValueError, match="has a head already"):
        model.add_head("rte", HeadSpec())


def test_regression_labels_are_standardised():
    spec = regression_spec([1.0, 3.0])
    assert (spec.offset, spec.scale) == (2.0, 1.0)
    assert regression_spec([4.0, 4.0]).scale == 1.0


def test_heads_whose_names_differ_by_a_dot_are_two(tmp_path):
    """Alone in a batch each is trained by its own examples; saved and loaded they stay two."""
    names = ["a.b", "a_dot_b", "a%2Eb", "a%25b"]
    model = classifier(heads={name: HeadSpec(["no", "yes"]) for name in names})
    assert len(model.heads) == 4
    batch = {key: value for key, value in inputs(4).items() if key != "labels"}
    model(**batch | {"task_ids": torch.tensor([0, 0, 0, 0]), "labels": torch.ones(4)}).loss.backward()
    grads = [head.weight.grad.abs().sum() > 0 for head in model.heads.values()]
    assert grads == [True, False, False, False]
    model.save_heads(tmp_path)
    loaded = load_classifier(model.encoder, tmp_path)
    assert loaded.tasks == names
    assert len({head.weight.sum().item() for head in loaded.heads.values()}) == 4


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_an_encoder_in_16_bits_is_pooled_at_lengths_that_16_bits_cannot_count(pooling):
    encoder = models.bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).bert.to(torch.bfloat16)
    model = MultiTaskClassifier(encoder, {"cola": HEADS["cola"]}, pooling=pooling).eval()
    ids = torch.randint(1, models.VOCAB, (2, 400))
    mask = torch.ones_like(ids)
    mask[1, 300:] = 0
    hidden = encoder(ids, attention_mask=mask).last_hidden_state
    for row, length in enumerate((400, 300)):
        own = hidden[row, :length].double()
        pooled = {"mean": own.mean(0), "first": own[0], "last": own[-1]}[pooling]
        expected = model.heads["head_cola"](pooled.float())
        torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits[row], expected)


def test_heads_in_another_order_or_with_another_pooling_are_not_loaded(tmp_path):
    classifier(heads={"a": HeadSpec(["x", "y"]), "b": HeadSpec(["x", "y"])}).save_heads(tmp_path)
    model = classifier(heads={"b": HeadSpec(["x", "y"]), "a": HeadSpec(["x", "y"])})
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"for the tasks \['a', 'b'\], the model for \['b', 'a'\]"):
        model.load_heads(tmp_path)
    assert_unchanged(model, before)
    model = classifier(heads={"a": HeadSpec(["x", "y"]), "b": HeadSpec(["x", "y"])}, pooling="last")
    before = fingerprint(model)
    with pytest.raises(ValueError, match="saved with pooling='mean'; the model has pooling='last'"):
        model.load_heads(tmp_path)
    assert_unchanged(model, before)


def test_heads_and_an_adapter_that_number_tasks_differently_compute_nothing():
    model = classifier(RankExpertConfig.more(tasks=["stsb", "cola", "nli"], r=4, target_modules=["query"]))
    with pytest.raises(
        ValueError, match=r"heads are for the tasks \['cola', 'stsb', 'nli'\].*\['stsb', 'cola', 'nli'\]"
    ):
        model(**inputs())
    # Tasks that the adapter alone knows do not change the others' ids.
    known = classifier(RankExpertConfig.more(tasks=[*HEADS, "new"], r=4, target_modules=["query"]))
    assert known(**inputs()).loss.isfinite()


@pytest.mark.parametrize("wrong", [3, -1])
def test_an_id_that_matches_no_head_is_no_loss_of_zero_where_nobody_looks_at_ids(wrong, monkeypatch):
    """On an accelerator ids are not read back; there indexing asserts them, or the row stays NaN."""
    monkeypatch.setattr("rank_experts.training.heads.check_task_ids", lambda *args: None)
    batch = inputs()
    batch["task_ids"][2] = wrong
    model = classifier().eval()
    with pytest.raises(IndexError, match="out of range"):
        model(**batch)
    # Where a device asserts nothing.
    select = torch.Tensor.index_select
    monkeypatch.setattr(torch.Tensor, "index_select", lambda self, dim, index: select(self, dim, index.clamp(0, 2)))
    outputs = model(**batch)
    assert outputs.loss.isnan()
    assert outputs.logits[2].isnan().all()
    assert not outputs.logits[[0, 1, 3, 4, 5]].isnan().any()


@pytest.mark.gpu
def test_an_id_that_matches_no_head_fails_on_the_device_without_waiting():
    script = (
        "import torch\n"
        "from test_heads import classifier, inputs\n"
        "model = classifier().cuda().eval()\n"
        "batch = {name: value.cuda() for name, value in inputs().items()}\n"
        "with torch.cuda.device(0):\n"
        "    torch.cuda.set_sync_debug_mode('error')\n"
        "    model._apply_heads(torch.zeros(6, 32, device='cuda'), batch['task_ids'], batch['labels'])\n"
        "    torch.cuda.set_sync_debug_mode('default')\n"
        "batch['task_ids'][2] = 3\n"
        "model(**batch)\n"
        "torch.cuda.synchronize()\n"
    )
    here = str(Path(__file__).parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([here, *sys.path])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "device-side assert" in done.stderr


@pytest.mark.parametrize("way", ["injected", "peft", "whole"])
def test_tasks_reach_the_adapter_and_no_forward_looks_through_all_modules(way, monkeypatch):
    config = RankExpertConfig.more(tasks=list(HEADS), r=4, target_modules=["query"], init_weights=False)
    encoder = models.bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).bert
    if way == "injected":
        inject_rank_experts(encoder, config)
    elif way == "peft":
        encoder = get_peft_model(encoder, config)
    model = MultiTaskClassifier(encoder, HEADS).eval()
    if way == "whole":
        inject_rank_experts(model, config)
    monkeypatch.setattr("rank_experts.training.heads.routing_scopes", None)
    batch = inputs()
    with torch.no_grad():
        together = model(**batch).logits
        for row in range(6):
            alone = {name: value[row : row + 1] for name, value in batch.items()}
            torch.testing.assert_close(model(**alone).logits[0], together[row])
