"""A recipe's data: files, templates, labels, tokens, and what is refused before training."""

from __future__ import annotations

import json

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from transformers import AutoTokenizer

from rank_experts.recipes.prepare import prepare
from rank_experts.recipes.recipe import read_recipe
from recipe_files import write_recipe


@pytest.fixture(scope="module", params=["classification", "causal", "seq2seq"])
def made(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, write_recipe(folder, request.param)


def prepared(file, *overrides):
    recipe = read_recipe(file, overrides)
    tokenizer = AutoTokenizer.from_pretrained(recipe.model.name)
    return prepare(recipe, tokenizer, file.parent), tokenizer


def classification(tmp_path):
    return write_recipe(tmp_path)


def test_every_kind_is_tokenised(made):
    kind, file = made
    data, tokenizer = prepared(file, "tasks.first.limit=5")
    assert [len(task.train) for task in data.values()] == [5, 16]
    example = data["first"].train[0]
    words = json.loads((file.parent / "first" / "train.jsonl").read_text().splitlines()[0])
    tokens = tokenizer.convert_ids_to_tokens
    if kind == "classification":
        assert tokens(example["input_ids"]) == words["sentence"].split()
        assert example["labels"] == words["label"]
        assert data["last"].head.labels == ["0", "1"]
        assert data["first"].shown[0] == f"{words['sentence']}  →  {['no', 'yes'][words['label']]}"
        return
    answer = [["no", "yes"][words["label"]]]
    if kind == "causal":
        assert tokens(example["input_ids"]) == [*words["sentence"].split(), *answer, "[EOS]"]
        assert example["labels"][:5] == [-100] * 5
        assert tokens(example["labels"][5:]) == [*answer, "[EOS]"]
    else:
        assert tokens(example["input_ids"]) == words["sentence"].split()
        assert tokens(example["labels"]) == answer
    assert data["first"].shown[0] == f"{words['sentence']}  →  {answer[0]}"


def test_a_long_prompt_is_cut_at_its_beginning(tmp_path):
    data, tokenizer = prepared(write_recipe(tmp_path, "causal"), "model.max_length=4")
    example = data["first"].train[0]
    words = json.loads((tmp_path / "first" / "train.jsonl").read_text().splitlines()[0])["sentence"].split()
    assert tokenizer.convert_ids_to_tokens(example["input_ids"][:2]) == words[-2:]
    assert len(example["input_ids"]) == 4
    assert tokenizer.convert_ids_to_tokens(example["labels"][2:])[1] == "[EOS]"
    assert data["first"].cut == 1.0


def test_splits_can_be_cut(tmp_path):
    cut = ["tasks.first.train=train[:75%]", "tasks.first.validation=train[75%:]"]
    data, _ = prepared(classification(tmp_path), *cut)
    assert (len(data["first"].train), len(data["first"].validation)) == (12, 4)


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("tasks.first.text={sentense}", ValueError, r"'first': no column 'sentense'.*nearest is 'sentence'"),
        ("tasks.first.label=lable", ValueError, r"'first': no column 'lable'.*nearest is 'label'"),
        ("tasks.first.train=trian", FileNotFoundError, r"holds no file for 'trian'.*train.jsonl.*nearest"),
        ("tasks.first.source=./nowhere", FileNotFoundError, r"'first': source .*nowhere is not there"),
        ("tasks.last.train=last_tran.csv", FileNotFoundError, r"'last': .* no file for 'last_tran.csv'.*nearest"),
        ("tasks.first.source=last_train.csv", ValueError, r"is a file. Name files under train"),
        ("tasks.first.train=train[:0]", ValueError, r"'first': the split 'train\[:0\]' cannot be read: .*no data"),
        ("tasks.first.label=sentence", ValueError, r"row 0: label 'w\d.*' is none of \['no', 'yes'\]"),
    ],
)
def test_bad_data_is_refused(tmp_path, override, error, message):
    with pytest.raises(error, match=message):
        prepared(classification(tmp_path), override)


def rewrite(file, change):
    path = file.parent / "first" / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        change(row)
    path.write_text("\n".join(map(json.dumps, rows)))


def test_tasks_without_labels_are_refused(tmp_path):
    file = classification(tmp_path)
    rewrite(file, lambda row: row.update(label=-1))
    with pytest.raises(ValueError, match=r"'first': column 'label' of the training data holds no labels"):
        prepared(file)
    rewrite(file, lambda row: row.update(label=5))
    with pytest.raises(ValueError, match=r"'first', row 0: label 5 is none of \['no', 'yes'\] \(0…1\)"):
        prepared(file)


def test_examples_of_which_nothing_is_left_are_refused(tmp_path):
    file = classification(tmp_path)
    rewrite(file, lambda row: row.update(sentence=""))
    with pytest.raises(ValueError, match=r"'first', row 0: nothing but padding"):
        prepared(file)
    (tmp_path / "text").mkdir()
    file = write_recipe(tmp_path / "text", "causal")
    rewrite(file, lambda row: row.update(other=" "))
    with pytest.raises(ValueError, match=r"'first', row 0: the target .* is empty"):
        prepared(file, "tasks.first.target={other}")


