"""Random adapters, configs and task specifications: nothing is accepted wrongly, nothing crashes.

Recipes are in test_fuzz_recipes.py. By default a few hundred of each; `make fuzz` runs 10,000 adapter folders and
writes docs/results/fuzz.json. Every adapter case is made from its number alone: `RANK_EXPERTS_FUZZ_CASE=1234` runs one
again.
"""

from __future__ import annotations

import copy
import json
import math
import os
import platform
import random
import resource
import shutil
import time
import warnings
from collections import Counter
from pathlib import Path

import peft
import pytest
import safetensors
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save, save_file

from helpers import OLD_PEFT, assert_unchanged, dense_config, fingerprint, task_config, token_config
from models import bert, llama
from rank_experts import RankExpertConfig, inject_rank_experts, load_rank_experts, save_rank_experts
from rank_experts.calls import routing_scopes
from rank_experts.calls.call import current_call
from rank_experts.files.loading import read_config
from rank_experts.files.saving import config_to_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CASES = int(os.environ.get("RANK_EXPERTS_FUZZ", "300"))
PREFIX = "base_model.model."
FLOATING = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
DESCRIPTION = {"base_model_name_or_path", "revision", "peft_version", "task_type", "auto_mapping", "inference_mode"}
SMALL = dict(target_modules=["q_proj", "v_proj"])


def small_llama():
    return llama(num_hidden_layers=1)


def small_bert():
    return bert(num_hidden_layers=1)


KINDS = {
    "token": (small_llama, token_config(**SMALL)),
    "blocks": (small_llama, token_config(expert_rank=4, top_k=2, rank_pattern={"v_proj": 8}, **SMALL)),
    "task": (small_llama, task_config(task_embedding_dim=8, **SMALL)),
    "dense": (small_llama, dense_config(layers_to_transform=[0], **SMALL)),
    "saved": (
        small_bert,
        dense_config(target_modules=["query"], modules_to_save=["classifier"], bias="none" if OLD_PEFT else "all"),
    ),
}

JUNK = [
    None, True, False, 0, 1, -1, 2, 3, 7, 16, 10**12, 2**64, 10**400, 0.5, -0.5, 1e308, math.nan, math.inf, "", "x",
    "all-linear", "q_proj", "(", "token", "task", "dense", "bias", "none", "sigmoid", "RANK_EXPERTS", "LORA", "\ud800",
    [], ["q_proj"], [1], [None], [[]], ["cola", "cola"], ["a"] * 500, {}, {"q_proj": 4}, {"q_proj": 10**12}, {"(": 4},
    {"x": {}},
]  # fmt: skip


# Mutations of an adapter's folder. Each takes the folder and a random.Random and changes something.


def flip_bytes(path, rng):
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 1, 2, 8, 64])):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def cut(path, rng):
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data) + 1)])


def insert(path, rng):
    data = path.read_bytes()
    place = rng.choice([0, len(data), rng.randrange(len(data) + 1)])
    path.write_bytes(data[:place] + rng.randbytes(rng.choice([1, 8, 1000])) + data[place:])


def overwrite(path, rng):
    path.write_bytes(rng.choice([b"", b"{}", b"[]", b"null", b"\x00" * 16, b"[" * 100_000, rng.randbytes(200)]))


def remove(path, rng):
    path.unlink()


def become_folder(path, rng):
    path.unlink()
    path.mkdir()


def become_link(path, rng):
    target = rng.choice(["/etc/hostname", "/dev/null", "nowhere", path.name])
    path.unlink()
    path.symlink_to(target)


def edit_field(folder, rng):
    path = folder / CONFIG
    values = json.loads(path.read_bytes())
    names = [*values, "top_kk", "runtime_config", "lora_alpha"] if rng.random() < 0.1 else [*values]
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        name = rng.choice(names)
        if rng.random() < 0.15:
            values.pop(name, None)
        else:
            values[name] = rng.choice(JUNK)
    path.write_text(json.dumps(values))


