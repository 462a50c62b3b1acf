"""Load counts, the bias update, and the auxiliary losses in outputs.loss."""

from __future__ import annotations

import warnings

import datasets
import pytest
import torch
from transformers import Trainer, TrainingArguments

from helpers import task_config, token_config
from models import CheckpointedBlock, batch, bert, llama, t5
from rank_experts import inject_rank_experts, update_router_bias
from rank_experts.calls import Call
from rank_experts.calls.boundary import _UNUSED_LOSSES
from rank_experts.layers import adapted_layers
from rank_experts.routing import expert_load
from rank_experts.training.callbacks import RankExpertCallback


def loads(model):
    return {path: layer.scope.loads[layer.path, "default"].clone() for path, layer in adapted_layers(model)}


def biases(model):
    return {path: layer.rank_experts["default"].balance_bias.clone() for path, layer in adapted_layers(model)}


def test_loads_count_every_token_that_is_not_padding():
    model = inject_rank_experts(llama(), token_config()).train()
    inputs = batch("llama")
    model(**inputs)
    num_tokens = int(inputs["attention_mask"].sum())
    assert num_tokens == 24
    for load in loads(model).values():
        assert load.sum() == 4 * num_tokens


def test_an_encoder_decoder_counts_its_two_paddings_apart():
    model = inject_rank_experts(t5(), token_config()).train()
    inputs = batch("t5")
    inputs["labels"][0, -2:] = -100
    inputs["labels"] = torch.cat([inputs["labels"], torch.full((4, 2), -100)], 1)  # as long as the encoder's input
    source, target = int(inputs["attention_mask"].sum()), int((inputs["labels"] != -100).sum())
    assert (source, target) == (24, 18)
    model(**inputs)
    for path, load in loads(model).items():
        from_encoder = path.startswith("encoder") or path.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        assert load.sum() == 4 * (source if from_encoder else target), path


def test_evaluation_counts_nothing():
    model = inject_rank_experts(llama(), token_config()).eval()
    model(**batch("llama"))
    assert all(load.sum() == 0 for load in loads(model).values())


def test_the_bias_moves_by_the_sign_of_the_missing_load_once_a_step():
    model = inject_rank_experts(llama(), token_config(balance_rate=0.25)).train()
    model(**batch("llama"))
    model(**batch("llama", size=2))  # a second micro-batch of the same step
    gathered = loads(model)
    update_router_bias(model)
    for path, bias in biases(model).items():
        load = gathered[path]
        expected = torch.tensor([0.25 * ((load.mean() > n).float() - (load.mean() < n).float()) for n in load])
        assert torch.equal(bias, expected)
        assert bias.any()
    assert all(load.sum() == 0 for load in loads(model).values())
    after = biases(model)
    update_router_bias(model)
    assert all(torch.equal(after[path], bias) for path, bias in biases(model).items()), "without load nothing moves"


def test_a_fully_padded_batch_changes_nothing():
    model = inject_rank_experts(llama(), token_config()).train()
    inputs = batch("llama", labels=False)
    inputs["attention_mask"] = torch.zeros_like(inputs["attention_mask"])
    model(**inputs)
    update_router_bias(model)
    assert not any(bias.any() for bias in biases(model).values())


@pytest.mark.parametrize("load_balance", ["loss", "none"])
def test_no_bias_without_load_balance_bias(load_balance):
    model = inject_rank_experts(llama(), token_config(load_balance=load_balance)).train()
    model(**batch("llama"))
    update_router_bias(model)
    assert not any(bias.any() for bias in biases(model).values())


def test_balancing_evens_the_load_out():
    model = inject_rank_experts(llama(), token_config(balance_rate=0.002)).train()
    inputs = batch("llama", size=16, length=16)

    def spread():
        update = {path: load / load.mean() for path, load in loads(model).items()}
        return float(torch.stack(list(update.values())).std(-1).mean())

    model(**inputs)
    first = spread()
    for _ in range(60):
        update_router_bias(model)
        model(**inputs)
    assert spread() < 0.5 * first


AUXILIARY = {"loss": token_config(load_balance="loss"), "contrastive": task_config()}


def ids_for(kind):
    return {"task_ids": torch.tensor([0, 2, 1, 0])} if kind == "contrastive" else {}


@pytest.mark.parametrize("kind", AUXILIARY)
@pytest.mark.parametrize("return_dict", [True, False])
def test_auxiliary_losses_are_part_of_the_loss(kind, return_dict):
    inputs = batch("bert") | ids_for(kind)
    model = inject_rank_experts(bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), AUXILIARY[kind])
    plain = model.eval()(**inputs).loss
    trained = model.train()(**inputs, return_dict=return_dict)
    loss = trained.loss if return_dict else trained[0]
    if return_dict:
        torch.testing.assert_close(loss, plain + trained.rank_expert_loss)
        assert trained.rank_expert_loss > 0
        assert not hasattr(model.eval()(**inputs), "rank_expert_loss")
    assert loss > plain


