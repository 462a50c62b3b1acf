"""Random recipes: each is read, or refused with the line of everything that is wrong; a dry run changes nothing.

By default a few hundred; `make fuzz` tries 2,500.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import re

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from rank_experts.recipes.assemble import training_arguments
from rank_experts.recipes.recipe import Recipe, RecipeError, read_recipe
from rank_experts_cli import main
from recipe_files import CLASSIFICATION, TEXT, write_recipe

CASES = int(os.environ.get("RANK_EXPERTS_FUZZ", "300"))
PROFILE = settings(
    max_examples=max(300, CASES // 4),
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    database=None,
)
TEXTS = [
    CLASSIFICATION.format(model="m", method="more", out="out"),
    CLASSIFICATION.format(model="m", method="smora", out="out"),
    TEXT.format(model="m", kind="causal", method="lora", out="out"),
]
VALUES = [YAML(typ="safe", pure=True).load(text) for text in TEXTS]
KEYS = ["model", "adapter", "tasks", "data", "training", "name", "method", "r", "top_k", "sampling", "metric", "seed"]
JUNK = [
    None, True, 0, 1, -1, 8, 10**400, 0.5, float("nan"), float("inf"), "", "x", "{", "{a}", "{a.b}", "more", "causal",
    "float16", "[1]", "accuracy", "\ud7ff", "\N{SNOWMAN}", [], ["a"], [1], [None], [["a"]], {}, {"a": 1}, {1: 2},
    {"a": {"b": []}},
]  # fmt: skip
LOCATED = re.compile(r"(.*recipe\.yaml:\d+: |override '.*?': |override \".*?\": ).*", re.DOTALL)


def places(values, place=()):
    """Every key and index of nested values."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield (*place, key)
        yield from places(value, (*place, key))


@st.composite
def edited_values(draw):
    """A good recipe with up to four values replaced, removed, renamed or added."""
    values = copy.deepcopy(draw(st.sampled_from(VALUES)))
    for _ in range(draw(st.integers(1, 4))):
        *parents, last = draw(st.sampled_from(list(places(values))))
        node = values
        for step in parents:
            node = node[step]
        action = draw(st.sampled_from(["replace", "replace", "remove", "rename", "add"]))
        junk = draw(st.sampled_from(JUNK) | st.text(max_size=8) | st.integers() | st.floats())
        junk = copy.deepcopy(junk)
        if action == "replace":
            node[last] = junk
        elif action == "remove":
            del node[last]
        elif isinstance(node, dict):
            name = draw(st.sampled_from(KEYS) | st.text(max_size=5) | st.just(f"{last}s"))
            node[name] = junk if action == "add" else node.pop(last)
        if not values:
            break
    stream = io.StringIO()
    YAML(typ="safe", pure=True).dump(values, stream)
    return stream.getvalue().encode(errors="surrogatepass")


@st.composite
def edited_text(draw):
    """The bytes of a good recipe, cut, spliced or repeated."""
    data = bytearray(draw(st.sampled_from(TEXTS)).encode())
    for _ in range(draw(st.integers(1, 3))):
        first, last = sorted(draw(st.tuples(st.integers(0, len(data)), st.integers(0, len(data)))))
        piece = draw(
            st.sampled_from([b"", b"\t", b"\n", b"- ", b": ", b"&a ", b"*a", b"!x ", b"!!python/name:os.system ", b"{"])
            | st.sampled_from([b"[" * 2000, b"? [a]\n: b\n", b"<<: *a\n", b"---\n", b"\xff", b"\x00", b"2001-99-99"])
            | st.binary(max_size=6)
        )
        action = draw(st.sampled_from(["insert", "insert", "cut", "repeat"]))
        if action == "insert":
            data[first:first] = piece
        elif action == "cut":
            del data[first : min(last, first + 40)]
        else:
            data[last:last] = data[first:last]
    return bytes(data)