def nudge_field(folder, rng):
    # A value that is as good as the old one.
    path = folder / CONFIG
    values = json.loads(path.read_bytes())
    name = rng.choice(["alpha", "dropout", "top_k", "r", "balance_rate", "pooling", "rank_scaling", "score_function"])
    choices = {"pooling": ["mean", "last"], "rank_scaling": ["quadratic", "none"], "score_function": ["softmax"]}
    values[name] = rng.choice(choices.get(name, [0.25, 1, 2, 4, 8, 32]))
    path.write_text(json.dumps(values))


def describe(folder, rng):
    path = folder / CONFIG
    values = json.loads(path.read_bytes())
    values[rng.choice(["base_model_name_or_path", "revision", "peft_version"])] = rng.choice(["x", None, "new"])
    path.write_text(json.dumps(values, indent=rng.choice([None, 4])))


def edit_header(folder, rng):
    path = folder / WEIGHTS
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    first, second = rng.choice(names), rng.choice(names)
    entry = header[first]
    action = rng.randrange(8)
    if action == 0:
        header[first], header[second] = header[second], header[first]
    elif action == 1:
        entry["dtype"] = rng.choice(["F16", "BF16", "F64", "I32", "U8", "F8_E4M3", "BOOL", "F32", "C64", "X"])
    elif action == 2:
        entry["shape"] = rng.choice([[], [0], [10**12], [-1, 4], entry["shape"][::-1], [*entry["shape"], 1]])
    elif action == 3:
        entry["data_offsets"][rng.randrange(2)] += rng.choice([-4, 4, 10**12])
    elif action == 4:
        header[first + rng.choice([".x", "x"])] = header.pop(first)
    elif action == 5:
        header["__metadata__"] = rng.choice([None, {}, {"format": 1}, [], {"rank_experts_config": "{}"}])
    elif action == 6:
        header[first] = rng.choice(JUNK)
    else:
        size = rng.choice([0, 1, size - 1, size + 1, 2**32, 2**64 - 1])
        path.write_bytes(size.to_bytes(8, "little") + data[8:])
        return
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def edit_tensors(folder, rng):
    path = folder / WEIGHTS
    tensors = load_file(path)
    name, other = rng.choice(list(tensors)), rng.choice(list(tensors))
    tensor = tensors[name]
    action = rng.randrange(9)
    if action == 0:
        del tensors[name]
    elif action == 1:
        tensors[name + "x"] = tensor.clone()
    elif action == 2:
        tensors[name], tensors[other] = tensors[other], tensor
    elif action == 3:
        tensors[name] = torch.zeros([*tensor.shape[:-1], tensor.shape[-1] + rng.choice([-1, 1])], dtype=tensor.dtype)
    elif action == 4:
        tensors[name] = tensor.to(rng.choice([torch.int32, torch.bool, torch.float8_e5m2, torch.complex64]))
    elif action == 5:
        tensors[name] = tensor.to(rng.choice([torch.float16, torch.bfloat16, torch.float64]))
    elif action == 6:
        tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice([math.nan, math.inf, -math.inf])
    elif action == 7:
        tensors[name] = tensor * 2
    else:
        tensors[name] = tensor.mT.contiguous() if tensor.dim() > 1 else tensor[None]
    path.write_bytes(save({key: value.contiguous().clone() for key, value in tensors.items()}, {"format": "pt"}))


def mix(folder, rng):
    kind = rng.choice(list(KINDS))
    shutil.copy(folder.parent / f"original {kind}" / (name := rng.choice([CONFIG, WEIGHTS])), folder / name)


