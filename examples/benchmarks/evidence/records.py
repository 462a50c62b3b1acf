"""Records of runs: a JSON object a line, appended when a run is over: whatever stops a run loses that run alone.

A record is {"settings": …, "result": …, "cost": …}. Its settings say everything that the result depends on: two runs
are the same run where they are equal. Several processes may work on one file: a run is claimed by a lock that the
operating system drops when its owner ends (POSIX).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Settings = dict[str, Any]
Record = dict[str, Any]


def key(settings: Settings) -> str:
    """Return text that is equal for equal settings, in whatever order they were written."""
    return json.dumps(settings, sort_keys=True)


class Records:
    """The records of an experiment.

    Args:
        path: Of the file; it and its folder need not exist.

    Example:
        >>> import tempfile
        >>> records = Records(Path(tempfile.mkdtemp()) / "runs.jsonl")
        >>> records.append({"settings": {"seed": 0}, "result": {"error": 0.5}, "cost": {}})
        >>> [record["result"]["error"] for record in records.read()]
        [0.5]
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[Record]:
        """Return the records, in the order in which the runs ended. A last line that was cut off is left out.

        Raises:
            ValueError: Another line is no JSON; the message says which.
        """
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")
        found = []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError as error:
                if number == len(lines):  # Not ended by a newline: its writer was stopped.
                    continue
                raise ValueError(
                    f"{self.path}, line {number}: {error}. Remove the line; its run is done anew."
                ) from error
        return found

    def append(self, record: Record) -> None:
        """Add a record by one write, after a line that was cut off by a line of its own."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    _drop_last_line(file, end)
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")

    @contextlib.contextmanager
    def claim(self, settings: Settings) -> Iterator[bool]:
        """Say whether the run is this process's to do: nobody is at it, and no record of it is there."""
        folder = Path(tempfile.gettempdir()) / f"rank-experts-{_digest(str(self.path.resolve()))}"
        folder.mkdir(exist_ok=True)
        with (folder / _digest(key(settings))).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield key(settings) not in {key(record["settings"]) for record in self.read()}


def _drop_last_line(file: Any, end: int) -> None:
    file.seek(0)
    file.truncate(file.read(end).rfind(b"\n") + 1)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
