"""Writing a folder so that whoever looks at it sees all of it or nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary folder beside `target` to write into; it takes the target's place when the block ends well.

    Where the target exists, what was written replaces the files of the same names in it and the rest stays. Where
    the block raises, the target is as it was.

    Args:
        target: The folder to make.

    Yields:
        The temporary folder, empty.

    Raises:
        NotADirectoryError: The target exists and is a file.

    Example:
        >>> with staged_folder("adapter") as folder:  # doctest: +SKIP
        ...     (folder / "adapter_config.json").write_text("{}")
    """
    target = Path(target)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file: expected a folder, or a name that is free for one.")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield staging
        _publish(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, target: Path) -> None:
    if not target.exists():
        # mkdtemp makes folders that no one else may read.
        umask = os.umask(0)
        os.umask(umask)
        staging.chmod(0o777 & ~umask)
        staging.rename(target)
        return
    for file in sorted(path for path in staging.rglob("*") if path.is_file()):
        destination = target / file.relative_to(staging)
        destination.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, destination)