def swap(folder, rng):
    first, second = (folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes()
    (folder / CONFIG).write_bytes(second)
    (folder / WEIGHTS).write_bytes(first)


ON_A_FILE = [flip_bytes, flip_bytes, cut, insert, overwrite, remove, become_folder, become_link]
ON_BOTH = [
    edit_field,
    edit_field,
    nudge_field,
    describe,
    edit_header,
    edit_header,
    edit_tensors,
    edit_tensors,
    mix,
    swap,
]


def mutate(folder, rng):
    """Change a folder in one to three ways, and name them."""
    done = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        mutation = rng.choice(ON_A_FILE + ON_BOTH)
        try:
            if mutation in ON_A_FILE:
                mutation(folder / rng.choice([CONFIG, WEIGHTS]), rng)
            else:
                mutation(folder, rng)
        except Exception:
            if not done:
                raise
            continue  # An earlier mutation left nothing that this one could read.
        done.append(mutation.__name__)
    return done


# What may be accepted, told without the library's own reader


def functional(config):
    return {name: value for name, value in config.to_dict().items() if name not in DESCRIPTION}


def carries_digest(path):
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return "rank_experts_sha256" in header.get("__metadata__", {}) and "rank_experts_config" in header["__metadata__"]


class Originals:
    """One adapter of each kind, its model, and its folder as our library and as PEFT writes it."""

    def __init__(self, place):
        self.place = place
        self.models, self.prints, self.tensors, self.configs = {}, {}, {}, {}
        for kind, (make, config) in KINDS.items():
            self.models[kind] = make()
            self.prints[kind] = fingerprint(self.models[kind])
            folder = place / f"original {kind}"
            save_rank_experts(inject_rank_experts(make(), config), folder)
            self.tensors[kind] = load_file(folder / WEIGHTS)
            self.configs[kind] = functional(read_config(folder))

    def copy(self, kind, with_digest):
        folder = self.place / "case"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.place / f"original {kind}", folder)
        if not with_digest:
            save_file(self.tensors[kind], folder / WEIGHTS, metadata={"format": "pt"})
        return folder

    def check_accepted(self, kind, folder, model):
        config = model.peft_config["default"]
        loaded = {
            name if name.startswith(PREFIX) else PREFIX + name: tensor
            for name, tensor in get_peft_model_state_dict(model).items()
        }
        if carries_digest(folder / WEIGHTS):
            # Of the adapters that were saved, one and the same in both halves.
            whole = [
                known
                for known in KINDS
                if functional(config) == self.configs[known] and equal(loaded, self.tensors[known])
            ]
            assert whole, "a folder with a digest was accepted and is none of the adapters that were saved"
            return "unchanged"
        found = load_file(folder / WEIGHTS)
        # bias="all" lets PEFT write the biases within modules_to_save again; those copies may be left out.
        assert all(name.endswith(("_module.bias", "_save.bias")) for name in loaded.keys() - found.keys())
        assert equal({name: loaded[name] for name in found}, {n: t.to(loaded[n].dtype) for n, t in found.items()})
        assert all(tensor.isfinite().all() for tensor in found.values())
        assert all(
            tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64) for tensor in found.values()
        )
        values = json.loads((folder / CONFIG).read_bytes())
        for name, value in values.items():
            if not hasattr(config, name):
                # As a newer PEFT writes a field that was not used.
                assert value is None or value is False or value in ([], {}, ""), name
                continue
            used = getattr(config, name)
            if name not in {*DESCRIPTION, "peft_type", "target_modules", "exclude_modules"}:
                assert used == value or (value is None and used in ({}, None)), name
        probe = dict(input_ids=torch.ones(1, 3, dtype=torch.long))
        if config.router == "task":
            probe["task_ids"] = torch.zeros(1, dtype=torch.long)
        model.eval()(**probe)
        return "another valid adapter"


def says_ours(folder):
    try:
        return json.loads((folder / CONFIG).read_bytes())["peft_type"] == "RANK_EXPERTS"
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return False


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


REFUSALS = (ValueError, TypeError, OSError)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    shm = Path("/dev/shm")
    folder = tmp_path_factory.mktemp("fuzz")
    if not os.access(shm, os.W_OK):
        yield folder
        return
    memory = shm / f"rank-experts-fuzz-{os.getpid()}"
    memory.mkdir()
    yield memory
    shutil.rmtree(memory)


