"""Compiling the native kernel: once, for this user alone, and never an obstacle."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest

from failing import each_fault
from rank_experts import messages
from rank_experts.ops.backends.cpu import build as native_build
from rank_experts.ops.backends.cpu.build import NativeBuildError, cache_folder, find_compiler

COMPILER = find_compiler()
PACKAGED = native_build.SOURCE
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
LOAD = """
from pathlib import Path
from rank_experts.ops.backends.cpu import build as native_build
native_build.SOURCE = Path({source!r})
assert native_build.library().rank_experts_columns() == 7
"""
# Compiled in no time.
SMALL = """extern "C" {
long rank_experts_columns() { return 7; }
long rank_experts_logits() { return 0; }
void rank_experts_decode() {}
void rank_experts_forward() {}
void rank_experts_backward() {}
void rank_experts_count() {}
void rank_experts_given_forward() {}
void rank_experts_given_backward() {}
void rank_experts_task_gates() {}
void rank_experts_task_gates_backward() {}
}
"""


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(native_build.SWITCH, raising=False)
    (tmp_path / "native.cpp").write_text(SMALL)
    monkeypatch.setattr(native_build, "SOURCE", tmp_path / "native.cpp")
    messages.warn_once.cache_clear()
    yield
    messages.warn_once.cache_clear()


def load():
    """What a new process would get."""
    return native_build.library.__wrapped__()


def kept() -> list[Path]:
    return sorted(cache_folder().iterdir())


def command(folder: Path, body: str) -> str:
    """A compiler of our own making."""
    folder.mkdir(exist_ok=True)
    script = folder / "c++"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    return str(script)


@needs_compiler
def test_it_is_compiled_once_and_kept_for_this_user_alone(monkeypatch):
    assert load() is not None
    (first,) = kept()
    assert stat.S_IMODE(cache_folder().stat().st_mode) == 0o700
    monkeypatch.setattr(native_build, "_build", lambda *args: pytest.fail("compiled again"))
    assert load() is not None
    assert kept() == [first]


@needs_compiler
@pytest.mark.parametrize("file", ["native.cpp", "native_part.h"])
def test_another_source_is_another_file(file):
    load()
    (native_build.SOURCE.parent / file).write_text(SMALL + "// changed\n")
    load()
    assert len(kept()) == 2


@needs_compiler
def test_the_kernel_itself_runs_on_the_threads_that_pytorch_has(monkeypatch):
    monkeypatch.setattr(native_build, "SOURCE", PACKAGED)
    assert load().rank_experts_columns() % 16 == 0
    mapped = Path("/proc/self/maps").read_text().splitlines()
    assert len({line.split()[-1] for line in mapped if "libgomp" in line}) == 1


@needs_compiler
def test_two_processes_may_compile_at_once_and_a_damaged_file_is_made_anew():
    script = LOAD.format(source=str(native_build.SOURCE))
    for _ in range(2):
        processes = [subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE) for _ in range(2)]
        for process in processes:
            _, stderr = process.communicate(timeout=300)
            assert process.returncode == 0, stderr.decode()
        (path,) = kept()
        assert path.read_bytes()[:4] == b"\x7fELF"
        path.write_bytes(b"not a shared object")


@needs_compiler
@pytest.mark.parametrize("how", ["half of it", "nothing", "one bit"])
def test_a_damaged_library_is_never_opened(how, monkeypatch):
    """A page that is missing kills the process that touches it."""
    load()
    (path,) = kept()
    whole = path.read_bytes()
    flipped = whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:]
    damaged = {"half of it": whole[: len(whole) // 2], "nothing": b"", "one bit": flipped}[how]
    path.unlink()  # Its pages are mapped here; the damage is another file's.
    path.write_bytes(damaged)
    opened = []
    plain = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name: (opened.append(Path(name).read_bytes()), plain(name))[1])
    assert load().rank_experts_columns() == 7
    assert damaged not in opened
    assert kept() == [path]
    assert path.read_bytes() == whole


@needs_compiler
def test_it_lies_on_the_disk_before_it_has_its_name(monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda handle: (events.append(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle))
    )
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append(str(old)), replace(old, new)))
    load()
    assert len(events) == 2
    assert events[0] == events[1]


@needs_compiler
@pytest.mark.parametrize("how", ["a file in its place", "others may write", "others may add", "above", "a link"])
def test_a_cache_that_cannot_be_had_is_not_used(how, tmp_path):
    (tmp_path / "cache").mkdir()
    if how == "a file in its place":
        cache_folder().write_text("")
    elif how == "above":
        (tmp_path / "cache").chmod(0o775)
    elif how == "a link":
        (tmp_path / "open/cache").mkdir(parents=True)
        (tmp_path / "open").chmod(0o777)
        cache_folder().symlink_to(tmp_path / "open/cache")
    else:
        cache_folder().mkdir()
        cache_folder().chmod(0o777 if how == "others may write" else 0o1777)
    assert load().rank_experts_columns() == 7
    assert cache_folder().is_file() or kept() == []


@needs_compiler
@pytest.mark.skipif(os.geteuid() != 0, reason="files are given away by root alone")
def test_a_folder_of_somebody_elses_above_the_cache_is_a_reason_not_to_use_it(tmp_path):
    (tmp_path / "cache").mkdir()
    os.chown(tmp_path / "cache", 12345, -1)
    assert load().rank_experts_columns() == 7
    assert kept() == []


@needs_compiler
def test_a_folder_with_sticky_names_above_the_cache_is_none(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o1777)
    assert load() is not None
    assert len(kept()) == 1


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "cache", "./cache", "~/cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_folder() == tmp_path / ".cache/rank_experts"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / ".cache/rank_experts"
    monkeypatch.setenv("HOME", "relative")
    assert cache_folder() is None


@needs_compiler
@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_cache_is_not_used(tmp_path):
    cache_folder().mkdir(parents=True, mode=0o500)
    assert load() is not None
    assert kept() == []


@needs_compiler
def test_a_compiler_that_knows_no_options_is_asked_without(monkeypatch, tmp_path):
    body = f'case "$*" in *march*|*openmp*) exit 1;; esac\nexec {COMPILER[0]} "$@"'
    monkeypatch.setenv("CXX", command(tmp_path / "bin", body))
    assert load().rank_experts_columns() == 7


def test_without_a_compiler_pytorch_does_the_work_in_silence(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load() is None
    monkeypatch.setenv(native_build.SWITCH, "1")
    with pytest.raises(NativeBuildError, match="No C\\+\\+ compiler"):
        load()


def test_a_compiler_that_fails_is_reported_once(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", command(tmp_path / "bin", "echo 'no disk' >&2; exit 4"))
    with pytest.warns(UserWarning, match="no disk"):
        assert load() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load() is None
    assert kept() == []
    monkeypatch.setenv(native_build.SWITCH, "1")
    with pytest.raises(NativeBuildError, match="no disk"):
        load()


@pytest.fixture
def fast(monkeypatch, tmp_path):
    """A compiler that copies what was compiled before, and counts its calls in a file."""
    made, calls = tmp_path / "made.so", tmp_path / "calls"
    (tmp_path / "small.cpp").write_text(SMALL)
    subprocess.run([*COMPILER, "-shared", "-fPIC", str(tmp_path / "small.cpp"), "-o", str(made)], check=True)
    body = f'echo >> {calls}; mktemp > /dev/null || exit 5; while [ "$1" != -o ]; do shift; done; cp {made} "$2"'
    monkeypatch.setenv("CXX", command(tmp_path / "bin", body))
    return calls


def no_home(monkeypatch, tmp_path):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", nobody)


def no_temporary_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not there"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "not there"))


def unwritable(monkeypatch, tmp_path):
    no_home(monkeypatch, tmp_path)
    no_temporary_folder(monkeypatch, tmp_path)


def compiler(body):
    return lambda monkeypatch, tmp_path: monkeypatch.setenv("CXX", command(tmp_path / "bin", body))


def cxx(text):
    return lambda monkeypatch, tmp_path: monkeypatch.setenv("CXX", text)


# What is wrong with a machine, and what the warning says; None: the kernel is there all the same.
MACHINES = {
    "no home": (no_home, None),
    "no temporary folder": (no_temporary_folder, None),
    "neither": (unwritable, "FileNotFoundError"),
    "writes nothing": (compiler("exit 0"), "it wrote no native.o"),
    "writes rubbish": (compiler('while [ "$1" != -o ]; do shift; done; echo rubbish > "$2"'), "cannot be loaded"),
    "writes an empty file": (compiler('while [ "$1" != -o ]; do shift; done; : > "$2"'), "cannot be loaded"),
    "another library": (
        compiler(f'while [ "$1" != -o ]; do shift; done; echo "" | {COMPILER and COMPILER[0]} -shared -xc++ - -o "$2"'),
        "is not our kernel: .*undefined symbol",
    ),
    "is no program": (compiler("\0"), "failed on"),
    "unbalanced": (cxx("g++ '-O2"), "CXX is .*No closing quotation"),
    "not there": (cxx("/not/there -O2"), "CXX is '/not/there -O2': there is no such program"),
}


@needs_compiler
@pytest.mark.parametrize("case", MACHINES)
def test_whatever_is_wrong_with_a_machine_is_one_warning(case, fast, monkeypatch, tmp_path):
    spoil, message = MACHINES[case]
    spoil(monkeypatch, tmp_path)
    if message is None:
        assert load().rank_experts_columns() == 7
        return
    with pytest.warns(UserWarning, match=message) as caught:
        assert load() is None
    assert len(caught) == 1
    monkeypatch.setenv(native_build.SWITCH, "1")
    with pytest.raises(NativeBuildError, match=message):
        load()


@needs_compiler
def test_a_cache_of_which_nothing_may_be_run(fast, monkeypatch):
    """On a disk that is mounted noexec: compiled once, and a copy is loaded; and where nothing may be run at all."""
    plain, closed = ctypes.CDLL, [cache_folder()]

    def refuse(name):
        if any(folder in Path(name).parents for folder in closed):
            raise OSError("failed to map segment from shared object")
        return plain(name)

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert load().rank_experts_columns() == 7
    assert load().rank_experts_columns() == 7
    closed.append(Path(tempfile.gettempdir()))
    with pytest.warns(UserWarning, match=f"failed to map segment.*Remove {kept()[0]}"):
        assert load() is None
    assert len(fast.read_text()) == 2, "one call compiles, one links"


@needs_compiler
def test_a_compiler_that_hangs_is_ended_once_with_its_children(monkeypatch, tmp_path):
    calls, child = tmp_path / "calls", tmp_path / "child"
    monkeypatch.setenv("CXX", command(tmp_path / "bin", f"echo >> {calls}; sleep 600 & echo $! > {child}; wait"))
    monkeypatch.setattr(native_build, "_SECONDS", 1)
    with pytest.warns(UserWarning, match="was not done after 1 s, and was ended"):
        assert load() is None
    assert calls.read_text() == "\n"
    for _ in range(1000):
        status = Path(f"/proc/{int(child.read_text())}/stat")
        if not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            break
        time.sleep(0.01)
    else:
        pytest.fail("its child lives on")
    assert kept() == []


@needs_compiler
def test_an_interrupt_ends_the_compiler_too(monkeypatch, tmp_path):
    pid = tmp_path / "pid"
    monkeypatch.setenv("CXX", command(tmp_path / "bin", f"echo $$ > {pid}; exec sleep 600"))

    def interrupt(process, timeout=None):
        if timeout is not None:
            while not (pid.exists() and pid.read_text()):
                time.sleep(0.01)
            raise KeyboardInterrupt
        return wait(process)

    wait = subprocess.Popen.wait
    monkeypatch.setattr(subprocess.Popen, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


@needs_compiler
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EACCES])
def test_any_system_call_may_fail(error, fast, tmp_path):
    """The kernel is there, or one warning says why not; the next process has it, and what is kept is whole."""
    fallbacks, whole = 0, (tmp_path / "made.so").read_bytes()
    for fault in each_fault(error):
        shutil.rmtree(cache_folder(), ignore_errors=True)
        with warnings.catch_warnings(record=True) as caught, fault:
            warnings.simplefilter("always")
            loaded = load()
        said = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
        assert (loaded is None) == bool(said) == any("goes on without" in text for text in said), fault.name
        assert len(said) <= 1
        fallbacks += loaded is None
        messages.warn_once.cache_clear()
        assert load().rank_experts_columns() == 7, fault.name
        assert {path.read_bytes() for path in kept() if path.suffix == ".so"} == {whole}
    assert fault.number > 30
    assert fallbacks > 10


def test_it_can_be_turned_off(monkeypatch):
    monkeypatch.setenv(native_build.SWITCH, "0")
    monkeypatch.setattr(native_build, "_load", lambda *args: pytest.fail("loaded"))
    assert load() is None
    monkeypatch.setenv(native_build.SWITCH, "yes")
    with pytest.raises(ValueError, match="expected 0"):
        load()


def test_the_source_is_part_of_the_package():
    assert PACKAGED.parent == Path(native_build.__file__).parent
    assert PACKAGED.is_file()
