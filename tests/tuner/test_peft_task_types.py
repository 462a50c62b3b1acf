"""`task_ids` through every class that `get_peft_model` makes, by task type."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from peft import get_peft_model
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertModel,
    LlamaForSequenceClassification,
)

import models
from gates import config
from helpers import TASKS
from models import batch
from rank_experts import inject_rank_experts, use_task


def tiny_bert(cls, **kwargs):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return cls(BertConfig(vocab_size=models.VOCAB, **(sizes | kwargs)))


def text(**labels):
    inputs = batch("bert", labels=False)
    return inputs | labels


CASES = {
    "CAUSAL_LM": (models.llama, batch("llama")),
    "SEQ_CLS": (models.bert, batch("bert")),
    "SEQ_2_SEQ_LM": (models.t5, batch("t5")),
    "TOKEN_CLS": (lambda: tiny_bert(BertForTokenClassification, num_labels=3), text(labels=torch.ones(4, 7).long())),
    "QUESTION_ANS": (
        lambda: tiny_bert(BertForQuestionAnswering),
        text(start_positions=torch.arange(4), end_positions=torch.arange(4) + 1),
    ),
    "FEATURE_EXTRACTION": (lambda: tiny_bert(BertModel), text()),
    None: (models.llama, batch("llama")),
}
IDS = torch.tensor([2, 0, 1, 2])
EVERY = pytest.mark.parametrize("task_type", CASES)


def pair(task_type, **kwargs):
    """The same adapter in a PeftModel of a task type and injected, and the batch."""
    make, inputs = CASES[task_type]
    targets = r".*\.(query|value|q|v|q_proj|v_proj|down_proj|wi|wo|dense)"
    made = config("task", task_type=task_type, target_modules=targets, **kwargs)
    torch.manual_seed(1)
    wrapped = get_peft_model(make(), copy.deepcopy(made))
    torch.manual_seed(1)
    injected = inject_rank_experts(make(), made)
    return wrapped.eval(), injected.eval(), inputs


def first_tensor(outputs):
    for name in ("logits", "start_logits", "last_hidden_state"):
        if name in outputs:
            return outputs[name]
    raise AssertionError(outputs.keys())


@EVERY
def test_a_batch_of_several_tasks(task_type):
    wrapped, injected, inputs = pair(task_type)
    expected_class = {
        "CAUSAL_LM": "PeftModelForCausalLM",
        "SEQ_CLS": "PeftModelForSequenceClassification",
        "SEQ_2_SEQ_LM": "PeftModelForSeq2SeqLM",
        "TOKEN_CLS": "PeftModelForTokenClassification",
        "QUESTION_ANS": "PeftModelForQuestionAnswering",
        "FEATURE_EXTRACTION": "PeftModelForFeatureExtraction",
        None: "PeftModel",
    }
    assert type(wrapped).__name__ == expected_class[task_type]
    with torch.no_grad():
        got = first_tensor(wrapped(**inputs, task_ids=IDS))
        torch.testing.assert_close(got, first_tensor(injected(**inputs, task_ids=IDS)))
        for row, task in enumerate(IDS.tolist()):
            one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
            alone = first_tensor(wrapped(**one, task_ids=IDS[row : row + 1]))
            torch.testing.assert_close(got[row], alone[0], rtol=1e-4, atol=1e-5)
            with use_task(wrapped, TASKS[task]):
                assert torch.equal(first_tensor(wrapped(**one)), alone)
        other = first_tensor(wrapped(**inputs, task_ids=IDS.flip(0)))
        assert (other - got).abs().max() > 1e-3


@EVERY
def test_names_serve_as_well_as_ids(task_type):
    wrapped, _, inputs = pair(task_type)
    with torch.no_grad():
        by_id = first_tensor(wrapped(**inputs, task_ids=IDS))
        by_name = first_tensor(wrapped(**inputs, task_ids=[TASKS[i] for i in IDS]))
        assert torch.equal(by_id, by_name)


@EVERY
def test_tuples(task_type):
    wrapped, _, inputs = pair(task_type)
    with torch.no_grad():
        outputs = wrapped(**inputs, task_ids=IDS)
        as_tuple = wrapped(**inputs, task_ids=IDS, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], outputs[0])


@EVERY
def test_the_losses_reach_the_gates_of_the_tasks_in_the_batch(task_type):
    wrapped, _, inputs = pair(task_type)
    wrapped.train()
    outputs = wrapped(**inputs, task_ids=torch.tensor([0, 0, 2, 2]))
    loss = outputs.loss if getattr(outputs, "loss", None) is not None else outputs.rank_expert_loss
    loss.backward()
    embeddings = [p for name, p in wrapped.named_parameters() if "task_embedding" in name]
    assert embeddings
    assert all(e.grad[0].abs().sum() > 0 and e.grad[2].abs().sum() > 0 for e in embeddings)


@EVERY
def test_without_tasks_the_error_says_what_to_do(task_type):
    wrapped, _, inputs = pair(task_type)
    with pytest.raises(ValueError, match=r"was not told which.*task_ids=ids"):
        wrapped(**inputs)
    with wrapped.disable_adapter():
        wrapped(**inputs)


@EVERY
def test_every_wrapper_says_that_it_takes_task_ids(task_type):
    wrapped, _, _ = pair(task_type)
    for module in (wrapped, wrapped.get_base_model()):
        assert "task_ids" in inspect.signature(module.forward).parameters


@EVERY
def test_every_level_takes_task_ids(task_type):
    wrapped, _, inputs = pair(task_type)
    with torch.no_grad():
        expected = first_tensor(wrapped(**inputs, task_ids=IDS))
        for module in (wrapped.base_model, wrapped.get_base_model()):
            assert torch.equal(first_tensor(module(**inputs, task_ids=IDS)), expected)


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_2_SEQ_LM", None])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}])
def test_generate(task_type, options):
    wrapped, injected, inputs = pair(task_type)
    inputs = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    options = options | {"max_new_tokens": 5, "output_logits": True, "return_dict_in_generate": True}
    torch.manual_seed(3)
    got = wrapped.generate(**inputs, **options, task_ids=IDS)
    torch.manual_seed(3)
    with use_task(injected, IDS):
        expected = injected.generate(**inputs, **options)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(got.logits, expected.logits)
    torch.manual_seed(3)
    other = wrapped.generate(**inputs, **options, task_ids=IDS.flip(0))
    assert (other.logits[0] - got.logits[0]).abs().max() > 1e-3


def test_a_decoder_that_classifies():
    torch.manual_seed(0)
    base = LlamaForSequenceClassification(models.llama().config)
    wrapped = get_peft_model(base, config("task", task_type="SEQ_CLS")).eval()
    inputs = batch("llama", labels=False)
    with torch.no_grad():
        got = wrapped(**inputs, labels=torch.tensor([0, 1, 0, 1]), task_ids=IDS)
        assert not torch.equal(got.logits, wrapped(**inputs, task_ids=IDS.flip(0)).logits)


def test_task_ids_beside_adapter_names():
    """A mixed-adapter batch whose examples have tasks of their own."""
    wrapped, _, inputs = pair("CAUSAL_LM")
    inputs = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    wrapped.add_adapter("other", config("task", task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"]))
    wrapped.eval()
    names = ["other", "default", "default", "other"]
    with torch.no_grad():
        mixed = wrapped(**inputs, task_ids=IDS, adapter_names=names).logits
        for row, name in enumerate(names):
            wrapped.set_adapter(name)
            alone = wrapped(**inputs, task_ids=IDS).logits
            torch.testing.assert_close(mixed[row], alone[row], rtol=1e-4, atol=1e-5)


def test_models_of_other_methods_are_left_alone():
    from peft import LoraConfig

    model = get_peft_model(models.llama(), LoraConfig(task_type="CAUSAL_LM"))
    assert "forward" not in vars(model)
    assert "task_ids" not in model.special_peft_forward_args
