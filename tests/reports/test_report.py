"""What a recording counts, what the report and the page say of it, and the model card."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification

from helpers import TASKS, dense_config, task_config, token_config
from models import CheckpointedBlock, batch, bert, llama, t5
from rank_experts import RankExpertConfig, inject_rank_experts, merge_rank_experts, save_rank_experts, use_task
from rank_experts.files.card import CARD_FILE, model_card
from rank_experts.files.layout import tensor_shapes
from rank_experts.files.saving import config_to_json
from rank_experts.layers import adapted_layers
from rank_experts.messages import printable
from rank_experts.reports.charts import load_class, principal_plane
from rank_experts.reports.page import group_by_kind
from rank_experts.reports.report import inspect_adapter, record_routing, routing_report
from rank_experts.routing.statistics import LayerStatistics
from rank_experts.storage.pair import write_pair
from rank_experts_cli import main

IDS = torch.tensor([0, 2, 1, 0])


def independent_counts(model, inputs, num_tasks=3):
    """Count with forward hooks on the layers and a plain loop; (T + 1, E) by layer, row 0 without a task."""
    counts, handles = {}, []
    mask, ids = inputs["attention_mask"], inputs.get("task_ids")
    for path, layer in adapted_layers(model):

        def count(layer, args, path=path):
            router = layer.rank_experts["default"]
            scores = (args[0].reshape(-1, layer.in_features) @ router.router_weight.T).sigmoid() + router.balance_bias
            table = torch.zeros(num_tasks + 1, len(router.router_weight), dtype=torch.int64)
            tokens = len(scores) // len(mask)
            for row, chosen in enumerate(scores.topk(router.settings.top_k).indices.tolist()):
                example, position = divmod(row, tokens)
                if tokens == 1 or mask[example, position]:
                    for expert in chosen:
                        table[0 if ids is None else 1 + int(ids[example]), expert] += 1
            counts[path] = table

        handles.append(layer.register_forward_pre_hook(count))
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    return counts


def usages(stats):
    return {layer.path: layer.counts.usage for layer in stats.layers()}


def assert_same_usages(first, second):
    assert first.keys() == second.keys()
    assert first
    for path, usage in first.items():
        assert torch.equal(usage, second[path]), path


@pytest.mark.parametrize("kind", [{}, {"expert_rank": 4, "top_k": 2}], ids=["ranks", "blocks"])
def test_a_recording_counts_what_hooks_count(kind):
    model = inject_rank_experts(bert(), token_config(**kind)).eval()
    inputs = batch("bert") | {"task_ids": IDS}
    expected = independent_counts(model, inputs)
    with record_routing(model, TASKS) as stats:
        model(**inputs)
    assert_same_usages(usages(stats), expected)
    with record_routing(model, TASKS) as stats:
        model(**inputs)
        model(**batch("bert"))  # without tasks
    untold = independent_counts(model, batch("bert"))
    assert_same_usages(usages(stats), {path: table + untold[path] for path, table in expected.items()})
    layer = stats.layers()[0]
    assert layer.counts.tokens.tolist() == [24, 12, 7, 5]
    assert layer.tasks == tuple(TASKS)


def test_the_numbers_of_a_layer():
    model = inject_rank_experts(llama(), token_config()).eval()
    adapted, seen = next(adapted_layers(model))[1], []
    handle = adapted.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    inputs = batch("llama")
    with record_routing(model) as stats:
        model(**inputs)
    handle.remove()
    routings = [adapted.rank_experts["default"].token_gate().route(seen[0].reshape(-1, adapted.in_features).detach())]
    layer, kept = stats.layers()[0], inputs["attention_mask"].reshape(-1).bool()
    p = routings[0].probabilities[kept].detach().double()
    entropy = -(p * p.log()).sum(-1) / torch.tensor(16.0).log()
    assert layer.routing_entropy == pytest.approx(float(entropy.mean()))
    load = torch.bincount(routings[0].indices[kept].reshape(-1), minlength=16).double()
    share = load[load > 0] / load.sum()
    assert layer.load_entropy == pytest.approx(float(-(share * share.log()).sum() / torch.tensor(16.0).log()))
    assert layer.load_cv == pytest.approx(float(load.std(correction=0) / load.mean()))
    assert layer.load_max == pytest.approx(float(load.max() / load.mean()))
    assert layer.dead_experts == [i for i in range(16) if load[i] == 0]


def test_an_expert_that_is_never_chosen_is_dead():
    model = inject_rank_experts(llama(), token_config(target_modules=["q_proj"])).eval()
    for _, layer in adapted_layers(model):
        layer.rank_experts["default"].balance_bias[5] = -2
    report = routing_report(model, [batch("llama", size=16, length=12)])
    assert all(5 in layer.dead_experts for layer in report.layers)
    warnings = [found.text for found in report.findings if found.level == "warning"]
    assert any("experts were never chosen" in text and "Raise balance_rate" in text for text in warnings)
    assert any("bias has grown to 2.00" in text for text in warnings)


def test_a_task_router_is_recorded_by_task():
    model = inject_rank_experts(bert(), task_config()).eval()
    with record_routing(model) as stats:
        model(**batch("bert"), task_ids=IDS)
    for layer, (_, adapted) in zip(stats.layers(), adapted_layers(model), strict=True):
        router = adapted.rank_experts["default"]
        chosen = router.task_gate().route(torch.arange(3)).indices
        assert torch.equal(layer.chosen_rank, chosen)
        tokens = [4] if layer.path in ("bert.pooler.dense", "classifier") else [24]
        assert int(layer.counts.tokens.sum()) == tokens[0]
        per_token = layer.counts.usage.sum(-1)[1:] / layer.counts.tokens[1:]
        assert torch.equal(per_token, chosen.float())
        assert ((layer.task_usage == 1) == (torch.arange(4) < chosen[:, None])).all()
        low, high = sorted(chosen[:2].tolist())
        assert layer.task_overlap[0, 1] == pytest.approx(low / high)
        cosine = torch.cosine_similarity(router.task_embedding[0], router.task_embedding[1], dim=0)
        assert float(layer.embedding_similarity[0, 1]) == pytest.approx(float(cosine), abs=1e-6)


def test_an_encoder_decoder_counts_its_two_paddings_apart():
    model = inject_rank_experts(t5(), token_config()).eval()
    inputs = batch("t5")
    inputs["labels"][0, -2:] = -100
    with record_routing(model) as stats:
        model(**inputs)
    for layer in stats.layers():
        from_encoder = layer.path.startswith("encoder") or layer.path.endswith(
            ("EncDecAttention.k", "EncDecAttention.v")
        )
        assert int(layer.counts.tokens.sum()) == (24 if from_encoder else 18), layer.path


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("kind", ["token", "task"])
def test_a_recomputation_counts_once(kind, use_reentrant):
    counts = []
    for checkpointing in (False, True):
        model = inject_rank_experts(llama(), token_config() if kind == "token" else task_config()).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        with record_routing(model) as stats:
            for _ in range(2):
                model(**batch("llama"), task_ids=IDS).loss.backward()
        counts.append(usages(stats))
    assert_same_usages(*counts)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_block_checkpointed_by_hand_counts_once(use_reentrant):
    model = inject_rank_experts(CheckpointedBlock(use_reentrant), token_config(target_modules=["proj"])).train()
    with record_routing(model) as stats:
        model(torch.randn(3, 5, 6, requires_grad=True)).sum().backward()
    assert int(stats.layers()[0].counts.tokens.sum()) == 15


def test_a_compiled_model_is_recorded_too():
    model = inject_rank_experts(llama(), token_config()).eval()
    inputs = batch("llama") | {"task_ids": IDS}
    compiled = torch.compile(model, backend="eager")
    compiled(**inputs)
    with record_routing(compiled, TASKS) as stats:
        compiled(**inputs)
    assert_same_usages(usages(stats), independent_counts(model, inputs))


def test_recording_changes_outputs_by_rounding_alone_and_ends_with_its_block():
    model = inject_rank_experts(llama(), token_config()).eval()
    before = model(**batch("llama")).logits
    with record_routing(model) as outer:
        with record_routing(model) as inner:
            # Watched layers compute apart what they compute together otherwise, which rounds differently.
            torch.testing.assert_close(model(**batch("llama")).logits, before, rtol=0, atol=1e-6)
        once = usages(outer)
        assert_same_usages(once, usages(inner))
        model(**batch("llama"))
    assert torch.equal(model(**batch("llama")).logits, before)
    assert_same_usages(usages(inner), once)
    assert_same_usages(usages(outer), {path: 2 * table for path, table in once.items()})


def test_tasks_by_name_grow_as_they_are_met():
    model = inject_rank_experts(llama(), token_config()).eval()
    with record_routing(model) as stats:
        model(**batch("llama"), task_ids="rte")
        model(**batch("llama"), task_ids=["cola", "rte", "cola", "cola"])
    layer = stats.layers()[0]
    assert layer.tasks == ("rte", "cola")
    assert layer.counts.tokens.tolist() == [0, 24 + 5, 19]
    with record_routing(model) as stats:
        model(**batch("llama"), task_ids=torch.tensor([2, 2, 0, 0]))
    assert stats.layers()[0].tasks == ("task 0", "task 1", "task 2")
    assert stats.layers()[0].counts.tokens.tolist() == [0, 12, 0, 12]
    with record_routing(model, TASKS), pytest.raises(ValueError, match="expected 0…2"):
        model(**batch("llama"), task_ids=torch.tensor([0, 1, 2, 3]))
    with record_routing(model, TASKS), pytest.raises(ValueError, match="not \\['sst'\\]"):
        model(**batch("llama"), task_ids="sst")


def test_several_adapters_are_recorded_apart():
    model = get_peft_model(llama(), token_config(), adapter_name="one")
    model.add_adapter("two", task_config())
    model.eval()
    inputs = batch("llama", labels=False)
    with record_routing(model) as stats:
        model(**inputs, adapter_names=["one", "two", "__base__", "one"], task_ids=torch.tensor([0, 1, 2, 0]))
    first, second = stats.layers("one")[0], stats.layers("two")[0]
    # Of the second and fourth example two tokens are padding.
    assert int(first.counts.tokens.sum()) == 7 + 5
    assert second.counts.tokens.tolist() == [0, 0, 5, 0]
    assert stats.layers()[0].router == "token"
    with pytest.raises(ValueError, match="no routed adapter 'three'"):
        stats.layers("three")


def test_generation_is_recorded():
    model = inject_rank_experts(llama(), task_config()).eval()
    with record_routing(model) as stats, use_task(model, "mnli"):
        model.generate(input_ids=torch.ones(1, 4, dtype=torch.int64), max_new_tokens=3, do_sample=False)
    assert stats.layers()[0].counts.tokens.tolist() == [0, 0, 4 + 2, 0]


def _rank(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = inject_rank_experts(llama(), token_config(target_modules=["q_proj"])).eval()
    with record_routing(model) as stats:
        if rank == 0:
            model(**batch("llama"), task_ids=["rte", "cola", "rte", "cola"])
            model(**batch("llama"), task_ids="cola")
    total = stats.all_reduce()
    layer = total.layers()[0]
    assert torch.equal(stats.all_reduce().layers()[0].counts.usage, layer.counts.usage)  # not twice as much
    assert (stats.layers()[0].counts is None) == (rank == 1)
    torch.save((layer.tasks, layer.counts.usage, layer.counts.tokens), f"{folder}/{rank}")
    if rank == 0:
        assert torch.equal(stats.layers()[0].counts.usage, layer.counts.usage)
    dist.destroy_process_group()


def test_ranks_add_up_also_where_one_saw_nothing(tmp_path):
    mp.start_processes(_rank, args=(str(tmp_path),), nprocs=2, start_method="fork")
    (tasks, usage, tokens), again = torch.load(tmp_path / "0"), torch.load(tmp_path / "1")
    assert tasks == again[0] == ("rte", "cola")
    assert torch.equal(usage, again[1])
    assert usage.sum() > 0
    assert tokens.tolist() == again[2].tolist() == [0, 14, 10 + 24]


def test_nothing_to_record_is_said():
    with pytest.raises(ValueError, match="no routed adapter"), record_routing(llama()):
        pass
    model = inject_rank_experts(llama(), task_config()).train()
    with pytest.raises(ValueError, match="saw no token"):
        routing_report(model, [])
    merge_rank_experts(model, task="rte")
    with pytest.raises(ValueError, match="unmerge_rank_experts"):
        routing_report(model, [batch("llama") | {"task_ids": torch.full((4,), 2)}])
    with pytest.raises(TypeError, match="expected keyword arguments"):
        routing_report(model, [torch.ones(2, 3)])
    assert all(module.training for module in model.modules())


class Page(HTMLParser):
    """Collects what a page holds."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.classes, self.references = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        attributes = dict(attributes)
        self.classes.append(attributes.get("class") or "")
        self.references += [value for name, value in attributes.items() if name in ("src", "href", "xlink:href")]

    def handle_data(self, data):
        self.words.append(data)


