"""Files that change as a whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys

import pytest

from failing import each_fault
from rank_experts.storage import staging
from rank_experts.storage.staging import write_files

NEW = {"one": [b"ne", memoryview(b"w")], "sub/two": [b"2"]}


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def fail_at(monkeypatch, function, call):
    """Let one of os's functions fail at its n-th call, as a full disk does."""
    whole, calls = getattr(os, function), []

    def wrapped(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(*args, **kwargs)

    monkeypatch.setattr(staging.os, function, wrapped)
    return calls


def test_a_new_folder_appears_in_one_rename(tmp_path, monkeypatch):
    seen = []
    rename = os.rename

    def watch(source, target):
        seen.append((names(source), target.exists()))
        rename(source, target)

    monkeypatch.setattr(os, "rename", watch)
    write_files(tmp_path / "a/b", NEW)
    assert seen == [(["one", "sub", "sub/two"], False)]
    assert names(tmp_path) == ["a", "a/b", "a/b/one", "a/b/sub", "a/b/sub/two"]
    assert (tmp_path / "a/b/one").read_bytes() == b"new"
    umask = os.umask(0)
    os.umask(umask)
    for name, mode in (("a/b", 0o777), ("a/b/one", 0o666)):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode & ~umask, "readable as any other, not only by us"


def test_a_folder_that_another_process_makes_meanwhile(tmp_path, monkeypatch):
    rename = os.rename

    def late(source, target):
        monkeypatch.setattr(os, "rename", rename)
        write_files(target, {"one": [b"theirs"], "three": [b"3"]})
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    calls = []
    write_files(tmp_path / "a", lambda: calls.append(names(tmp_path)) or NEW)
    assert names(tmp_path) == ["a", "a/one", "a/sub", "a/sub/two", "a/three"]
    assert (tmp_path / "a/one").read_bytes() == b"new"
    assert calls == [[], ["a", "a/one", "a/three"]], "asked again once what is there counts"


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(("function", "call"), [("fsync", 1), ("fsync", 2), ("mkdir", 2), ("open", 2)])
def test_what_fails_leaves_everything_as_it_was(tmp_path, monkeypatch, existing, function, call):
    if existing:
        (tmp_path / "target").mkdir()
        (tmp_path / "target/one").write_text("old")
    before = names(tmp_path)
    if existing and function == "mkdir":
        call = 1  # the parent is not made first
    calls = fail_at(monkeypatch, function, call)
    with pytest.raises(OSError, match=r"cannot save 4 bytes to .*target: No space left.*unchanged") as raised:
        write_files(tmp_path / "target", NEW)
    assert raised.value.errno == errno.ENOSPC
    assert len(calls) >= call
    assert names(tmp_path) == before
    if existing:
        assert (tmp_path / "target/one").read_text() == "old"


def test_a_new_folder_that_cannot_be_renamed_is_not_there(tmp_path, monkeypatch):
    fail_at(monkeypatch, "rename", 1)
    with pytest.raises(OSError, match="No space left"):
        write_files(tmp_path / "target", NEW)
    assert names(tmp_path) == []


@pytest.mark.parametrize("existing", [False, True])
def test_every_file_and_folder_is_on_the_disk_before_it_counts(tmp_path, monkeypatch, existing):
    if existing:
        (tmp_path / "target").mkdir()
    events = []
    fsync = os.fsync

    def record(handle):
        assert stat.S_ISDIR(os.fstat(handle).st_mode) or os.fstat(handle).st_size, "still in a buffer of this process"
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")).split(".saving.")[0].lstrip("."))
        fsync(handle)

    monkeypatch.setattr(staging.os, "fsync", record)
    for name in ("rename", "replace"):
        move = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda source, target, move=move: (events.append(f"-> {target.name}"), move(source, target))
        )
    write_files(tmp_path / "target", NEW)
    if existing:
        assert events == ["one", "two", "-> one", "target", "-> two", "sub"]
    else:
        assert events == ["one", "two", "sub", "target", "-> target", tmp_path.name]


def test_an_existing_folder_keeps_what_is_not_replaced(tmp_path):
    (tmp_path / "target/sub").mkdir(parents=True)
    (tmp_path / "target/mine").write_text("mine")
    (tmp_path / "target/sub/two").write_text("old")
    write_files(tmp_path / "target", NEW)
    assert names(tmp_path) == ["target", "target/mine", "target/one", "target/sub", "target/sub/two"]
    assert (tmp_path / "target/sub/two").read_text() == "2"
    assert (tmp_path / "target/mine").read_text() == "mine"


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    for name in (".one.saving.x", ".one.swp", ".three.saving.x"):
        (tmp_path / name).write_text("")
    write_files(tmp_path, NEW)
    assert names(tmp_path) == [".one.swp", ".three.saving.x", "one", "sub", "sub/two"]