def test_clashing_labels_in_a_shared_head_are_refused(tmp_path):
    shared = ["tasks.first.head=both", "tasks.last.head=both"]
    with pytest.raises(ValueError, match="'first' and 'last' share the head 'both' and their labels clash"):
        prepared(classification(tmp_path), *shared)
    file = tmp_path / "recipe.yaml"
    data, _ = prepared(file, *shared, "tasks.last.labels=[no, yes]")
    assert data["first"].head == data["last"].head


def test_files_of_several_kinds_in_one_split_are_refused(tmp_path):
    file = classification(tmp_path)
    with pytest.raises(
        ValueError, match=r"'last': files of several kinds in one split: \['train.jsonl', 'last_train.csv'"
    ):
        prepared(file, "tasks.last.train=[first/train.jsonl, last_train.csv]")


def test_labels_take_the_names_that_the_data_gives_them(tmp_path):
    file = classification(tmp_path)
    features = Features(sentence=Value("string"), label=ClassLabel(names=["bad", "good", "unused"]))
    rows = {"sentence": ["w1 w2", "w3 w4"], "label": [1, 0]}
    for split in ("train", "validation"):
        Dataset.from_dict(rows, features).to_parquet(tmp_path / f"named_{split}.parquet")
    named = ["tasks.last.train=named_train.parquet", "tasks.last.validation=named_validation.parquet"]
    data, _ = prepared(file, *named, "tasks.last.columns=[sentence]")
    assert data["last"].head.labels == ["bad", "good", "unused"]
    assert data["last"].shown[0] == "w1 w2  →  good"


def test_classes_that_look_like_numbers_are_refused(tmp_path):
    file = classification(tmp_path)
    numbered = ["tasks.first.labels=null"]
    rewrite(file, lambda row: row.update(label=row["label"] + 0.5))
    with pytest.raises(
        ValueError, match=r"'first': 'label' holds 2 different values, such as 0.5. For numbers set reg"
    ):
        prepared(file, *numbered)
    count = iter(range(1000))
    path = tmp_path / "first" / "train.jsonl"
    path.write_text("\n".join(path.read_text().splitlines() * 8))
    rewrite(file, lambda row: row.update(label=next(count)))
    with pytest.raises(ValueError, match=r"'label' holds 128 different values, such as 0"):
        prepared(file, *numbered)


def test_regression_needs_numbers(tmp_path):
    file = classification(tmp_path)
    data, _ = prepared(file, "tasks.last.regression=true", "tasks.last.metric=pearson")
    assert data["last"].head.labels is None
    assert isinstance(data["last"].train[0]["labels"], float)
    with pytest.raises(ValueError, match="regression needs numbers"):
        prepared(file, "tasks.last.regression=true", "tasks.last.label=other")


def test_files_are_named_relatively_absolutely_and_by_patterns(tmp_path):
    (tmp_path / "recipe").mkdir()
    recipe = classification(tmp_path / "recipe")
    data = tmp_path / "data[1]"
    data.mkdir()
    for split in ("train", "validation"):
        (recipe.parent / f"last_{split}.csv").rename(data / f"{split}.csv")
    (data / "folder.csv").mkdir()
    expected = None
    for train in (
        f"{data}/train.csv",
        f"{data}/tr*.csv",
        f"{data}/train",
        "../data[[]1]/train.csv",
        "../data[1]/train.csv",
    ):
        found, _ = prepared(recipe, f"tasks.last.train={train!r}", f"tasks.last.validation='{data}/validation.csv'")
        expected = expected or found["last"].train.to_dict()
        assert found["last"].train.to_dict() == expected
        assert len(expected["labels"]) == 16


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("/nowhere/train.csv", "holds no file for '/nowhere/train.csv'"),
        ("/nowhere/*.csv", r"holds no file for '/nowhere/\*.csv'"),
        ("a**b.csv", r"no file for 'a\*\*b.csv'|'a\*\*b.csv' is no name or pattern"),
        ("n" * 300 + ".csv", "is no name or pattern of a file: .*too long"),
    ],
)
def test_names_of_files_that_are_none(tmp_path, train, message):
    with pytest.raises((ValueError, FileNotFoundError), match=f"Task 'last': .*{message}"):
        prepared(classification(tmp_path), f"tasks.last.train={train!r}")


def test_columns_that_are_numbers(tmp_path):
    """As a CSV file has them whose first line is data, or that pandas wrote without names."""
    recipe = classification(tmp_path)
    for split in ("train", "validation"):
        file = tmp_path / f"last_{split}.csv"
        file.write_text(file.read_text().replace("sentence,other,label", "0,1,label", 1))
    plain, _ = prepared(recipe, "tasks.last.text={0}", "tasks.last.columns=null")
    listed, _ = prepared(recipe, "tasks.last.text=null", "tasks.last.columns=['0']")
    assert plain["last"].train.to_dict() == listed["last"].train.to_dict()
    words = (tmp_path / "last_train.csv").read_text().splitlines()[1].split(",")
    braces, _ = prepared(recipe, "tasks.last.text={0} {{w3}} {1}", "tasks.last.columns=null")
    assert braces["last"].shown[0].startswith(f"{words[0]} {{w3}} {words[1]}  →")