HISTORY = [
    {"loss": 2.0, "load_cv": 0.9, "load_max": 3.0, "load_idle": 0.1, "rank_cola": 2.0, "step": 10},
    {"loss": 1.0, "load_cv": 0.4, "load_max": 2.0, "load_idle": 0.0, "rank_cola": 3.0, "step": 20},
    {"eval_loss": 1.0, "step": 20},
]


def headings(text):
    return re.findall(r"<h2>(.*?)</h2>", text)


def test_the_page_of_a_token_router(tmp_path):
    model = inject_rank_experts(bert(), token_config()).eval()
    inputs = batch("bert") | {"task_ids": IDS}
    evil = ["<script>alert(1)</script>", 'a"b', "c&d"]
    report = routing_report(model, [inputs], tmp_path / "page.html", tasks=evil, log_history=HISTORY)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert headings(text) == [
        "Load of the experts",
        "Tasks and experts",
        "Experts shared between tasks",
        "Map of the tasks",
        "During the training",
        "Size of each rank&#x27;s update",
    ]
    assert page.tags.count("polyline") == 5
    assert page.tags.count("circle") == 3
    # Nothing is loaded from anywhere and nothing in a name becomes markup.
    assert not page.references
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert "http" not in text.replace("http-equiv", "")
    assert "url(" not in text
    assert "@import" not in text
    assert "<script>alert(1)</script>" in "".join(page.words)
    # A strip has a cell an expert, and experts that were never chosen stand out.
    layer = report.layers[0]
    strip = re.search(rf'aria-label="{re.escape(layer.path)}: cv.*?</svg>', text)[0]
    widths = [int(width) for width in re.findall(r'width="(\d+)"', strip)]
    assert sum(widths) == 16
    cells = [cls for width, cls in zip(widths, re.findall(r'class="(\w+)"', strip)) for _ in range(width)]
    assert [i for i, cls in enumerate(cells) if cls == "x"] == layer.dead_experts
    assert f"{layer.load_cv:.2f}" in page.words


