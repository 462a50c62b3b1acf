"""What strangers may send: names for cards and terminals, LoRA configs, requests to the example server.

By default a few hundred examples of each; `make fuzz` runs 10,000 and writes their numbers into docs/results/fuzz.json.
"""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from fuzz_figures import count
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from safetensors.torch import save_file

from rank_experts import RankExpertConfig
from rank_experts.config.expressions import MOST_WAYS, ways
from rank_experts.files.card import model_card
from rank_experts.files.layout import tensor_shapes
from rank_experts.files.lora import read_lora
from rank_experts.messages import printable
from rank_experts.reports.report import RoutingReport

CASES = int(os.environ.get("RANK_EXPERTS_FUZZ", "300"))
PROFILE = settings(
    max_examples=CASES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)

# Names of all kinds, rich in what Markdown, HTML, YAML, Python and terminals take for their own.
SPECIAL = [
    *"`*_[]()<>!|#&\\~\"'-:;@/.\n\r\t\x1b\x00\u202e\u2028 ",
    "```",
    "'''",
    "](",
    "www.",
    "http://",
    "<!--",
    "-->",
]
NAMES = st.lists(st.sampled_from(SPECIAL) | st.text(max_size=4), min_size=1, max_size=12).map("".join)
NAMES = NAMES.filter(lambda name: name.strip() and all(not 0xD800 <= ord(char) < 0xE000 for char in name))


def tensors_of(config):
    shapes = tensor_shapes(config, config.r, 3, 3)
    return {f"base_model.model.q_proj.rank_experts.{name}": torch.ones(shape) for name, shape in shapes.items()}


@PROFILE
@given(first=NAMES, base=NAMES)
def test_names_in_a_card_are_text_and_strings(first, base):
    count("names in cards")
    options = dict(r=2, task_embedding_dim=2, target_modules=["q_proj"], base_model_name_or_path=base, revision=base)
    config = RankExpertConfig.more([first, first + "2"], **options)
    text = model_card(config, tensors_of(config))
    body = text.split(" -->\n", 1)[1]
    blocks, spans, others = [], [], []
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(body):
        blocks.append(token)
        for child in token.children or []:
            (spans if child.type == "code_inline" else others).append(child)
    assert {child.type for child in others} <= {"text", "softbreak", "link_open", "link_close"}
    assert [c.attrs["href"] for c in others if c.type == "link_open"] == ["https://arxiv.org/abs/2505.22694"]
    shown = [span.content for span in spans]
    for name in (first, first + "2", base):
        assert printable(" ".join(name.split())) in shown
    (block,) = [token.content for token in blocks if token.type == "fence"]
    tree = ast.parse(block)
    assert [type(node) for node in tree.body] == [ast.ImportFrom, ast.ImportFrom, ast.Assign, ast.Assign, ast.With]
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    assert sorted(strings) == sorted([base, base, first, "this-adapter"])
    assert not any(token.type in ("html_block", "hr", "heading_open") and token.level for token in blocks)


@PROFILE
@given(name=NAMES, value=NAMES)
def test_names_on_a_terminal_are_printable_and_stay_on_their_line(name, value):
    count("names on terminals")
    text = RoutingReport(name, {"a" + name: value, "x": value}, []).to_text()  # two facts, whatever the name
    assert all(char.isprintable() or char == "\n" for char in text)
    assert len(text.splitlines()) == len(RoutingReport("t", {"a": "b", "x": "c"}, []).to_text().splitlines())


JUNK = st.sampled_from(
    [
        None,
        True,
        0,
        -1,
        7,
        8.5,
        10**400,
        1e39,
        float("nan"),
        float("inf"),
        "",
        "q_proj",
        "(",
        "(a+)+b",
        [],
        {},
        ["q_proj"],
    ]
)
LORA_FIELDS = [
    "lora_alpha",
    "alpha_pattern",
    "use_rslora",
    "rank_pattern",
    "r",
    "bias",
    "init_lora_weights",
    "use_dora",
]