def test_something_in_the_way(tmp_path):
    (tmp_path / "target").write_text("a file")
    with pytest.raises(NotADirectoryError, match="target: it is a file; expected a folder"):
        write_files(tmp_path / "target", NEW)
    assert (tmp_path / "target").read_text() == "a file"
    (tmp_path / "folder/one").mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match="one is a folder there"):
        write_files(tmp_path / "folder", NEW)
    assert names(tmp_path) == ["folder", "folder/one", "target"]


@pytest.mark.filterwarnings("ignore:.*without locks")
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("existing", [False, True])
def test_any_system_call_may_fail(tmp_path, existing, error):
    """The old state, with an error that says so, or the first files new, with one that names them."""
    old, new = {"one": b"old", "mine": b"mine"}, {"one": b"new", "sub/two": b"2"}
    target, outcomes = tmp_path / "above/target", []
    for fault in each_fault(error):
        shutil.rmtree(tmp_path / "above", ignore_errors=True)
        if existing:
            target.mkdir(parents=True)
            for name, data in old.items():
                (target / name).write_bytes(data)
        said = None
        try:
            with fault:
                write_files(target, NEW)
        except OSError as raised:
            said = f"{raised} {raised.errno == error}"
        found = {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()}
        states = [old, old | {"one": b"new"}, old | new] if existing else [{}, new]
        found = {name: data for name, data in found.items() if ".saving." not in name}
        assert found in states, fault.name
        if said is None:
            assert found == states[-1], fault.name
        else:
            assert said.endswith("True")
            assert ("unchanged" in said) == (found == states[0]), fault.name
            assert ("save once more" in said) == (found != states[0]), fault.name
        outcomes.append(states.index(found))
        write_files(target, NEW)
        assert names(target) == sorted([*(old if existing else ()), "one", "sub", "sub/two"][existing:]), fault.name
        if not existing:
            shutil.rmtree(tmp_path / "above")
    assert fault.number > 15
    assert set(outcomes) == set(range(3 if existing else 2))


def test_a_file_system_that_does_not_sync_folders(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(staging.os, "fsync", refuse)
    write_files(tmp_path / "target", NEW)
    write_files(tmp_path / "target", NEW)
    assert names(tmp_path / "target") == ["one", "sub", "sub/two"]


@pytest.mark.parametrize("name", ["n" * 255, "ü" * 127, os.fsdecode(b"\xff\xfe")])
def test_names_of_any_length_and_spelling(tmp_path, name):
    for _ in range(2):
        write_files(tmp_path / name, {name: [b"new"]})
    assert [path.name for path in (tmp_path / name).iterdir()] == [name]


LOCK = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_process_forked_during_a_save_does_not_keep_the_lock(tmp_path):
    children = []

    def files():
        read, write = os.pipe()
        if not (pid := os.fork()):
            os.close(write)
            os.read(read, 1)  # Lives on until the other end is closed.
            os._exit(0)
        children.append((pid, write))
        return NEW

    write_files(tmp_path, files)
    lock = subprocess.run([sys.executable, "-c", LOCK, tmp_path], capture_output=True, text=True)
    ((pid, write),) = children
    os.close(write)
    os.waitpid(pid, 0)
    assert lock.returncode == 0, lock.stderr


@pytest.mark.parametrize("existing", [False, True])
def test_the_umask_is_kept_and_never_changed(tmp_path, monkeypatch, existing):
    """It belongs to all threads: another's file would be open to everybody meanwhile."""
    if existing:
        (tmp_path / "target").mkdir()
    before = os.umask(0o027)
    try:
        monkeypatch.setattr(staging.os, "umask", lambda mask: pytest.fail("changed"))
        write_files(tmp_path / "target", NEW)
    finally:
        monkeypatch.undo()
        assert os.umask(before) == 0o027
    for name, mode in (("target/one", 0o640), ("target/sub", 0o750), ("target/sub/two", 0o640)):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode


def test_what_another_user_left_behind_is_no_obstacle(tmp_path, monkeypatch):
    (tmp_path / ".one.saving.x").write_text("")
    unlink = os.unlink

    def refuse(path, **options):
        if str(path).endswith(".one.saving.x"):
            raise PermissionError(errno.EPERM, "Operation not permitted")
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", refuse)
    write_files(tmp_path, NEW)
    assert (tmp_path / "one").read_text() == "new"