def test_the_page_of_a_task_router():
    model = inject_rank_experts(bert(), task_config()).eval()
    report = routing_report(model, [batch("bert") | {"task_ids": IDS}], log_history=HISTORY)
    text = report.to_html()
    assert headings(text)[:3] == ["Tasks and ranks", "Experts shared between tasks", "Map of the tasks"]
    shown = re.search(r'title="attention.self.query".*?</figure>', text)[0]
    numbers = [int(number) for number in re.findall(r'<td class="cell q\d+">(\d)</td>', shown)]
    assert numbers == [int(n) for i in (0, 6) for n in report.layers[i].chosen_rank]
    table = report.to_text()
    for layer in report.layers:
        line = next(line for line in table.splitlines() if line.startswith(layer.path + " "))
        assert [int(cell) for cell in line.split()[4:7]] == layer.chosen_rank.tolist()
    means = torch.stack([layer.chosen_rank for layer in report.layers]).double().mean(0)
    assert f"Mean rank by task: cola {means[0]:.1f}, mnli {means[1]:.1f}, rte {means[2]:.1f}." in table


def test_layers_are_grouped_by_kind():
    assert list(group_by_kind(["encoder.block.0.q", "decoder.block.0.q"])) == ["encoder.block q", "decoder.block q"]
    assert group_by_kind(["h.0.q", "lm_head", "h.1.q"]) == {
        "q": [("0", 0), ("1", 2)],
        "other layers": [("lm_head", 1)],
    }


