"""Exporting to ONNX, and what onnxruntime computes then."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import models
from gates import GATES, batch, config, randomise
from rank_experts import inject_rank_experts
from rank_experts.routing.token import select_experts

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.filterwarnings("ignore")


class Logits(nn.Module):
    """A model whose inputs go by position and whose output is one tensor."""

    def __init__(self, model: nn.Module, names: list[str]):
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *inputs):
        return self.model(**dict(zip(self.names, inputs))).logits


def run(module: nn.Module, inputs: tuple[torch.Tensor, ...], file) -> list[torch.Tensor]:
    torch.onnx.export(module.eval(), inputs, dynamo=True, verbose=False).save(str(file))
    session = onnxruntime.InferenceSession(str(file))
    given = {known.name: tensor.numpy() for known, tensor in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(output) for output in session.run(None, given)]


@pytest.mark.parametrize("gate", GATES)
def test_onnxruntime_computes_what_the_model_does(gate, tmp_path):
    model = inject_rank_experts(models.bert(), config(gate, **({"r": 8} if gate == "token" else {})))
    randomise(model)
    inputs = batch(gate, "bert", labels=False)
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
    (found,) = run(Logits(model, list(inputs)), tuple(inputs.values()), tmp_path / "model.onnx")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_of_equal_keys_the_lower_index_wins(tmp_path):
    class Choice(nn.Module):
        def forward(self, keys):
            return select_experts(keys, 3)

    keys = torch.randint(0, 3, (64, 16), generator=torch.Generator().manual_seed(0)).float()
    (found,) = run(Choice(), (keys,), tmp_path / "choice.onnx")
    assert torch.equal(found, select_experts(keys, 3))
    assert not torch.equal(found, keys.topk(3).indices)  # torch's own breaks ties otherwise
