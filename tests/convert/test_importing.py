"""Checkpoints of the two papers' own code, against forwards written from what that code does."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import save_file

from models import MODELS, batch
from rank_experts import import_checkpoint, load_rank_experts, use_task

SHAPES = ("llama", "t5", "bert", "gpt2")
TARGETS = {"llama": ["q_proj", "down_proj"], "t5": ["q", "wo"], "bert": ["query", "dense"], "gpt2": ["c_attn", "c_fc"]}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def adapted_modules(name):
    model = MODELS[name]()
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in TARGETS[name]:
            weight = module.weight
            d_out, d_in = weight.shape[::-1] if name == "gpt2" else weight.shape
            yield path, d_in, d_out


def smora_tensors(name, r, partition, biases):
    tensors = {}
    for path, d_in, d_out in adapted_modules(name):
        key = f"base_model.model.{path}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(r, d_in) * 0.2
        tensors[f"{key}.lora_B.weight"] = torch.randn(d_out, r) * 0.2
        tensors[f"{key}.lora_router.weight"] = torch.randn(r // partition, d_in) * 0.3
        tensors[f"{key}.lora_biases"] = biases(r)
    return tensors


def more_tensors(name):
    tensors = {}
    for path, d_in, d_out in adapted_modules(name):
        key = f"base_model.model.{path}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(8, d_in) * 0.3
        tensors[f"{key}.lora_B.weight"] = torch.randn(d_out, 8) * 0.3
        tensors[f"{key}.lora_gate.0.weight"] = torch.randn(8, d_in)
        tensors[f"{key}.lora_gate.0.bias"] = torch.randn(8)
        tensors[f"{key}.lora_task_embedding.weight"] = torch.randn(8, d_in)
    return tensors


def write(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def smora_forward(x, own, r, activate_r, rank_partition, lora_alpha):
    """SMoRA's published forward: (…, d_in) to what is added to the base layer's output."""
    scores = torch.sigmoid(x @ own["lora_router.weight"].T).repeat_interleave(rank_partition, dim=-1)
    scores = scores + own["lora_biases"]
    top, indices = scores.topk(activate_r, dim=-1)
    sparse = torch.zeros_like(scores).scatter(-1, indices, top)
    gates = sparse / sparse.sum(-1, keepdim=True) * activate_r
    return (x @ own["lora_A.weight"].T * gates) @ own["lora_B.weight"].T * (lora_alpha / activate_r)


def more_forward(x, own, r, lora_alpha, task):
    """MoRE's published forward for one task."""
    logits = own["lora_gate.0.weight"] @ own["lora_task_embedding.weight"][task] + own["lora_gate.0.bias"]
    chosen = int(logits.softmax(-1).argmax()) + 1
    added = 0
    for j in range(1, chosen + 1):
        A, B = own["lora_A.weight"][j - 1] * (j / 8), own["lora_B.weight"][:, j - 1] * (j / 8)
        added = added + (x @ A)[..., None] * B
    return added * (lora_alpha / r)


@torch.no_grad()
def run_with(name, tensors, forward, dtype=torch.float32, **inputs):
    """The plain model with the paper's forward added by hooks."""
    model = MODELS[name]().to(dtype).eval()
    for path, module in model.named_modules():
        prefix = f"base_model.model.{path}."
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if "lora_A.weight" in own:
            module.register_forward_hook(
                lambda _, args, output, own=own: (output + forward(args[0].float(), own)).to(output.dtype)
            )
    return model(**(batch(name) | inputs)).logits.float()


def close(actual, expected, dtype=torch.float32):
    return float((actual - expected).norm()) <= TOLERANCE[dtype] * float(expected.norm())


@torch.no_grad()
def logits(model, name, **inputs):
    return model(**(batch(name) | inputs)).logits.float()