def test_colours_of_loads():
    assert [load_class(x) for x in (0, 0.25, 0.1, 1, 1.01, 4, 100)] == ["x", "b10", "b10", "n", "n", "o10", "o10"]


def test_the_map_keeps_distances_of_a_plane():
    torch.manual_seed(0)
    plane = torch.randn(5, 2, dtype=torch.float64)
    points = plane @ torch.linalg.qr(torch.randn(7, 2, dtype=torch.float64))[0].T + 3
    places, share = principal_plane(points)
    torch.testing.assert_close(torch.cdist(places, places), torch.cdist(plane, plane))
    assert float(share.sum()) == pytest.approx(1)
    assert share[0] >= share[1]


@pytest.mark.parametrize("config", [token_config, task_config])
def test_files_alone_tell_what_the_model_tells(tmp_path, config):
    model = inject_rank_experts(bert(), config()).eval()
    for i, (_, layer) in enumerate(adapted_layers(model)):
        if config is token_config:
            layer.rank_experts["default"].balance_bias += torch.linspace(-0.1, 0.1 + i / 100, 16)
    save_rank_experts(model, tmp_path)
    live = {layer.path: layer for layer in routing_report(model, [batch("bert") | {"task_ids": IDS}]).layers}
    report = inspect_adapter(tmp_path)
    assert {layer.path for layer in report.layers} == live.keys()
    for layer in report.layers:
        assert layer.load is None
        assert layer.sizes == live[layer.path].sizes
        for name in ("balance_bias", "task_embedding", "chosen_rank", "update_norm"):
            mine, theirs = getattr(layer, name), getattr(live[layer.path], name)
            assert (mine is None and theirs is None) or torch.equal(mine, theirs), name
    expected = "Balancing bias" if config is token_config else "Tasks and ranks"
    assert headings(report.to_html())[0] == expected
    assert f"{sum(t.numel() for t in load_file(tmp_path / 'adapter_model.safetensors').values()):,}" in report.to_text()
    if config is token_config:
        line = next(line for line in report.to_text().splitlines() if line.startswith("classifier "))
        assert "-0.100 … +0.230" in line