def test_one_task_for_a_whole_batch_contrasts_each_of_its_examples():
    model = inject_rank_experts(llama(), task_config()).train()
    one = model(**batch("llama"), task_ids="rte").rank_expert_loss
    each = model(**batch("llama"), task_ids=torch.tensor([2, 2, 2, 2])).rank_expert_loss
    torch.testing.assert_close(one, each)


def test_the_auxiliary_loss_is_the_mean_over_layers():
    inputs = batch("llama")
    inputs.pop("attention_mask")
    model = inject_rank_experts(llama(), token_config(load_balance="loss", balance_coef=0.5)).train()
    routings = {}
    with Call(next(adapted_layers(model))[1].scope, observers=(lambda *told: routings.update({told[0]: told[3]}),)):
        auxiliary = model(**inputs).rank_expert_loss
    expected = []
    for routing in routings.values():
        share = expert_load(routing.indices, 16) / routing.indices.numel()
        expected.append(0.5 * 16 * (share * routing.probabilities.mean(0)).sum())
    torch.testing.assert_close(auxiliary, torch.stack(expected).mean())


def test_micro_batches_of_a_step_share_the_auxiliary_loss():
    # Trainer divides by the labels of the whole step; the auxiliary losses of its micro-batches must not add up to
    # more than one batch's.
    model = inject_rank_experts(llama(), token_config(load_balance="loss")).train()
    inputs = batch("llama")
    whole = model(**inputs).rank_expert_loss
    labels = int((inputs["labels"][:, 1:] != -100).sum())
    share = model(**inputs, num_items_in_batch=4 * labels).rank_expert_loss
    torch.testing.assert_close(share, whole / 4)


def test_the_task_loss_alone_trains_gate_and_embeddings():
    model = inject_rank_experts(llama(), task_config(contrastive_coef=0.0)).train()
    out = model(**batch("llama"), task_ids=torch.tensor([0, 2, 1, 0]))
    assert not hasattr(out, "rank_expert_loss")
    out.loss.backward()
    for path, layer in adapted_layers(model):
        router = layer.rank_experts["default"]
        for name in ("task_embedding", "gate_weight", "gate_bias"):
            assert getattr(router, name).grad.abs().sum() > 0, f"{path}.{name}"


def test_who_bypasses_the_loss_is_told_once():
    model = inject_rank_experts(llama(), token_config(load_balance="loss")).train()
    inputs = batch("llama", labels=False)
    for _ in range(_UNUSED_LOSSES - 1):
        model(**inputs)
    with pytest.warns(UserWarning, match=r"add outputs\.rank_expert_loss"):
        model(**inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(_UNUSED_LOSSES + 1):
            out = model(**inputs)
            (out.logits.mean() + out.rank_expert_loss).backward()


def test_who_forgets_the_bias_update_is_told_once():
    model = inject_rank_experts(bert(), token_config(target_modules=["query"])).train()
    scope = next(adapted_layers(model))[1].scope
    scope.silent_calls = 999
    with pytest.warns(UserWarning, match="without update_router_bias"):
        model(**batch("bert"))
    update_router_bias(model)
    assert scope.silent_calls == 0


def test_trainer_updates_the_bias_once_a_step(tmp_path):
    model = inject_rank_experts(bert(), token_config(balance_rate=0.25))
    examples = [{name: tensor[i] for name, tensor in batch("bert", size=8).items()} for i in range(8)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=examples, callbacks=[RankExpertCallback()]).train()
    for path, bias in biases(model).items():
        assert bias.abs().max() <= 0.75, path
        assert ((bias / 0.25).round() == bias / 0.25).all()
        assert bias.any()
    assert all(load.sum() == 0 for load in loads(model).values())


def test_trainer_keeps_the_task_ids_column(tmp_path):
    model = inject_rank_experts(bert(), task_config())
    examples = [{name: tensor[i] for name, tensor in batch("bert", size=8).items()} for i in range(8)]
    for i, example in enumerate(examples):
        example |= {"task_ids": i % 3, "something_else": 1}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True
    )
    Trainer(model, arguments, train_dataset=datasets.Dataset.from_list(examples)).train()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_block_checkpointed_by_hand_counts_once(use_reentrant):
    model = inject_rank_experts(CheckpointedBlock(use_reentrant), token_config(target_modules=["proj"])).train()
    model(torch.randn(5, 6, requires_grad=True)).sum().backward()
    assert [load.sum() for load in loads(model).values()] == [5 * 4]
    # Called without the model around it, a layer counts as well.
    model.proj(torch.randn(3, 6))
    assert [load.sum() for load in loads(model).values()] == [8 * 4]
