"""Compile `native.cpp` once for this machine, keep the result in the user's cache, and load it.

A plain shared object behind ctypes: the source and the headers beside it include nothing of PyTorch's, so that
compiling takes seconds, needs only a C++ compiler, and the result serves every version of PyTorch. It runs on the
OpenMP threads that PyTorch has.

Compiling happens at the first call that could use the result, where a compiler (CXX, or c++, g++ or clang++ on the
PATH) is found, and never twice for the same source, compiler and processor. RANK_EXPERTS_NATIVE=0 turns it all off;
RANK_EXPERTS_NATIVE=1 makes a failure an error; without either a failure, of whatever kind, is said once and PyTorch
does the work.

What is loaded runs in this process, so the cache has to be this user's alone, all the way up, and a file's name holds
its digest: what a full disk or a crash has cut off is never mapped, for a missing page would kill the process.
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
import signal
import stat
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ....messages import warn_once
from ...announcement import announce

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
    try:
        compiler = find_compiler()
        if compiler is not None:
            return _load(compiler)
        if switch:
            raise NativeBuildError("No C++ compiler: none of c++, g++ and clang++ is on the PATH; or name one in CXX.")
        announce("no native kernel, because no C++ compiler is on the PATH")
        return None
    except Exception as error:  # An optional kernel is never an obstacle, whatever is wrong with the machine.
        if switch:
            raise error if isinstance(error, NativeBuildError) else NativeBuildError(_what(error)) from error
        warn_once(f"rank_experts goes on without its native CPU kernel. {_what(error)} {SWITCH}=0 silences this.")
        return None


def _what(error: Exception) -> str:
    return str(error) if isinstance(error, NativeBuildError) else f"{type(error).__name__}: {error}."


def find_compiler() -> tuple[str, ...] | None:
    """Return the compiler's command, its path first, from CXX or the PATH; None where CXX is unset and there is none.

    Raises:
        NativeBuildError: CXX is not a command.
    """
    named = os.environ.get("CXX", "").strip()
    try:
        commands = [shlex.split(named)] if named else [["c++"], ["g++"], ["clang++"]]
    except ValueError as error:
        raise NativeBuildError(f"CXX is {named!r}: {error}. Expected a compiler and its options.") from None
    for command in commands:
        if path := shutil.which(command[0]):
            return (os.path.abspath(path), *command[1:])
    if named:
        raise NativeBuildError(f"CXX is {named!r}: there is no such program.")
    return None


def cache_folder() -> Path | None:
    """Return where compiled kernels are kept: rank_experts in XDG_CACHE_HOME, or in ~/.cache; None without a home.

    A relative XDG_CACHE_HOME does not count, as its specification has it: the folder would be another one in each
    working directory.
    """
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if named.is_absolute():
        return named / "rank_experts"
    try:
        home = Path.home()
    except RuntimeError:  # A user id that no account has, as containers like them.
        return None
    return home / ".cache" / "rank_experts" if home.is_absolute() else None


def _load(compiler: tuple[str, ...]) -> ctypes.CDLL:
    stem = f"native-{_fingerprint(compiler)}"
    folder = _private_cache()
    kept = _find(folder, stem) if folder else None
    if kept is None and folder is not None and os.access(folder, os.W_OK | os.X_OK):
        with tempfile.TemporaryDirectory(prefix=".building-", dir=folder, ignore_cleanup_errors=True) as workshop:
            kept = _keep(_build(compiler, Path(workshop)), folder, stem)
    if kept is not None:
        try:
            return _open(kept)
        except OSError as error:
            announce(f"a copy of its native kernel, because {kept} cannot be loaded: {error}")
    # Gone with this block; the loaded object stays mapped.
    with tempfile.TemporaryDirectory(prefix="rank_experts-", ignore_cleanup_errors=True) as workshop:
        made = shutil.copy(kept, workshop) if kept is not None else _build(compiler, Path(workshop))
        try:
            return _open(Path(made))
        except OSError as error:
            again = f" Remove {kept} to have it compiled again." if kept is not None else ""
            raise NativeBuildError(f"What the compiler made cannot be loaded: {error}.{again}") from error


def _find(folder: Path, stem: str) -> Path | None:
    # The kept library, whole.
    for path in sorted(folder.glob(f"{stem}-*.so")):
        if path.name == _kept_name(stem, path):
            return path
        announce(f"a new native kernel, because {path} is damaged")
        with suppress(OSError):
            path.unlink()
    return None


def _kept_name(stem: str, file: Path) -> str:
    return f"{stem}-{hashlib.sha256(file.read_bytes()).hexdigest()}.so"


def _keep(made: Path, folder: Path, stem: str) -> Path:
    # Renamed into its place: another process sees all of it or nothing.
    target = folder / _kept_name(stem, made)
    with open(made, "rb") as file:
        os.fsync(file.fileno())
    os.replace(made, target)
    return target


def _open(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    try:
        _declare(loaded)
    except AttributeError as error:
        raise NativeBuildError(f"What the compiler made is not our kernel: {error}. Is CXX a C++ compiler?") from error
    return loaded


def _declare(loaded: ctypes.CDLL) -> None:
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


def _private_cache() -> Path | None:
    # Where nobody but this user can put a file to be loaded; None where that cannot be had.
    folder = cache_folder()
    reason = "there is no home folder" if folder is None else None
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder = folder.resolve(strict=True)
            reason = _open_to_others(folder)
        except (OSError, RuntimeError) as error:  # A circle of links is a RuntimeError before Python 3.13.
            reason = str(error)
    if reason is None:
        return folder
    announce(f"a native kernel compiled for this process alone: {folder} cannot keep it, because {reason}")
    return None


def _open_to_others(folder: Path) -> str | None:
    for place in (folder, *folder.parents):
        found = place.stat()
        if found.st_uid not in (0, os.geteuid()):
            return f"{place} belongs to somebody else"
        # Above it, where names are sticky as in /tmp, others can add files, and not exchange ours.
        if found.st_mode & 0o022 and (place == folder or not found.st_mode & stat.S_ISVTX):
            return f"others may write to {place}"
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


def _build(compiler: tuple[str, ...], workshop: Path) -> Path:
    # The library, made in an empty folder.
    announce("a native kernel, which is being compiled, once")
    openmp = _openmp()
    attempts = [["-march=native", "-fopenmp"]] if openmp else []
    attempts += [["-march=native"], []]  # Not every compiler knows them.
    built, made = workshop / "native.o", workshop / "native.so"
    for flags in attempts:
        common = ["-std=c++17", "-O3", "-fPIC", *flags]
        failure = _run([*compiler, *common, "-c", str(SOURCE), "-o", str(built)], built)
        # Linked by hand to the runtime that is there, and not to the compiler's own.
        runtime = [openmp] if openmp and "-fopenmp" in flags else []
        failure = failure or _run([*compiler, "-shared", str(built), "-o", str(made), *runtime], made)
        if not failure:
            return made
    raise NativeBuildError(f"{shlex.join(compiler)} failed on {SOURCE}: {failure[-1500:]}")


def _run(command: list[str], output: Path) -> str:
    # What a failing command printed; "" where it succeeded.
    log = output.with_suffix(".log")
    # Into a file: a pipe would stay open for as long as any child of the compiler's lives. TMPDIR is for its own files.
    environment = os.environ | {"TMPDIR": str(output.parent)}
    with open(log, "wb") as stderr:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=environment,
            start_new_session=True,
        )
    try:
        status = process.wait(_SECONDS)
    except subprocess.TimeoutExpired:
        raise NativeBuildError(f"{shlex.join(command)} was not done after {_SECONDS} s, and was ended.") from None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)  # Its children too.
            process.wait()
    if status == 0 and output.is_file():
        return ""
    said = log.read_text(errors="replace").strip()
    return said or (f"exit status {status}" if status else f"it wrote no {output.name}")