def test_what_the_files_tell_as_json(tmp_path):
    model = inject_rank_experts(llama(), task_config())
    save_rank_experts(model, tmp_path)
    found = json.loads(json.dumps(inspect_adapter(tmp_path).to_dict(), allow_nan=False))
    assert found["tasks"] == TASKS
    assert found["config"]["r"] == 4
    cosines = []
    layers = dict(adapted_layers(model))
    assert {told["path"] for told in found["layers"]} == layers.keys()
    for told in found["layers"]:
        layer = layers[told["path"]]
        router = layer.rank_experts["default"]
        assert told["sizes"] == [4, layer.in_features, layer.out_features]
        assert told["chosen_rank"] == router.task_gate().route(torch.arange(3)).indices.tolist()
        e = router.task_embedding
        cosines.append(torch.cosine_similarity(e[:, None], e[None], dim=-1))
    expected = torch.stack(cosines).mean(0).tolist()
    assert found["task_similarity"] == [pytest.approx(row, abs=1e-5) for row in expected]
    text = inspect_adapter(tmp_path).to_text()
    head, *rows = [line.split() for line in text.splitlines() if line.startswith(("task ", *(f"{t} " for t in TASKS)))]
    assert head == ["task", "mean", "rank", "least", "most", "like", "cola", "like", "mnli", "like", "rte"]
    ranks = torch.tensor([layer["chosen_rank"] for layer in found["layers"]])
    for task, name in enumerate(TASKS):
        own = ranks[:, task]
        spread = [f"{own.double().mean():.1f}", str(int(own.min())), str(int(own.max()))]
        assert rows[task] == [name, *spread, *(f"{value:.2f}" for value in expected[task])]


def test_a_task_that_was_not_seen_is_null_in_json():
    model = inject_rank_experts(bert(), token_config())
    report = routing_report(model, [batch("bert") | {"task_ids": torch.tensor([0, 0, 2, 2])}])
    usage = json.loads(json.dumps(report.to_dict(), allow_nan=False))["layers"][0]["task_usage"]
    assert [row[0] is None for row in usage] == [False, True, False]