def test_mutated_adapter_folders_are_refused_or_right(place):
    originals = Originals(place)
    outcomes, mutations, refusals = Counter(), Counter(), Counter()
    start, memory = time.time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    only = os.environ.get("RANK_EXPERTS_FUZZ_CASE")
    for number in [int(only)] if only else range(CASES):
        rng = random.Random(number)
        kind = rng.choice(list(KINDS))
        folder = originals.copy(kind, with_digest=rng.random() < 0.6)
        done = mutate(folder, rng)
        mutations.update(done)
        # PEFT's door is ours only while the config says so.
        load = PeftModel.from_pretrained if rng.random() < 0.2 and says_ours(folder) else load_rank_experts
        model = originals.models[kind]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loaded = load(model, folder)
        except REFUSALS as error:
            assert error.args, f"case {number}: an error without a message"  # noqa: PT017
            try:
                assert_unchanged(model, originals.prints[kind])
            except AssertionError as changed:
                raise AssertionError(f"case {number} ({kind}, {done}) was refused and changed the model") from changed
            outcomes["refused"] += 1
            refusals[type(error).__name__] += 1
            continue
        except Exception as error:
            raise AssertionError(f"case {number} ({kind}, {done}) crashed") from error
        try:
            outcomes[originals.check_accepted(kind, folder, loaded)] += 1
        except Exception as error:
            raise AssertionError(f"case {number} ({kind}, {done}) was accepted wrongly") from error
        originals.models[kind] = KINDS[kind][0]()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) // 1024
    assert grown < 400
    if only:
        return
    assert outcomes["refused"] > CASES / 2
    assert outcomes["unchanged"]
    assert outcomes["another valid adapter"]
    if report := os.environ.get("RANK_EXPERTS_FUZZ_REPORT"):
        summary = {
            "command": "make fuzz",
            "folders": CASES,
            "accepted wrongly": 0,
            "crashed": 0,
            "model changed by a refusal": 0,
            "outcomes": dict(outcomes.most_common()),
            "refused with": dict(refusals.most_common()),
            "mutations": dict(mutations.most_common()),
            "peak memory grew by MiB": grown,
            "seconds": round(time.time() - start),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "peft": peft.__version__,
                "safetensors": safetensors.__version__,
            },
        }
        Path(report).parent.mkdir(parents=True, exist_ok=True)
        Path(report).write_text(json.dumps(summary, indent=2) + "\n")


# Configs

FIELDS = [name for name in RankExpertConfig.__dataclass_fields__ if name != "peft_type"]
GOOD = {
    "router": ["token", "task", "dense"],
    "r": [1, 2, 4, 8, 12],
    "top_k": [1, 2, 4],
    "expert_rank": [1, 2, 4],
    "tasks": [None, ["a"], ["a", "b"]],
    "task_embedding_dim": [None, 4, 32],
    "target_modules": [["q_proj"], "all-linear", r".*\.(q|v)_proj", ["nothing"], ["model"], ["embed_tokens"]],
    "exclude_modules": [None, ["v_proj"], ".*1.*"],
    "layers_to_transform": [None, [0], 1, [7]],
    "layers_pattern": [None, "layers", ["layers"]],
    "rank_pattern": [{}, {"q_proj": 4}, {".*": 2}],
    "alpha_pattern": [{}, {"q_proj": 4.5}],
    "modules_to_save": [None, ["lm_head"], ["nothing"]],
    "bias": ["none", "all", "rank_experts_only"],
    "score_function": ["sigmoid", "softmax"],
    "dropout": [0.0, 0.5],
}
BAD = [value for value in JUNK if value not in (10**12, 2**64)]


def values_of(name):
    good = st.sampled_from(GOOD[name]) if name in GOOD else st.nothing()
    return good | good | st.sampled_from(BAD) | st.text(max_size=4) | st.integers(-2, 5) | st.floats()


