"""Expressions that would take forever are known before they are used."""

from __future__ import annotations

import functools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rank_experts import RankExpertConfig
from rank_experts.config.expressions import MOST_WAYS, ways

# What people write, and what tools write for them.
FINE = [
    r".*",
    r"q_proj",
    r".*\.(q_proj|k_proj|v_proj)$",
    r"model\.layers\.\d+\.self_attn\.(q|k|v)_proj",
    r"^(?!.*vision).*\.(q_proj|k_proj)$",
    r"^(?=language_model).*(?<!lm_head)$",
    r".*layers\.(?:[0-9]|1[0-9])\..*(q|v)_proj.*",
    r"(\w+\.)*q_proj",
    r"(?:[^.]+\.)+(?:q|v)_proj",
    r"(.*\.)?encoder\.layer\.([0-9]{1,3})\.(attention|output)\.dense",
    r"(?:.*?(?:vision|image|visual|patch).*?(?:self_attn|attention|attn|mlp).*?(?:q_proj|k_proj|v_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|up_proj)))",
    r"(blocks|layers)\.\d+\.(fc1|fc2|fc11)?",
]
# Each of these takes longer than anyone waits on a name of fifty letters that it does not match.
ENDLESS = [
    "(a+)+b",
    "(a*)*b",
    "(.*)*b",
    "(a|a)*b",
    "(a|aa)+b",
    "([a-z]+)*b",
    "(?:(?:a?)*)*b",
    "(a?){50}b",
    "a?" * 40 + "a" * 40,
    "(a|ab|b|ba)*c",
    ".*" * 6 + "b",
    r"(\w+\w)*b",
    r"(\w*\.?)*b",
    r"(.*\.)*b",
    "(?=(a+)+b)a",
    "(?!(a+)+b)a",
    r"(a)(?(1)(a+)+|b)c",
]


@pytest.mark.parametrize("expression", FINE)
def test_expressions_that_people_use_are_fine(expression):
    assert ways(expression) <= MOST_WAYS
    RankExpertConfig.lora(target_modules=expression)


@pytest.mark.parametrize("expression", ENDLESS)
def test_expressions_that_take_forever_are_refused(expression):
    re.compile(expression)
    assert ways(expression) > MOST_WAYS
    for field in ("target_modules", "exclude_modules"):
        with pytest.raises(ValueError, match=f"{field}: .* may match a name in so many ways"):
            RankExpertConfig.lora(**{"target_modules": ["q_proj"], field: expression})
    for field in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(ValueError, match=f"{field}: .* may match a name in so many ways"):
            RankExpertConfig.lora(target_modules=["q_proj"], **{field: {expression: 4}})
    with pytest.raises(ValueError, match=r"layers_pattern: .* may match a name in so many ways"):
        RankExpertConfig.lora(target_modules=["q_proj"], layers_to_transform=[0], layers_pattern=[expression])
    with pytest.raises(ValueError, match=r"modules_to_save: .* may match a name in so many ways"):
        RankExpertConfig.lora(target_modules=["q_proj"], modules_to_save=[expression])


@pytest.mark.parametrize("field", ["modules_to_save", "layers_pattern"])
def test_names_that_peft_takes_for_expressions_are_checked_as_such(field):
    layers = {"layers_to_transform": [0]} if field == "layers_pattern" else {}
    with pytest.raises(ValueError, match=f"{field}: .* is not a regular expression"):
        RankExpertConfig.lora(target_modules=["q_proj"], **{field: ["(layers"]}, **layers)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank_pattern", {f"layer{i}": 4 for i in range(10_001)}),
        ("alpha_pattern", {f"layer{i}": 4 for i in range(10_001)}),
        ("target_modules", [f"layer{i}" for i in range(100_001)]),
        ("exclude_modules", [f"layer{i}" for i in range(100_001)]),
        ("target_parameters", [f"layer{i}" for i in range(100_001)]),
        ("modules_to_save", [f"layer{i}" for i in range(100_001)]),
        ("layers_to_transform", list(range(100_001))),
    ],
)
def test_so_many_names_that_matching_does_not_end_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} has {len(value):,} entries: expected at most"):
        RankExpertConfig.lora(**{"target_modules": ["q_proj"], field: value})


# An expression as a tree, its text, and how often it derives each beginning of a name: counted one way after another.

LEAVES = st.sampled_from(["a", "b", ".", "[ab]", "[^b]"])
TREES = st.recursive(
    st.tuples(st.just("leaf"), LEAVES),
    lambda inner: st.one_of(
        st.tuples(st.just("sequence"), st.lists(inner, min_size=1, max_size=3)),
        st.tuples(st.just("either"), st.lists(inner, min_size=2, max_size=3)),
        st.tuples(st.sampled_from(["*", "+", "?", "{1,3}", "*?"]), inner),
    ),
    max_leaves=6,
)


def text(tree):
    kind, value = tree
    if kind == "leaf":
        return value
    if kind == "sequence":
        return "(?:" + "".join(map(text, value)) + ")"
    if kind == "either":  # in groups of their own, which `re` does not fold into a set or a common beginning
        return "(?:" + "|".join(f"({text(part)})" for part in value) + ")"
    return f"(?:{text(value)}){kind}"


def derivations(tree, name):
    """Return {end: number of ways} of an expression that begins at each place."""

    @functools.cache
    def ends(tree, start):
        kind, value = tree
        if kind == "leaf":
            return {start + 1: 1} if start < len(name) and re.match(value, name[start]) else {}
        if kind == "sequence":
            found = {start: 1}
            for part in value:
                found = add((end, n * m) for place, n in found.items() for end, m in ends(part, place).items())
            return found
        if kind == "either":
            return add(pair for part in value for pair in ends(part, start).items())
        low, high = {"*": (0, 99), "*?": (0, 99), "+": (1, 99), "?": (0, 1), "{1,3}": (1, 3)}[kind]
        found, total = {start: 1}, {start: 1} if low == 0 else {}
        for number in range(1, high + 1):
            # A round that takes nothing is not repeated.
            found = add(
                (end, n * m)
                for place, n in found.items()
                for end, m in ends(value, place).items()
                if end > place or number <= low
            )
            total = add([*total.items(), *(found.items() if number >= low else ())])
            if not found:
                break
        return total

    return ends(freeze(tree), 0)


def freeze(tree):
    kind, value = tree
    if kind in ("sequence", "either"):
        return kind, tuple(map(freeze, value))
    return (kind, value) if kind == "leaf" else (kind, freeze(value))


def add(pairs):
    total = {}
    for end, number in pairs:
        total[end] = total.get(end, 0) + number
    return total


@given(TREES, st.text("ab", max_size=12))
@settings(max_examples=300, deadline=None)
def test_an_expression_has_no_more_ways_than_are_counted(tree, name):
    found = derivations(tree, name)
    assert bool(found) == (re.match(text(tree), name) is not None)
    assert sum(found.values()) <= ways(text(tree))