METHODS = {
    "SMoRA (token-routed ranks)": token_config(),
    "mixture of LoRAs (token-routed blocks of ranks)": token_config(expert_rank=4, top_k=2),
    "MoRE (task-routed ranks)": task_config(),
    "LoRA (no router)": dense_config(),
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_and_the_base_model_are_named(tmp_path, method):
    model = inject_rank_experts(llama(), METHODS[method])
    model.peft_config["default"].base_model_name_or_path = "some/llama"
    save_rank_experts(model, tmp_path)
    facts = inspect_adapter(tmp_path).facts
    assert facts["method"] == method
    assert facts["base model"] == "some/llama"


def test_an_untrained_adapter_is_called_so(tmp_path):
    save_rank_experts(inject_rank_experts(bert(), token_config(init_weights=True)), tmp_path)
    texts = [found.text for found in inspect_adapter(tmp_path).findings]
    assert any("B is zero in every layer" in text for text in texts)
    assert any("Every balancing bias is zero" in text for text in texts)


def test_files_that_do_not_fit_together_are_refused(tmp_path):
    save_rank_experts(inject_rank_experts(bert(), task_config()), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.classifier.rank_experts.gate_bias"
    for broken in ({key: torch.zeros(9)}, {key.replace("gate_bias", "B"): torch.zeros(3)}):
        save_file(tensors | broken, file)
        with pytest.raises(ValueError, match="classifier do not fit together"):
            inspect_adapter(tmp_path)
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, file)
    with pytest.raises(ValueError, match="classifier do not fit together"):
        inspect_adapter(tmp_path)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        inspect_adapter(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError):
        inspect_adapter(tmp_path)


def named(config):
    config.base_model_name_or_path = "google-bert/bert-base-uncased"
    return config


@pytest.mark.filterwarnings("ignore:Unable to fetch remote file", "ignore:Could not find a config file")
@pytest.mark.parametrize("config", [token_config, task_config])
def test_the_card_is_one_that_the_hub_reads(tmp_path, config):
    model = inject_rank_experts(bert(), named(config(task_type="SEQ_CLS")))
    save_rank_experts(model, tmp_path)
    card = ModelCard.load(tmp_path / CARD_FILE)
    data = card.data.to_dict()
    assert data["base_model"] == "google-bert/bert-base-uncased"
    assert data["library_name"] == "peft"
    assert data["pipeline_tag"] == "text-classification"
    assert "rank-experts" in data["tags"]
    assert ("smora" if config is token_config else "more") in data["tags"]
    again = ModelCard(str(card))
    assert again.data.to_dict() == data
    assert again.text == card.text
    if config is task_config:
        chosen = torch.stack([layer.chosen_rank for layer in inspect_adapter(tmp_path).layers]).double()
        mean, low, high = float(chosen[:, 1].mean()), int(chosen[:, 1].min()), int(chosen[:, 1].max())
        assert f"- `mnli`: {mean:.1f} ({low} to {high})\n" in card.text


@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
def test_the_card_s_snippet_runs(tmp_path, task_type):
    base = tmp_path / "base"
    bert().save_pretrained(base)
    auto_class = AutoModel if task_type is None else AutoModelForSequenceClassification
    model = inject_rank_experts(auto_class.from_pretrained(base), task_config(task_type=task_type)).eval()
    folder = tmp_path / "adapter"
    save_rank_experts(model, folder)
    text = (folder / CARD_FILE).read_text()
    assert "base_model" not in ModelCard(text).data.to_dict()  # a folder is no repository
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    names = {"inputs": batch("bert", labels=False)}
    exec(code.replace("this-adapter", str(folder)), names)
    expected = model(**names["inputs"], task_ids="cola")
    torch.testing.assert_close(names["outputs"][0], expected[0])
    assert "PeftModel.from_pretrained" in text
    wrapped = PeftModel.from_pretrained(auto_class.from_pretrained(base), folder).eval()
    torch.testing.assert_close(wrapped(**names["inputs"], task_ids="cola")[0], expected[0])


def test_saving_replaces_its_own_card_and_no_other(tmp_path):
    model = inject_rank_experts(bert(), task_config())
    file = tmp_path / CARD_FILE
    save_rank_experts(model, tmp_path)
    first = file.read_text()
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            layer.rank_experts["default"].gate_bias[3] = 100.0
    save_rank_experts(model, tmp_path)
    second = file.read_text()
    assert second != first
    assert "- `cola`: 4.0 (4 to 4)\n" in second
    for edited in (second + "\nTrained with care.\n", second.replace("library_name: peft", "license: mit"), "# Mine\n"):
        file.write_text(edited)
        save_rank_experts(model, tmp_path)
        assert file.read_text() == edited
    file.write_bytes(b"\xff\xfe")
    save_rank_experts(model, tmp_path)
    assert file.read_bytes() == b"\xff\xfe"
    file.unlink()
    (tmp_path / "notes.md").write_text(second)
    file.symlink_to("notes.md")  # ours and unedited, but kept elsewhere
    save_rank_experts(model, tmp_path)
    assert file.is_symlink()


def test_a_folder_is_no_repository(tmp_path, monkeypatch):
    config = named(token_config())
    assert ModelCard(model_card(config, {})).data.base_model == "google-bert/bert-base-uncased"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "google-bert" / "bert-base-uncased").mkdir(parents=True)
    assert "base_model" not in ModelCard(model_card(config, {})).data.to_dict()


def tensors_of(model):
    return {
        f"base_model.model.{name}": tensor
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }


