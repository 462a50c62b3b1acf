"""Compile `native.cpp` once for this machine, keep the result in the user's cache, and load it.

A plain shared object behind ctypes: the source and the headers beside it include nothing of PyTorch's, so that
compiling takes seconds, needs only a C++ compiler, and the result serves every version of PyTorch. It runs on the
OpenMP threads that PyTorch has.

Compiling happens at the first call that could use the result, where a compiler (CXX, or c++, g++ or clang++ on the
PATH) is found, and never twice for the same source, compiler and processor. RANK_EXPERTS_NATIVE=0 turns it all off;
RANK_EXPERTS_NATIVE=1 makes a failure an error; without either a failure is said once and PyTorch does the work.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from .._warnings import warn_once
from .announcement import announce

SOURCE = Path(__file__).with_name("native.cpp")
SWITCH = "RANK_EXPERTS_NATIVE"
_SECONDS = 300


class NativeBuildError(RuntimeError):
    """Why there is no native kernel; the message says what to do."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels; None where they are turned off, no compiler is found, or compiling failed.

    Raises:
        NativeBuildError: There is none though RANK_EXPERTS_NATIVE=1 asks for it.
        ValueError: RANK_EXPERTS_NATIVE is neither 0 nor 1.
    """
    switch = os.environ.get(SWITCH, "")
    if switch not in ("", "0", "1"):
        raise ValueError(f"{SWITCH} is {switch!r}: expected 0 (never) or 1 (an error where it cannot be had).")
    if switch == "0":
        announce(f"no native kernel, because {SWITCH}=0")
        return None
    compiler = find_compiler()
    if compiler is None and not switch:
        announce("no native kernel, because no C++ compiler is on the PATH")
        return None
    try:
        if compiler is None:
            raise NativeBuildError("No C++ compiler: none of c++, g++ and clang++ is on the PATH; or name one in CXX.")
        return _load(compiler)
    except NativeBuildError as error:
        if switch:
            raise
        warn_once(f"rank_experts goes on without its native CPU kernel. {error} {SWITCH}=0 silences this.")
        return None


def find_compiler() -> tuple[str, ...] | None:
    """Return the compiler's command, its path first, from CXX or the PATH; None where there is none."""
    named = os.environ.get("CXX")
    for command in [shlex.split(named)] if named else [["c++"], ["g++"], ["clang++"]]:
        if command and (path := shutil.which(command[0])):
            return (path, *command[1:])
    return None


def cache_folder() -> Path:
    """Return where compiled kernels are kept: rank_experts in XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rank_experts"


def _load(compiler: tuple[str, ...]) -> ctypes.CDLL:
    name = f"native-{_fingerprint(compiler)}.so"
    folder = _private(cache_folder())
    if folder is None:
        # Gone with this block; the loaded object stays mapped.
        with tempfile.TemporaryDirectory(prefix="rank_experts-") as temporary:
            return _open(_build(compiler, Path(temporary) / name))
    if (target := folder / name).exists():
        try:
            return _open(target)
        except NativeBuildError:
            announce(f"a new native kernel, because {target} cannot be loaded")
    return _open(_build(compiler, target))


def _open(path: Path) -> ctypes.CDLL:
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeBuildError(f"What the compiler made cannot be loaded: {error}.") from error
    pointer: Any = ctypes.c_void_p
    integer: Any = ctypes.c_int64
    common = [*[integer] * 8, ctypes.c_double]
    loaded.rank_experts_logits.argtypes = [*[integer] * 4, *[pointer] * 4]
    loaded.rank_experts_logits.restype = integer
    loaded.rank_experts_decode.argtypes = [ctypes.c_char_p]
    loaded.rank_experts_forward.argtypes = [*common, *[pointer] * 4, integer, *[pointer] * 10]
    loaded.rank_experts_backward.argtypes = [*common, *[pointer] * 11, integer, *[pointer] * 5]
    loaded.rank_experts_count.argtypes = [*[integer] * 4, *[pointer] * 4]
    loaded.rank_experts_given_forward.argtypes = [*common, *[pointer] * 4, integer, *[pointer] * 3]
    loaded.rank_experts_given_backward.argtypes = [
        *common, *[pointer] * 5, integer, *[pointer] * 2, integer, *[pointer] * 4
    ]  # fmt: skip
    loaded.rank_experts_task_gates.argtypes = [*[integer] * 6, *[pointer] * 7]
    loaded.rank_experts_task_gates.restype = integer
    loaded.rank_experts_task_gates_backward.argtypes = [*[integer] * 7, *[pointer] * 9]
    for name in ("forward", "backward", "decode", "count", "given_forward", "given_backward", "task_gates_backward"):
        getattr(loaded, f"rank_experts_{name}").restype = None
    return loaded


def _private(folder: Path) -> Path | None:
    # The folder, where nobody but this user can put a file to be loaded; None where that cannot be had.
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
        others = found.st_uid != os.geteuid() or found.st_mode & 0o022
        if not others and os.access(folder, os.W_OK | os.X_OK):
            return folder
        reason = "others may write to it" if others else "it cannot be written to"
    except OSError as error:
        reason = str(error)
    announce(f"a native kernel compiled for this process alone: {folder} cannot keep it, because {reason}")
    return None


def _fingerprint(compiler: tuple[str, ...]) -> str:
    # What the compiled code depends on: a home folder may be shared by machines that differ in all of it.
    found = os.stat(os.path.realpath(compiler[0]))
    parts = (*compiler, found.st_size, found.st_mtime_ns, platform.machine(), _processor(), _openmp())
    sources = [SOURCE, *sorted(SOURCE.parent.glob("native_*.h"))]
    return hashlib.sha256(b"".join(map(Path.read_bytes, sources)) + repr(parts).encode()).hexdigest()[:24]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _openmp() -> str | None:
    # The runtime that PyTorch has loaded. A second one would bring threads of its own, which spin beside PyTorch's.
    if not torch.backends.openmp.is_available():
        return None
    try:
        mapped = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    paths = re.findall(r"(/\S*/lib(?:gomp|iomp5|omp)[^/\s]*\.so[.\d]*)", mapped)
    return paths[0] if paths else None


def _build(compiler: tuple[str, ...], target: Path) -> Path:
    # Next to the target and then renamed: another process sees all of it or nothing.
    announce("a native kernel, which is being compiled, once")
    openmp = _openmp()
    attempts = [["-march=native", "-fopenmp"]] if openmp else []
    attempts += [["-march=native"], []]  # Not every compiler knows them.
    with tempfile.TemporaryDirectory(prefix=".building-", dir=target.parent) as folder:
        built, made = Path(folder) / "native.o", Path(folder) / target.name
        for flags in attempts:
            common = ["-std=c++17", "-O3", "-fPIC", *flags]
            failure = _run([*compiler, *common, "-c", str(SOURCE), "-o", str(built)])
            # Linked by hand to the runtime that is there, and not to the compiler's own.
            runtime = [openmp] if openmp and "-fopenmp" in flags else []
            failure = failure or _run([*compiler, "-shared", str(built), "-o", str(made), *runtime])
            if not failure:
                os.replace(made, target)
                return target
    raise NativeBuildError(f"{shlex.join(compiler)} failed on {SOURCE}: {failure[-1500:]}")


def _run(command: list[str]) -> str:
    # What a failing command printed; "" where it succeeded.
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, errors="replace")
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if done.returncode == 0 else (done.stderr or f"exit status {done.returncode}").strip()
