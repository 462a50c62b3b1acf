"""The diagnosis of tasks that are known: what is run, and what its page says."""

from __future__ import annotations

import torch


def test_a_layer_of_known_overlap(evidence, monkeypatch):
    diagnosis = evidence("diagnosis")
    monkeypatch.setattr(diagnosis, "EXAMPLES", 40)
    model, mixture = diagnosis.layer_of(0.5)
    assert [len(rows) for rows in mixture.values()] == [40] * 8
    batch = diagnosis.stacked(mixture["task 3"][:5])
    update = batch["labels"] - model.layer(batch["x"])
    assert 0 < update.square().sum() < 100  # the update's outputs alone: four directions of unit variance, five rows
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_run_and_its_page(evidence, tmp_path, monkeypatch):
    diagnosis, records = evidence("diagnosis"), evidence("records")
    monkeypatch.setattr(diagnosis, "EXAMPLES", 40)
    monkeypatch.setattr(diagnosis, "LAYER", diagnosis.LAYER | {"steps": 2})
    torch.manual_seed(0)
    log = tmp_path / "diagnosis.jsonl"
    diagnosis.main(["--records", str(log), "--groups", "one layer", "--limit", "1", "--cache", str(tmp_path)])
    (record,) = records.Records(log).read()
    assert record["settings"]["overlap"] == 0
    assert len(record["result"]["shared"]) == 8
    text = (tmp_path / "diagnosis.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| one layer, overlap 0 |"))
    assert row.split(" | ")[1] == f"{sum(record['result']['shared']) / 8:.4f}"
    assert row.endswith(f"| {record['result']['verdict']} |")
    assert "| languages, one head | not run |" in text
