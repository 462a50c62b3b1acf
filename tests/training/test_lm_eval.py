"""lm-evaluation-harness evaluates an adapter through its Hugging Face backend, on a local task."""

from __future__ import annotations

import json

import pytest
import torch
from peft import get_peft_model
from test_trainers import sentence, tokenizer

import models
from gates import GATES, config
from rank_experts import load_rank_experts, use_task

lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")

TASK = """
task: count_upwards
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
  - metric: acc
"""


@pytest.fixture
def folder(tmp_path):
    rows = [
        {"text": sentence(i, 3), "choices": [sentence(i + 3, 1), sentence(i + 20, 1)], "label": 0} for i in range(8)
    ]
    data = tmp_path / "test.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "count.yaml").write_text(TASK.format(data=data))
    models.llama().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path


def evaluate(model, folder):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    if not isinstance(model, HFLM):
        model = HFLM(pretrained=model, tokenizer=tokenizer(), device="cpu", batch_size=4)
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    results = lm_eval.simple_evaluate(
        model, tasks=["count_upwards"], task_manager=manager, log_samples=True, bootstrap_iters=0
    )
    samples = results["samples"]["count_upwards"]
    return torch.tensor([[choice[0] for choice in sample["filtered_resps"]] for sample in samples])


@pytest.mark.parametrize("gate", GATES)
def test_an_adapter_by_its_folder_and_as_a_loaded_model(gate, folder):
    """`--model_args pretrained=BASE,peft=ADAPTER` and a model in memory give the same likelihoods."""
    from lm_eval.models.huggingface import HFLM

    base = models.llama()
    plain = evaluate(base, folder)
    torch.manual_seed(0)
    made = config(gate, task_type="CAUSAL_LM", **({"tasks": ["only"]} if gate == "task" else {}))
    get_peft_model(models.llama(), made).save_pretrained(folder / "adapter")
    by_folder = HFLM(
        pretrained=str(folder / "base"), peft=str(folder / "adapter"), device="cpu", batch_size=4, dtype="float32"
    )
    found = evaluate(by_folder, folder)
    assert (found - plain).abs().max() > 1e-2
    loaded = load_rank_experts(models.llama(), folder / "adapter")
    torch.testing.assert_close(evaluate(loaded, folder), found, rtol=1e-4, atol=1e-4)


def test_one_of_several_tasks(folder):
    """`use_task` around the evaluation says which task its examples are of."""
    model = get_peft_model(models.llama(), config("task", task_type="CAUSAL_LM"))
    found = {}
    for name in ("cola", "rte"):
        with use_task(model, name):
            found[name] = evaluate(model, folder)
    assert (found["cola"] - found["rte"]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="was not told which"):
        evaluate(model, folder)
