"""Compiling the native kernel: once, for this user alone, and never an obstacle."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from rank_experts import _warnings
from rank_experts.ops import native_build
from rank_experts.ops.native_build import NativeBuildError, cache_folder, find_compiler

COMPILER = find_compiler()
PACKAGED = native_build.SOURCE
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
LOAD = """
from pathlib import Path
from rank_experts.ops import native_build
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
    _warnings.warn_once.cache_clear()
    yield
    _warnings.warn_once.cache_clear()


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
@pytest.mark.parametrize("how", ["a file in its place", "others may write"])
def test_a_cache_that_cannot_be_had_is_not_used(how, tmp_path):
    (tmp_path / "cache").mkdir()
    if how == "a file in its place":
        cache_folder().write_text("")
    else:
        cache_folder().mkdir()
        cache_folder().chmod(0o777)
    assert load() is not None
    assert cache_folder().is_file() or kept() == []


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