overrides = st.lists(
    st.builds(
        lambda key, value: f"{key}={value}",
        st.sampled_from([".".join(map(str, place)) for values in VALUES for place in places(values)])
        | st.text(max_size=6),
        st.sampled_from(["1", "x", "[", "{a", "null", "*a", "2001-99-99", ": :", "- -"]) | st.text(max_size=6),
    )
    | st.text(max_size=6),
    max_size=2,
)
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{last}'] * 9)}]\n" for last, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def read(file, overrides=()):
    """Read a recipe and its arguments; None where it is refused as it should be."""
    try:
        recipe = read_recipe(file, overrides)
    except RecipeError as error:
        assert str(error)  # noqa: PT017
        return None
    assert isinstance(recipe, Recipe)
    recipe.adapter.config(list(recipe.tasks))
    try:
        training_arguments(recipe, report_to=[], use_cpu=True)
    except ValueError as error:
        assert str(error).startswith("training: ")  # noqa: PT017
        return None
    return recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("recipes")


@PROFILE
@given(data=edited_values() | edited_text(), changes=overrides)
@example(data=b"[" * 100_000, changes=[])
@example(data=b"a: " * 3000, changes=[])
@example(data=b"\xff\xfe\x00", changes=[])
@example(data=b"&a [*a]", changes=[])
@example(data=b"model: &a {name: *a}", changes=[])
@example(data=b"model: 2001-99-99", changes=[])
@example(data=BOMB.encode() + TEXTS[0].encode(), changes=[])
def test_recipes_are_read_or_refused_with_their_lines(place, data, changes):
    file = place / "recipe.yaml"
    file.write_bytes(data)
    try:
        read_recipe(file, changes)
    except RecipeError as error:
        assert LOCATED.fullmatch(str(error)), str(error)  # noqa: PT017
    before = os.getcwd()
    read(file, changes)
    assert os.getcwd() == before


def keys_of(text):
    """Every key of a recipe that is not a task's name, with its line."""
    for number, line in enumerate(text.splitlines(), 1):
        if (match := re.fullmatch(r"( *)([a-z_]{4,}): .*", line)) and not line.startswith("{"):
            yield number, match[2]


@pytest.mark.parametrize("number", [number for number, _ in keys_of(TEXTS[0])])
def test_a_mistyped_key_is_named_with_its_line_and_the_nearest(place, number):
    key = dict(keys_of(TEXTS[0]))[number]
    wrong = key[0] + key
    lines = TEXTS[0].splitlines()
    lines[number - 1] = lines[number - 1].replace(f"{key}:", f"{wrong}:", 1)
    file = place / "recipe.yaml"
    file.write_text("\n".join(lines))
    with pytest.raises(RecipeError) as refused:
        read_recipe(file)
    assert re.search(
        rf"{re.escape(str(file))}:{number}: .*{wrong}: unknown key. The nearest is '{key}'", str(refused.value)
    )


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder whose recipe trains; lists and texts of it may be replaced."""
    folder = tmp_path_factory.mktemp("whole")
    write_recipe(folder)
    return folder


@settings(PROFILE, max_examples=max(25, CASES // 40))
@given(place=st.sampled_from(list(places(VALUES[0]))), junk=st.sampled_from(JUNK) | st.text(max_size=4), more=overrides)
def test_a_dry_run_says_what_is_wrong_and_changes_nothing(whole, place, junk, more):
    text = (whole / "recipe.yaml").read_text()
    values = YAML(typ="safe", pure=True).load(text)
    *parents, last = place
    node = values
    for step in parents:
        node = node[step]
    node[last] = junk
    stream = io.StringIO()
    YAML(typ="safe", pure=True).dump(values, stream)
    (whole / "mutated.yaml").write_text(stream.getvalue(), errors="replace")
    before = contents(whole)
    out, err = io.StringIO(), io.StringIO()
    try:
        with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patched.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
            patched.setattr("datasets.config.HF_HUB_OFFLINE", True)
            patched.chdir(whole)
            code = main(["train", "mutated.yaml", "--dry-run", *(change for change in more if "=" in change)])
    except SystemExit as refused:  # an override that looks like an option
        code = refused.code
    if code == 0:
        assert "Everything fits" in out.getvalue()
    else:
        assert code == 2
        assert "rank-experts" in err.getvalue()
        assert "Traceback" not in err.getvalue()
    assert contents(whole) == before
