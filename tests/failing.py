"""System calls that fail: the n-th one of a block, whichever it is, as a full disk or a broken one lets them.

    for fault in each_fault():
        with fault:
            what_is_tested()

runs the block once for each call that it makes, and stops after the run in which nothing failed. The calls are those of
Python's own modules; what compiled code does in between (safetensors, the compiler) is not seen.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import errno
import io
import os
import subprocess
from collections.abc import Iterator
from unittest import mock

with contextlib.suppress(ImportError):
    import fcntl

NAMES = {
    os: "open close read write fsync mkdir rmdir rename replace link unlink chmod stat lstat fstat access scandir "
    "listdir readlink truncate getcwd kill killpg waitpid umask",
    ctypes: "CDLL",
    subprocess: "Popen",
} | ({fcntl: "flock"} if "fcntl" in globals() else {})
FILE_METHODS = ("read", "readline", "write", "writelines", "flush", "close")


class Fault:
    """Lets one call of a block fail.

    Args:
        number: Which, the first is 1.
        error: The errno.

    Attributes:
        name: Of the call that failed; None: there were not so many.
    """

    def __init__(self, number: int, error: int = errno.EIO) -> None:
        self.number = number
        self.error = error
        self.seen = 0
        self.name: str | None = None
        self.patches = contextlib.ExitStack()

    def __enter__(self) -> Fault:
        for module, names in NAMES.items():
            for name in names.split():
                if hasattr(module, name):
                    self.patches.enter_context(mock.patch.object(module, name, self._wrap(name, getattr(module, name))))
        for module, name in ((builtins, "open"), (io, "open"), (os, "fdopen")):
            opening = self._wrap(name, getattr(module, name), result=lambda file: _File(file, self))
            self.patches.enter_context(mock.patch.object(module, name, opening))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.patches.close()

    def _wrap(self, name, call, result=lambda value: value):
        class Wrapped(call if isinstance(call, type) else object):
            def __new__(cls, *args, **kwargs):
                return self.make(name, call, result, args, kwargs)

        return (
            Wrapped if isinstance(call, type) else lambda *args, **kwargs: self.make(name, call, result, args, kwargs)
        )

    def make(self, name, call, result, args, kwargs):
        """Make a call, or fail in its place."""
        self.seen += 1
        if self.seen != self.number:
            return result(call(*args, **kwargs))
        self.name = f"{name}{args}"
        if name == "close":  # As the kernel has it: closed all the same.
            call(*args, **kwargs)
        raise OSError(self.error, os.strerror(self.error), *[arg for arg in args[:1] if isinstance(arg, str)])


class _File:
    """A file whose methods are calls too."""

    def __init__(self, file, fault):
        self._file, self._fault = file, fault

    def __getattr__(self, name):
        found = getattr(self._file, name)
        if name not in FILE_METHODS:
            return found
        return lambda *args, **kwargs: self._fault.make(name, found, lambda value: value, args, kwargs)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def __iter__(self):
        return iter(self._file)


def each_fault(error: int = errno.EIO) -> Iterator[Fault]:
    """Yield a fault for each call in turn; the last one meets none."""
    for number in range(1, 1000):
        fault = Fault(number, error)
        yield fault
        assert fault.seen, "the block was not run, or made no call"
        if fault.name is None:
            return
    raise AssertionError("The block has no end of calls.")
