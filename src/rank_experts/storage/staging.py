"""Files that change as a whole or not at all: written beside their places, brought to the disk, and then renamed.

Whatever this library writes into an adapter's folder goes through `write_files`. A new folder appears with all of its
files in one rename. In a folder that exists, files are renamed one after the other, in the order given, once all of
them lie on the disk: a kill between two renames leaves the first of them new. Where files belong together, one of them
has to say which others it belongs to; `storage.write_pair` does that.
"""

from __future__ import annotations

import errno
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ..messages import warn_once

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Files = Mapping[str, Sequence[bytes | memoryview]]
"""A path within the folder to the file's bytes, in parts."""


def write_files(folder: str | os.PathLike[str], files: Files | Callable[[], Files]) -> None:
    """Replace files of a folder, or make the folder with them; where anything fails, what was there before stays.

    Args:
        folder: Made where it is missing. Processes that write to a folder that exists wait for each other.
        files: Path within the folder to the bytes; or what returns them, called while nobody else writes. Other
            files of the folder stay.

    Raises:
        OSError: The disk is full, the folder cannot be written, a file or a folder is in the way, …; the message says
            what was needed.

    Example:
        >>> write_files("my-adapter", {"notes.md": [b"# Notes"]})  # doctest: +SKIP
    """
    folder = Path(folder)
    size = 0
    placed: list[Path] = []  # what has its new name, or the new folder

    def wanted() -> Files:
        nonlocal size
        found = files() if callable(files) else files
        size = sum(memoryview(part).nbytes for parts in found.values() for part in parts)
        return found

    try:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is a file; expected a folder, or a name that is free for one")
        if os.path.lexists(folder) or not _make(folder, wanted(), placed):
            with _locked(folder) as alone:
                _replace(folder, wanted(), alone, placed)
    except OSError as error:
        raise OSError(error.errno, _why_not_saved(folder, error, size, placed)) from error


def _make(folder: Path, files: Files, placed: list[Path]) -> bool:
    # False where another process made it at the same time.
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = _beside(folder)
    staging.mkdir()
    try:
        for name, parts in files.items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            _write(staging / name, parts)
        for directory in sorted({(staging / name).parent for name in files} | {staging}, reverse=True):
            _sync(directory)
        try:
            staging.rename(folder)
            placed.append(folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            return False
        _sync(folder.parent)
        return True
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace(folder: Path, files: Files, alone: bool, placed: list[Path]) -> None:
    if directories := [name for name in files if (folder / name).is_dir()]:
        raise IsADirectoryError(errno.EISDIR, f"{directories[0]} is a folder there")
    made: list[Path] = []
    staged: list[tuple[Path, Path]] = []
    try:
        for name, parts in files.items():
            target = folder / name
            for parent in reversed(target.parents):
                if not parent.exists():
                    parent.mkdir()
                    made.append(parent)
            if alone:
                # Of saves that were killed: nobody else writes while the lock is held.
                for path in target.parent.glob(f"{glob.escape(_prefix(target))}*"):
                    with suppress(OSError):
                        path.unlink()
            temporary = _beside(target)
            staged.append((temporary, target))
            _write(temporary, parts)
        for temporary, target in staged:
            os.replace(temporary, target)
            placed.append(target)
            _sync(target.parent)  # In this order on the disk too, where the power fails.
    except BaseException:
        for temporary, _ in staged:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        for parent in reversed(made):
            with suppress(OSError):
                parent.rmdir()
        raise


def _prefix(target: Path) -> str:
    # Not what an editor calls its own copy of a file; short enough where the name is as long as names may be.
    return f".{os.fsdecode(os.fsencode(target.name)[:200])}.saving."


def _beside(target: Path) -> Path:
    return target.with_name(_prefix(target) + secrets.token_hex(8))


def _write(file: Path, parts: Sequence[bytes | memoryview]) -> None:
    # Made with the modes that the umask leaves, as any other file; reading the umask would mean to change it for all
    # threads. Never through a link.
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    with os.fdopen(handle, "wb") as opened:
        opened.writelines(parts)
        opened.flush()
        os.fsync(opened.fileno())


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    # A lock on the folder itself leaves no lock file behind; the kernel drops it when its process dies.
    if fcntl is None:
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        alone = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            alone = False
            warn_once(
                f"{folder} lies on a file system without locks ({error.strerror}): let one process at a time save "
                "there. Two at once may leave a pair that loading refuses."
            )
        yield alone
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # A process that was forked meanwhile has the handle too, and keeps it.
    finally:
        os.close(handle)


def _sync(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # Not every file system syncs folders.
            raise
    finally:
        os.close(handle)


def _why_not_saved(folder: Path, error: OSError, size: int, placed: list[Path]) -> str:
    reason = error.strerror or str(error)
    message = f"cannot save {size:,} bytes to {folder}: {reason}. What was there before is unchanged."
    if placed:
        names = ", ".join(path.name for path in placed)
        return f"saving to {folder} was not finished: {reason}. New is {names}; save once more."
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and folder.is_dir():
        message += f" {shutil.disk_usage(folder).free:,} bytes are free there; saving needs room beside the old files."
    return message