@PROFILE
@given(
    changes=st.dictionaries(
        st.sampled_from(LORA_FIELDS), JUNK | st.dictionaries(st.sampled_from(["q_proj", "(", ".*"]), JUNK), max_size=3
    ),
    r=st.integers(0, 3),
)
@example(changes={}, r=2)
@example(changes={"lora_alpha": 3e38}, r=1)
def test_lora_configs_are_refused_by_a_value_error_or_read_finitely(tmp_path, changes, r):
    count("LoRA configs")
    config = {"peft_type": "LORA", "lora_alpha": 4, "r": 2} | changes
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {"lora_A.weight": torch.ones(r, 4), "lora_B.weight": torch.full((4, r), 9.0)}
    save_file(
        {f"base_model.model.q_proj.{name}": tensor for name, tensor in tensors.items()},
        tmp_path / "adapter_model.safetensors",
    )
    try:
        found = read_lora(tmp_path)
    except ValueError as error:
        assert str(error)  # noqa: PT017
        assert changes or not r
    else:
        _, B, scale = found.layers["q_proj"]
        assert torch.isfinite(B * scale).all()
        assert torch.tensor(float(scale), dtype=torch.float32).isfinite()


@PROFILE
@given(
    st.lists(
        st.sampled_from(
            ["a", "b", ".", r"\w", "[ab]", "[^.]", "(", ")", "*", "+", "?", "|", "{2}", "{1,3}", r"\.", "(?:"]
        ),
        max_size=10,
    ).map("".join)
)
def test_expressions_that_are_accepted_end(expression):
    """On a name that they nearly match; the others are not tried."""
    count("expressions")
    try:
        compiled = re.compile(expression)
    except (re.error, RecursionError, OverflowError):
        return
    if ways(expression) <= MOST_WAYS:
        for name in ("a" * 24 + "!", "ab" * 12 + "!", "a." * 12 + "!"):
            compiled.fullmatch(name)


def load_server():
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    if "serve_example" not in sys.modules:
        path = Path(__file__).parents[2] / "examples/serve.py"
        spec = importlib.util.spec_from_file_location("serve_example", path)
        sys.modules["serve_example"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["serve_example"])
    return sys.modules["serve_example"]


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["rte", "\ud800", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)
GOOD = {"model": "rte", "prompt": "hello", "max_tokens": 4, "temperature": 0.5, "top_p": 0.9, "stop": ["x"]}
BODIES = st.one_of(
    st.binary(max_size=60),
    VALUES.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(
        st.sampled_from([*GOOD, "user", "stream"]), VALUES | st.integers(-2, 3) | st.floats(-1, 3), max_size=3
    ).map(lambda changes: json.dumps(GOOD | changes).encode()),
)


@PROFILE
@given(body=BODIES, cut=st.integers(1, 40))
@example(body=json.dumps(GOOD).encode(), cut=7)
@example(body=json.dumps(GOOD | {"max_tokens": 0}).encode(), cut=7)
@example(body=json.dumps(GOOD | {"top_p": 0}).encode(), cut=7)
@example(body=json.dumps(GOOD | {"stop": [""]}).encode(), cut=7)
def test_bodies_are_requests_within_their_bounds_or_refused(body, cut):
    count("request bodies")
    server = load_server()
    bounds = server.Bounds(max_body_bytes=150)
    parts = [body[i : i + cut] for i in range(0, len(body), cut)] or [b""]

    async def receive():
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", b"application/json")]}
    request = refusal = None
    try:
        request = asyncio.run(server.read_request(server.Request(scope, receive), bounds))
    except server.RequestError as error:
        refusal = error
    if request is None:
        assert refusal.status == (413 if len(body) > 150 else 400)
        answer = server._error(refusal.status, str(refusal), refusal.param)
        assert set(json.loads(answer.body)["error"]) == {"message", "type", "param", "code"}
        assert len(answer.body) < 4000
        return
    assert isinstance(request.prompt, list)
    assert len(request.stop) <= 4
    assert all(1 <= len(stop) <= 256 for stop in request.stop)
    assert request.max_tokens >= 1
    assert 0 <= request.temperature <= 2
    assert 0 < request.top_p <= 1
    for text in (request.model, *request.prompt, *request.stop):
        text.encode()