# What names could become where they are shown: markup of Markdown's and HTML's, links, front matter, other code.
NAMES = [
    "a|b",
    "a\\|[b](http://c.d)",
    "---\ntags: [x]",
    "`<b>",
    "``` x",
    "*a* _b_ ~c~ **d**",
    "[link](http://evil.example)",
    "![x](y)",
    "https://evil.example www.evil.example a@evil.example",
    "<!-- -->",
    "</code><script>alert(1)</script>",
    "&lt;b&gt; &#42;",
    "\x1b[31mred",
    "right \u202e left",
    "x\n```\n# heading",
    "a\"'```'''",
    "back\\` slash\\",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_names_in_a_card_stay_text(name):
    """Read as a renderer reads it: every name is a code span's text, and there is no link or emphasis but ours."""
    config = task_config(tasks=["first", name, "third"], target_modules=["query"], base_model_name_or_path=name)
    text = model_card(config, tensors_of(inject_rank_experts(bert(), config)))
    assert set(ModelCard(text).data.to_dict()) == {"library_name", "tags"}
    body = text.split(" -->\n", 1)[1]
    spans, others = [], []
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(body):
        for child in token.children or []:
            (spans if child.type == "code_inline" else others).append(child)
    shown = printable(" ".join(name.split()))
    assert [span.content for span in spans].count(shown) == 2
    assert {child.type for child in others} <= {"text", "softbreak", "link_open", "link_close"}
    links = [child.attrs["href"] for child in others if child.type == "link_open"]
    assert links == ["https://arxiv.org/abs/2505.22694"]
    assert not any("evil" in child.content for child in others)
    assert "\x1b" not in text
    assert "\u202e" not in text


@pytest.mark.parametrize("name", NAMES)
def test_names_in_a_card_s_snippet_are_strings(name):
    """The block ends where it should, and holds calls with the names as they are, and nothing else."""
    config = task_config(tasks=[name], target_modules=["query"], base_model_name_or_path=name, revision=name)
    text = model_card(config, {})
    (block,) = [token.content for token in MarkdownIt().parse(text) if token.type == "fence"]
    tree = ast.parse(block)
    assert [type(node) for node in tree.body] == [ast.ImportFrom, ast.ImportFrom, ast.Assign, ast.Assign, ast.With]
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    assert sorted(strings) == sorted([name, name, name, "this-adapter"])
    assert sum(isinstance(node, ast.Call) for node in ast.walk(tree)) == 4


def test_a_card_lists_so_many_tasks_and_counts_the_rest():
    config = task_config(tasks=[f"task {i}" for i in range(200)], target_modules=["query"])
    text = model_card(config, tensors_of(inject_rank_experts(bert(), config)))
    assert "- `task 63`:" in text
    assert "- `task 64`:" not in text
    assert "\n- and 136 more\n" in text


def test_names_in_a_report_do_not_speak_to_the_terminal(tmp_path, capsys):
    name = "rte\x1b[2J\r\u202e\nforged: line"
    model = inject_rank_experts(bert(), task_config(tasks=["cola", name], base_model_name_or_path=name))
    save_rank_experts(model, tmp_path / "\x1b[31m")
    assert main(["inspect", str(tmp_path / "\x1b[31m")]) == 0
    shown = capsys.readouterr().out
    assert shown.count(r"rte\x1b[2J\r\u202e\nforged: line") >= 4
    assert all(char.isprintable() or char == "\n" for char in shown)
    assert not any(line.startswith("forged") for line in shown.splitlines())


def test_names_in_messages_do_not_speak_to_the_terminal(tmp_path, capsys):
    save_rank_experts(inject_rank_experts(bert(), task_config()), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors = {
        name.replace("query", "\x1b[2J"): t * float("nan") if "query" in name else t for name, t in tensors.items()
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert main(["inspect", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert r"\x1b[2J" in error
    assert "\x1b" not in error


def many_tasks(folder, tasks, r=8, width=2, layers=("q_proj",)):
    """An adapter of many tasks, with alike embeddings, as files alone."""
    names = [f"task {i}" for i in range(tasks)]
    config = RankExpertConfig.more(names, r=r, task_embedding_dim=width, target_modules=list(layers))
    tensors = {}
    for layer in layers:
        shapes = tensor_shapes(config, r, 3, 3)
        generator = torch.Generator().manual_seed(0)
        found = {name: 1 + 0.1 * torch.rand(shape, generator=generator) for name, shape in shapes.items()}
        tensors |= {f"base_model.model.{layer}.rank_experts.{name}": tensor for name, tensor in found.items()}
    write_pair(folder, config_to_json(config), tensors)
    return names


@pytest.mark.parametrize("tasks", [65, 1000])
def test_a_report_on_many_tasks_grows_with_them_and_not_with_their_square(tmp_path, tasks):
    names = many_tasks(tmp_path, tasks)
    report = inspect_adapter(tmp_path)
    text, page, told = report.to_text(), report.to_html(), json.dumps(report.to_dict())
    assert len(text) < 10_000 + 150 * tasks
    assert len(page) < 1_500_000
    assert len(told) < 10_000 + 150 * tasks
    assert report.to_dict()["task_similarity"] is None
    assert f"Of {tasks:,} tasks the first 64 are compared with each other." in text
    assert f"So have {64 * 63 // 2 - 10:,} more pairs of tasks." in text
    assert f"task 63, and {tasks - 64:,} more" in text
    (layer,) = report.layers
    assert report.to_dict()["layers"][0]["chosen_rank"] == layer.chosen_rank.tolist()
    assert len(layer.chosen_rank) == tasks
    assert report.tasks == tuple(names)


def test_up_to_so_many_tasks_all_are_compared(tmp_path):
    many_tasks(tmp_path, 64)
    told = inspect_adapter(tmp_path).to_dict()
    assert torch.tensor(told["task_similarity"]).shape == (64, 64)
    assert torch.tensor(told["layers"][0]["task_overlap"]).shape == (64, 64)
    assert "like task 63" in inspect_adapter(tmp_path).to_text()


# In a process of its own, whose largest size no other test has set.
_GROWTH = """
import json, resource, sys
from rank_experts.reports import inspect_adapter

def look(folder):
    report = inspect_adapter(folder)
    json.dumps(report.to_dict())
    return report.to_text()

look(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
text = look(sys.argv[2])
print(json.dumps({"grown": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, "text": text}))
"""


def test_of_very_many_tasks_the_first_are_looked_at(tmp_path):
    """With many ranks beside them a number for each pair of task and rank would not fit into memory."""
    few, many = tmp_path / "few", tmp_path / "many"
    many_tasks(few, 2)
    many_tasks(many, 50_000, r=20_000, width=1)
    command = [sys.executable, "-c", _GROWTH, str(few), str(many)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert found["grown"] < 500_000  # KiB; the logits alone would be 4 GB
    assert "1,024 of 50,000 tasks are looked at" in found["text"]
    assert len(inspect_adapter(many).tasks) == 1024


def test_shares_of_experts_are_compared_without_a_number_for_each_pair_and_expert():
    chosen = torch.randint(1, 9, (7,), generator=torch.Generator().manual_seed(0))
    layer = LayerStatistics("x", "task", tuple("abcdefg"), (8, 1, 1), 8, torch.zeros(8), chosen_rank=chosen)
    share = layer.task_usage / layer.task_usage.sum(-1, keepdim=True)
    assert torch.equal(layer.task_overlap, torch.minimum(share[:, None], share[None]).sum(-1))
    part = layer.first_tasks(3)
    assert torch.equal(part.task_overlap, layer.task_overlap[:3, :3])
    assert (part.tasks, layer.first_tasks(7)) == (("a", "b", "c"), layer)


@pytest.mark.parametrize("part", ["²", "1" * 5000, "٣"])
def test_layers_with_strange_numbers_are_listed(tmp_path, part):
    many_tasks(tmp_path, 2, layers=(f"h.{part}.q_proj", "h.2.q_proj", "h.10.q_proj"))
    assert [layer.path for layer in inspect_adapter(tmp_path).layers][:2] in (
        ["h.2.q_proj", "h.10.q_proj"],
        [f"h.{part}.q_proj", "h.2.q_proj"],
    )


def test_an_adapter_without_layers_is_reported_too(tmp_path):
    """Its file may hold a module to save alone."""
    config = RankExpertConfig.lora(target_modules=["q_proj"], modules_to_save=["head"])
    write_pair(tmp_path, config_to_json(config), {"base_model.model.head.weight": torch.ones(2, 3)})
    report = inspect_adapter(tmp_path)
    assert "6 (other modules 6)" in report.to_text()
    assert "6 (other modules 6)" in report.to_html()
    assert report.to_dict()["layers"] == []


def test_the_report_writes_plain_text(tmp_path):
    model = inject_rank_experts(llama(), token_config(target_modules=["q_proj"])).eval()
    report = routing_report(model, [batch("llama")] * 3, max_batches=2)
    assert "recorded   48 tokens" in str(report)
    assert json.dumps(str(report))  # no surrogates
    report.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == report.to_html()