BIASES = {
    "zero": lambda r: torch.zeros(r),
    "even within a partition": lambda r: (torch.randn(r // 2) * 0.2).repeat_interleave(2),
    "uneven": lambda r: torch.randn(r) * 0.2,
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("biases", BIASES)
@pytest.mark.parametrize(("partition", "activate_r"), [(1, 3), (2, 4)])
def test_smora(tmp_path, name, dtype, biases, partition, activate_r):
    tensors = smora_tensors(name, 8, partition, BIASES[biases])
    values = {"r": 8, "activate_r": activate_r, "rank_partition": partition, "lora_alpha": 12}
    source = write(tmp_path / "source", tensors, target_modules=TARGETS[name], peft_type="LORA", **values)
    config = import_checkpoint(source, tmp_path / "ours")
    assert config.biased_gates
    assert config.expert_rank == (1 if biases == "uneven" else partition)
    base = MODELS[name]().to(dtype).eval()
    model = load_rank_experts(copy.deepcopy(base), tmp_path / "ours").eval()
    expected = run_with(name, tensors, lambda x, own: smora_forward(x, own, **values), dtype)
    assert not close(logits(base, name), expected, dtype)
    assert close(logits(model, name), expected, dtype)


def test_smora_whose_active_ranks_cut_through_a_partition(tmp_path):
    tensors = smora_tensors("bert", 8, 2, BIASES["uneven"])
    for key in tensors:
        if key.endswith("biases"):
            # Distinct, so that the ranks of a partition are never tied.
            tensors[key] = torch.linspace(0, 1e-3, 8)
    values = {"r": 8, "activate_r": 3, "rank_partition": 2, "lora_alpha": 6}
    source = write(tmp_path / "source", tensors, target_modules=TARGETS["bert"], **values)
    assert import_checkpoint(source, tmp_path / "ours").expert_rank == 1
    model = load_rank_experts(MODELS["bert"](), tmp_path / "ours").eval()
    assert close(logits(model, "bert"), run_with("bert", tensors, lambda x, own: smora_forward(x, own, **values)))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_more(tmp_path, name, dtype):
    tensors = more_tensors(name)
    source = write(tmp_path / "source", tensors, r=8, lora_alpha=12, target_modules=TARGETS[name], lora_dropout=0.1)
    config = import_checkpoint(source, tmp_path / "ours")
    assert config.tasks == [f"task{i}" for i in range(8)]
    assert config.dropout == 0.1
    base = MODELS[name]().to(dtype).eval()
    model = load_rank_experts(copy.deepcopy(base), tmp_path / "ours").eval()
    for task in range(8):
        expected = run_with(name, tensors, lambda x, own, task=task: more_forward(x, own, 8, 12, task), dtype)
        assert not close(logits(base, name), expected, dtype)
        assert close(logits(model, name, task_ids=torch.full((4,), task)), expected, dtype)


def test_more_with_names_for_its_tasks(tmp_path):
    tensors = more_tensors("bert")
    source = write(tmp_path / "source", tensors, r=8, lora_alpha=12, target_modules=TARGETS["bert"])
    config = import_checkpoint(source, tmp_path / "ours", tasks=["cola", "mnli"])
    assert config.tasks == ["cola", "mnli"]
    model = load_rank_experts(MODELS["bert"](), tmp_path / "ours").eval()
    with use_task(model, "mnli"):
        assert close(logits(model, "bert"), run_with("bert", tensors, lambda x, own: more_forward(x, own, 8, 12, 1)))
    with pytest.raises(ValueError, match="9 names"):
        import_checkpoint(source, tmp_path / "other", tasks=list("abcdefghi"))


def test_what_is_no_checkpoint_of_either(tmp_path):
    smora = smora_tensors("bert", 8, 2, BIASES["zero"])
    values = {"r": 8, "activate_r": 4, "rank_partition": 2, "lora_alpha": 12, "target_modules": TARGETS["bert"]}
    key = next(key for key in smora if key.endswith("lora_router.weight"))
    plain = {name: tensor for name, tensor in smora.items() if "router" not in name and "biases" not in name}
    cases = [
        (plain, {}, r"neither paper's code: its layers hold \['lora_A.weight', 'lora_B.weight'\].*inject_lora"),
        ({}, {}, "neither paper's code"),
        ({k: v for k, v in smora.items() if k != key}, {}, "neither paper's code"),
        (smora | {"base_model.model.other.weight": torch.ones(2)}, {}, "other.weight belongs to no adapted layer"),
        (smora | {key: torch.ones(5, 32)}, {}, r"lora_router.weight has shape \(5, 32\), expected \(4, 32\)"),
        (smora | {key: torch.full((4, 32), float("inf"))}, {}, "not finite"),
        (smora, {"activate_r": None}, "activate_r=None: expected a whole number"),
        (smora, {"lora_alpha": 0}, "lora_alpha=0: expected a number above 0"),
        (smora, {"lora_alpha": float("nan")}, "lora_alpha=nan: expected a number above 0"),
        (smora, {"lora_alpha": 10**400}, "lora_alpha=10*: expected a number above 0, finite in float32"),
        (smora, {"rank_partition": -2}, "rank_partition=-2: expected a whole number of at least 1"),
        (smora, {"rank_partition": 3}, "is not a multiple of rank_partition=3"),
        (smora, {"r": 2.5}, "r=2.5: expected a whole number"),
        (smora, {"activate_r": True}, "activate_r=True: expected a whole number"),
        (smora, {"activate_r": 10**6}, "top_k=.* is outside"),
        (smora, {"lora_dropout": "much"}, "dropout='much': expected a number"),
        (smora, {"target_modules": 7}, "target_modules=7: expected a list"),
        (smora, {"target_modules": "(.*)*x"}, "in so many ways that trying them does not end"),
        (smora, {"r": 16}, r"has shape \(8, 32\), expected \(16, 32\)"),
        (more_tensors("bert"), {"r": 4}, "r=4: MoRE's code has gates for 8 ranks"),
    ]
    for number, (tensors, changes, message) in enumerate(cases):
        source = write(tmp_path / f"source{number}", tensors, **(values | changes))
        with pytest.raises(ValueError, match=message):
            import_checkpoint(source, tmp_path / "ours")
    with pytest.raises(ValueError, match="knows no tasks"):
        import_checkpoint(write(tmp_path / "tasks", smora, **values), tmp_path / "ours", tasks=["a"])
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        import_checkpoint(tmp_path / "nowhere", tmp_path / "ours")
    source = write(tmp_path / "pickled", smora, **values)
    torch.save(smora, source / "adapter_model.bin")
    (source / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.bin is a pickle"):
        import_checkpoint(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    assert not list(tmp_path.glob(".ours*"))
