"""Routed adapters made of trained LoRAs."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from helpers import assert_unchanged, fingerprint
from models import MODELS, batch
from rank_experts import inject_lora, inject_loras, inject_rank_experts, load_rank_experts, save_rank_experts
from rank_experts.config.config import RankExpertConfig
from rank_experts.convert.upcycle import force_expert, split_by_svd
from rank_experts.files.lora import read_lora
from rank_experts.layers import adapted_layers

SHAPES = ("llama", "t5", "bert", "gpt2")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
TARGETS = {"llama": ["q_proj", "down_proj"], "t5": ["q", "wo"], "bert": ["query", "dense"], "gpt2": ["c_attn", "c_fc"]}
FIRST = {
    "llama": "layers.0.self_attn.q_proj",
    "t5": "block.0.layer.0.SelfAttention.q",
    "bert": "0.attention.self.query",
    "gpt2": "h.0.attn.c_attn",
}


def train_lora(name, path, seed, dtype=torch.float32, **options):
    """A LoRA as PEFT saves it, with random B instead of a training."""
    options = {"target_modules": TARGETS[name], "fan_in_fan_out": name == "gpt2"} | options
    model = get_peft_model(MODELS[name]().to(dtype), LoraConfig(**options))
    torch.manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(path)
    return path


@torch.no_grad()
def logits(model, name):
    return model(**batch(name)).logits.float()


def close(actual, expected, dtype=torch.float32):
    return float((actual - expected).norm()) <= TOLERANCE[dtype] * float(expected.norm())


@pytest.fixture
def loras(tmp_path):
    """Three LoRAs of BERT with different ranks, alphas and scalings."""
    return {
        "math": train_lora("bert", tmp_path / "math", 1, r=4, lora_alpha=8),
        "code": train_lora("bert", tmp_path / "code", 2, r=2, lora_alpha=3, use_rslora=True),
        "chat": train_lora(
            "bert",
            tmp_path / "chat",
            3,
            r=3,
            lora_alpha=6,
            rank_pattern={FIRST["bert"]: 5},
            alpha_pattern={FIRST["bert"]: 2},
        ),
    }


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_every_block_forced_on_is_its_lora(tmp_path, name, dtype, top_k):
    paths = {
        "math": train_lora(name, tmp_path / "math", 1, dtype, r=4, lora_alpha=8),
        "code": train_lora(name, tmp_path / "code", 2, dtype, r=2, lora_alpha=3, use_rslora=True),
        "chat": train_lora(
            name,
            tmp_path / "chat",
            3,
            dtype,
            r=3,
            lora_alpha=6,
            rank_pattern={FIRST[name]: 5},
            alpha_pattern={FIRST[name]: 2},
        ),
    }
    base = MODELS[name]().to(dtype).eval()
    model = inject_loras(copy.deepcopy(base), paths, top_k=top_k).eval()
    without = logits(base, name)
    for index, path in enumerate(paths.values()):
        expected = logits(PeftModel.from_pretrained(copy.deepcopy(base), path).eval(), name)
        assert not close(without, expected, dtype)
        with force_expert(model, index):
            assert close(logits(model, name), expected, dtype)
    routed = logits(model, name)
    with force_expert(model, 0):
        pass
    assert torch.equal(logits(model, name), routed), "force_expert leaves nothing behind"


def test_all_blocks_on_evenly_are_the_mean_of_the_loras(loras):
    base = MODELS["bert"]().double().eval()
    model = inject_loras(copy.deepcopy(base), loras, top_k=3).eval()
    checkpoints = [read_lora(path) for path in loras.values()]
    with torch.no_grad():
        for path, layer in adapted_layers(model):
            layer.rank_experts["default"].router_weight.zero_()
            delta = sum((scale * B.double() @ A.double() for A, B, scale in (one.layers[path] for one in checkpoints)))
            base.get_submodule(path).weight += delta / 3
    assert close(logits(model, "bert"), logits(base, "bert"))


def test_the_config_says_what_it_is_and_the_files_hold_it(tmp_path, loras):
    model = inject_loras(MODELS["bert"](), loras, dropout=0.1, load_balance="none")
    config = model.peft_config["default"]
    assert (config.num_experts, config.expert_rank, config.r, config.top_k, config.alpha) == (3, 5, 15, 2, 1)
    assert (config.dropout, config.load_balance) == (0.1, "none")
    assert config.target_modules == {"query", "dense"}
    save_rank_experts(model, tmp_path / "ours")
    again = load_rank_experts(MODELS["bert"](), tmp_path / "ours")
    assert torch.equal(logits(again.eval(), "bert"), logits(model.eval(), "bert"))


def test_it_trains_on_ranks_that_were_filled_up_too(loras):
    model = inject_loras(MODELS["bert"](), loras).train()
    torch.manual_seed(0)
    model(**batch("bert", size=16)).loss.backward()
    for path, layer in adapted_layers(model):
        B, A = layer.rank_experts["default"].B, layer.rank_experts["default"].A
        assert B.detach()[:, 7:10].count_nonzero() == 0, "code has two ranks; the block has five"
        if "pooler" not in path and "encoder.layer.1.output" not in path:
            assert B.grad[:, 7:10].abs().sum() > 0, path
        assert A.detach()[7:10].abs().sum() > 0
        assert layer.rank_experts["default"].router_weight.grad.abs().sum() > 0


def test_one_active_block_gives_the_router_no_gradient_from_the_loss(loras):
    """The reason why two blocks are active by default."""
    model = inject_loras(MODELS["bert"](), loras, top_k=1).train()
    model(**batch("bert", size=16)).loss.backward()
    assert all(
        layer.rank_experts["default"].router_weight.grad.abs().max() < 1e-9 for _, layer in adapted_layers(model)
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_one_lora_split_into_its_ranks(tmp_path, name, dtype):
    path = train_lora(name, tmp_path / "lora", 1, dtype, r=4, lora_alpha=6, rank_pattern={FIRST[name]: 6})
    base = MODELS[name]().to(dtype).eval()
    expected = logits(PeftModel.from_pretrained(copy.deepcopy(base), path).eval(), name)
    model = inject_lora(copy.deepcopy(base), path).eval()
    assert not close(logits(base, name), expected, dtype)
    assert close(logits(model, name), expected, dtype)
    config = model.peft_config["default"]
    assert (config.r, config.top_k, config.expert_rank) == (6, 6, 1)
    for _, layer in adapted_layers(model):
        A = layer.rank_experts["default"].A.double()
        used = layer.rank_experts["default"].B.abs().sum(0) > 0
        gram = A[used] @ A[used].T
        torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=0, atol=1e-5)
        assert (gram.diagonal().diff() <= 1e-6).all(), "the heaviest first"


def test_a_split_lora_with_fewer_active_ranks_counts_each_in_full(tmp_path):
    path = train_lora("bert", tmp_path / "lora", 1, r=4, lora_alpha=6)
    model = inject_lora(MODELS["bert"](), path, top_k=2)
    assert all(layer.rank_experts["default"].scale == 1 for _, layer in adapted_layers(model))
    assert any(layer.rank_experts["default"].router_weight.any() for _, layer in adapted_layers(model))


def test_the_split_is_the_same_product():
    A, B = torch.randn(3, 7, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    new_A, new_B = split_by_svd(A, B)
    torch.testing.assert_close(new_B @ new_A, B @ A, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(new_A.norm(dim=1), new_B.norm(dim=0), rtol=1e-12, atol=1e-12)


def edit_config(path, **values):
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora=True has no equivalent"),
        ({"bias": "all"}, "bias='all' has no equivalent"),
        ({"lora_bias": True}, "lora_bias=True has no equivalent"),
        ({"modules_to_save": ["classifier"]}, r"modules_to_save=\['classifier'\] has no equivalent"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base"),
        ({"peft_type": "IA3"}, "peft_type 'IA3': expected a LoRA"),
        ({"lora_alpha": None}, "lora_alpha is None: expected a number that is finite in float32"),
        ({"lora_alpha": True}, "lora_alpha is True: expected a number"),
        ({"lora_alpha": "8"}, "lora_alpha is '8': expected a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan: expected a number that is finite"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf: expected a number that is finite"),
        ({"lora_alpha": 1e39}, "lora_alpha is 1e.39: expected a number that is finite"),
        ({"lora_alpha": 10**400}, "lora_alpha is 10*: expected a number that is finite"),
        ({"alpha_pattern": "query"}, "alpha_pattern='query': expected an object"),
        ({"alpha_pattern": ["query"]}, "alpha_pattern=.*: expected an object"),
        ({"alpha_pattern": {"query": "x"}}, "query is 'x': expected a number"),
        ({"alpha_pattern": {"query": float("nan")}}, "query is nan: expected a number"),
        ({"alpha_pattern": {"(query": 4}}, r"alpha_pattern: '\(query' is not a regular expression"),
        ({"alpha_pattern": {"": 4}}, "expected names of modules as keys"),
        ({"alpha_pattern": {"(.*)*x": 4}}, "in so many ways that trying them does not end"),
    ],
)
def test_variants_without_an_equivalent_are_refused(loras, change, message):
    edit_config(loras["code"], **change)
    model = MODELS["bert"]()
    before = fingerprint(model)
    for upcycle in (lambda: inject_loras(model, loras), lambda: inject_lora(model, loras["code"])):
        with pytest.raises(ValueError, match=message):
            upcycle()
    assert_unchanged(model, before)


def test_a_real_dora_is_refused(tmp_path):
    path = train_lora("bert", tmp_path / "dora", 1, use_dora=True)
    with pytest.raises(ValueError, match="use_dora=True"):
        inject_lora(MODELS["bert"](), path)


def test_loras_that_do_not_fit_together_or_the_model(tmp_path, loras):
    model = MODELS["bert"]()
    before = fingerprint(model)
    edit_config(loras["code"], base_model_name_or_path="other/base")
    edit_config(loras["math"], base_model_name_or_path="some/base")
    with pytest.raises(ValueError, match="'math' was trained on 'some/base' and 'code' on 'other/base'"):
        inject_loras(model, loras)
    narrow = train_lora("bert", tmp_path / "narrow", 4, target_modules=["query"])
    with pytest.raises(ValueError, match=r"'math' and 'narrow' adapt different modules, bert\.encoder"):
        inject_loras(model, {"math": loras["math"], "narrow": narrow})
    for other, message in (
        (MODELS["llama"](), "LlamaForCausalLM does not have"),
        (MODELS["bert"](hidden_size=64), r"lora_A \(4, 32\).*model's layer has 64"),
    ):
        untouched = fingerprint(other)
        with pytest.raises(ValueError, match=rf"'math' \(.*math\).*{message}"):
            inject_loras(other, {"math": loras["math"]})
        with pytest.raises(ValueError, match=message):
            inject_lora(other, loras["math"])
        assert_unchanged(other, untouched)
    with pytest.raises(ValueError, match="loras is empty"):
        inject_loras(model, {})
    with pytest.raises(ValueError, match="top_k=4 is outside"):
        inject_loras(model, {"math": loras["math"]}, top_k=4)
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        inject_loras(model, {"math": loras["math"], "none": tmp_path / "nowhere"})
    assert_unchanged(model, before)


def test_damaged_files(tmp_path, loras):
    file = loras["math"] / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if "lora_A" in key)

    def refused(changed, message):
        save_file(changed, file)
        with pytest.raises(ValueError, match=message):
            inject_lora(MODELS["bert"](), loras["math"])

    refused({k: v for k, v in tensors.items() if k != key}, "has lora_B alone")
    refused(
        tensors | {key: torch.full_like(tensors[key], float("nan"))}, "lora_A.weight has values that are not finite"
    )
    refused(tensors | {key: tensors[key][:2]}, "ranks differ")
    refused(tensors | {"base_model.model.x.lora_embedding_A": torch.ones(2, 2)}, "lora_embedding_A .* no factor")
    pair = {key.replace("lora_A", "lora_B") for key in [key]} | {key}
    empty = {k: v[:0] if "lora_A" in k else v[:, :0] for k, v in tensors.items() if k in pair}
    refused(tensors | empty, "expected at least one rank")
    refused({}, "no LoRA tensors")
    edit_config(loras["math"], lora_alpha=3e38)
    refused({k: v * 100 for k, v in tensors.items()}, r"is scaled by 7\.5e\+37, which makes its lora_B infinite")
    file.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is damaged"):
        inject_lora(MODELS["bert"](), loras["math"])
    file.unlink()
    with pytest.raises(FileNotFoundError, match="holds no adapter_model"):
        inject_lora(MODELS["bert"](), loras["math"])
    torch.save(tensors, loras["math"] / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.bin is a pickle.*save it again.*save_pretrained"):
        inject_lora(MODELS["bert"](), loras["math"])
    file.symlink_to(loras["code"] / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"is a link to .* outside of the folder"):
        inject_lora(MODELS["bert"](), loras["math"])


def test_forcing_what_cannot_be_forced(loras):
    model = inject_loras(MODELS["bert"](), loras)
    with pytest.raises(ValueError, match=r"experts 0…2: there is no 3"), force_expert(model, 3):
        pass
    dense = inject_rank_experts(MODELS["bert"](), RankExpertConfig.lora(target_modules=["query"]))
    with pytest.raises(ValueError, match="does not route by token"), force_expert(dense, 0):
        pass
    with pytest.raises(ValueError, match="no rank-expert adapter"), force_expert(MODELS["bert"](), 0):
        pass
