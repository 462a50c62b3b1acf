"""A folder appears as a whole or not at all."""

from __future__ import annotations

import stat

import pytest

from rank_experts.folders import staged_folder


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_new_folder_appears_when_it_is_complete(tmp_path):
    with staged_folder(tmp_path / "a/b") as folder:
        (folder / "one").write_text("1")
        (folder / "sub").mkdir()
        (folder / "sub/two").write_text("2")
        assert not (tmp_path / "a/b").exists()
    assert names(tmp_path) == ["a", "a/b", "a/b/one", "a/b/sub", "a/b/sub/two"]
    assert (tmp_path / "a/b").stat().st_mode & stat.S_IRWXO, "readable as any folder is, not only by its owner"


@pytest.mark.parametrize("existing", [False, True])
def test_what_fails_leaves_everything_as_it_was(tmp_path, existing):
    if existing:
        (tmp_path / "target").mkdir()
        (tmp_path / "target/one").write_text("old")
    before = names(tmp_path)

    def fail():
        with staged_folder(tmp_path / "target") as folder:
            (folder / "one").write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert names(tmp_path) == before
    if existing:
        assert (tmp_path / "target/one").read_text() == "old"


def test_an_existing_folder_keeps_what_is_not_replaced(tmp_path):
    (tmp_path / "target/sub").mkdir(parents=True)
    (tmp_path / "target/mine").write_text("mine")
    (tmp_path / "target/sub/one").write_text("old")
    with staged_folder(tmp_path / "target") as folder:
        (folder / "sub").mkdir()
        (folder / "sub/one").write_text("new")
    assert names(tmp_path) == ["target", "target/mine", "target/sub", "target/sub/one"]
    assert (tmp_path / "target/sub/one").read_text() == "new"
    assert (tmp_path / "target/mine").read_text() == "mine"


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "target").write_text("a file")
    with pytest.raises(NotADirectoryError, match="target is a file"), staged_folder(tmp_path / "target"):
        pass
    assert (tmp_path / "target").read_text() == "a file"