configs = st.fixed_dictionaries({}, optional={name: values_of(name) for name in FIELDS})
ALWAYS = ("r", "top_k", "expert_rank", "target_modules")
mostly_good = st.fixed_dictionaries(
    {name: st.sampled_from(GOOD[name]) for name in ALWAYS},
    optional={name: st.sampled_from(values) for name, values in GOOD.items() if name not in ALWAYS},
)
PROFILE = settings(
    max_examples=CASES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


@PROFILE
@given(values=configs | mostly_good)
def test_configs_are_refused_or_survive_a_round_trip(place, values):
    try:
        config = RankExpertConfig(**copy.deepcopy(values))
    except (ValueError, TypeError) as error:
        assert str(error)  # noqa: PT017
        return
    folder = place / "config"
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(config_to_json(config))
    again = read_config(folder)
    assert functional(again) == functional(config)
    assert {name: getattr(again, name) for name in DESCRIPTION - {"inference_mode"}} == {
        name: getattr(config, name) for name in DESCRIPTION - {"inference_mode"}
    }


@PROFILE
@given(values=mostly_good)
def test_configs_are_injected_or_leave_the_model_alone(values):
    model = llama(num_hidden_layers=1)
    before = fingerprint(model)
    try:
        config = RankExpertConfig(**copy.deepcopy(values))
        inject_rank_experts(model, config)
    except (ValueError, TypeError) as error:
        assert str(error)  # noqa: PT017
        assert_unchanged(model, before)
        return
    task = {"task_ids": torch.zeros(1, dtype=torch.long)} if config.router == "task" else {}
    assert model.eval()(input_ids=torch.ones(1, 3, dtype=torch.long), **task).logits.isfinite().all()


# Task specifications

NAMES = ["cola", "mnli", "rte"]
DTYPES = [torch.int64, torch.int32, torch.uint8, torch.int8, torch.float32, torch.bool, torch.complex64]
tensors = st.builds(
    lambda values, dtype, dims: torch.tensor(values).to(dtype).reshape([1] * dims + [-1]),
    st.lists(st.integers(0, 3), max_size=5),
    st.sampled_from(DTYPES),
    st.integers(0, 1),
)
names = st.sampled_from([*NAMES, "Cola", "", "rt"])
specifications = (
    names | st.lists(names, max_size=5) | tensors | st.none() | st.integers() | st.lists(st.integers(), max_size=3)
)


@pytest.fixture(scope="module")
def routed():
    torch.manual_seed(0)
    model = inject_rank_experts(llama(num_hidden_layers=1), task_config(r=8, rank_scaling="linear", **SMALL)).eval()
    ids = torch.randint(1, 64, (4, 3))
    with torch.no_grad():
        rows = [[model(input_ids=ids[i : i + 1], task_ids=name).logits[0] for name in NAMES] for i in range(4)]
    return model, ids, torch.stack([torch.stack(row) for row in rows])


@PROFILE
@given(tasks=specifications)
def test_task_specifications_are_refused_or_followed(routed, tasks):
    model, ids, expected = routed
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, task_ids=tasks).logits
    except (ValueError, TypeError) as error:
        assert str(error)  # noqa: PT017
        assert not is_good(tasks)
    else:
        assert is_good(tasks)
        chosen = [NAMES.index(task) for task in tasks] if isinstance(tasks, list) else tasks
        chosen = [NAMES.index(tasks)] if isinstance(tasks, str) else [int(task) for task in chosen]
        chosen = [task for task in chosen for _ in range(4 // len(chosen))]
        torch.testing.assert_close(logits, expected[torch.arange(4), torch.tensor(chosen)])
    assert current_call(routing_scopes(model)[0]) is None


def is_good(tasks):
    """What a caller may say for four examples: one task for all, or one for each."""
    if isinstance(tasks, str):
        return tasks in NAMES
    if isinstance(tasks, list):
        return len(tasks) in (1, 4) and all(name in NAMES for name in tasks)
    if isinstance(tasks, torch.Tensor):
        whole = not (tasks.is_floating_point() or tasks.is_complex() or tasks.dtype == torch.bool)
        return whole and tasks.dim() == 1 and len(tasks) in (1, 4) and bool((tasks < 3).all())
    return False
