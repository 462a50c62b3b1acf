"""A shared encoder with a head per task: losses, predictions, files."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import models
from helpers import assert_unchanged, fingerprint
from rank_experts import RankExpertConfig, inject_rank_experts
from rank_experts.heads import HeadSpec, MultiTaskClassifier, load_classifier, read_heads, regression_spec

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
    embedding = model.encoder.encoder.layer[0].attention.self.query.rank_expert_router["default"].task_embedding
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
    with pytest.raises(ValueError, match="has the heads"):
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
