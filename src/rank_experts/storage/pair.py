"""A config and its weights as bytes: read as one pair, replaced as one pair, and nothing outside of their folder.

The adapter's two files are such a pair, and so are a classifier's heads.

Two files cannot be renamed in one step. The weights' rename is therefore the moment of a save: the safetensors
metadata holds a copy of the config, a digest of the tensors, and the digest of the config that the save is about to
replace. A reader that finds the config of that digest beside the weights knows that the save was cut off
between the two renames, and takes the copy. Hence kill -9 at any moment leaves the old adapter or the new one.

Exchanging whole folders (renameat2) would do without the copy, but moves the user's other files, needs the parent
folder, and exists on Linux alone. Readers that know nothing of the metadata, PEFT's among them, skip it.

The digests tell damage and mix-ups, not forgery: whoever can write the files can write the digests too.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from ..messages import warn_once
from .staging import Files, write_files

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"


class PairNames(NamedTuple):
    """What the two files of a pair are called: JSON, and the safetensors file that it describes."""

    config: str
    weights: str


ADAPTER_FILES = PairNames(CONFIG_FILE, WEIGHTS_FILE)

PICKLE_REFUSED = (
    f"{PICKLE_FILE} is a pickle, which can run code, and is not read. If you trust who made it, load the adapter with "
    "the library that wrote it and save it again: PEFT's model.save_pretrained(path) writes safetensors."
)
"""What a reader says where there is no safetensors file."""

MAX_CONFIG_BYTES = 16 * 2**20
"""A larger `adapter_config.json` is refused unread; a hundred thousand task names fit."""

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
_CONFIG = "rank_experts_config"
_DIGEST = "rank_experts_sha256"
_REPLACED = "rank_experts_replaced_config_sha256"


class PairBytes(NamedTuple):
    """The two files of a pair, unparsed.

    Attributes:
        config: The config's JSON that belongs to the weights.
        saved_config: The copy that was saved within the weights, where it differs from `config`: someone edited
            the JSON since. None where it does not, or where another program wrote the weights.
        weights: The safetensors file, or None where there is none.
    """

    config: bytes
    saved_config: bytes | None
    weights: bytes | None


def read_pair(folder: Path, header_only: bool = False, names: PairNames = ADAPTER_FILES) -> PairBytes:
    """Read a config and its weights as one pair, also while another process saves.

    Args:
        folder: Where they lie.
        header_only: Read the weights' header without the tensors.
        names: What the two files are called.

    Raises:
        FileNotFoundError: There is no config.
        ValueError: A file is not a regular one, lies outside of the folder, is too large for a config, or is damaged.
    """
    for _ in range(100):
        config = read_config_bytes(folder, names.config)
        weights = read_weights(folder, header_only, names.weights) if os.path.lexists(folder / names.weights) else None
        metadata = _metadata(weights) if weights is not None else {}
        saved = metadata.get(_CONFIG, "").encode(errors="replace")
        if not saved or _sha256(config) == _sha256(saved):
            return PairBytes(config, None, weights)
        if _sha256(config) == metadata.get(_REPLACED):
            if len(saved) > MAX_CONFIG_BYTES:
                raise _damaged(folder / names.weights, f"the config within it has {len(saved)} bytes")
            warn_once(
                f"{folder / names.config} is older than {names.weights} beside it: a save was cut off between the two. "
                "The config that was saved within the weights counts. Save once more to have both."
            )
            return PairBytes(saved, None, weights)
        if read_config_bytes(folder, names.config) == config:
            return PairBytes(config, saved, weights)
        # Another process saved between the two reads.
    raise ValueError(f"{folder} is being written without pause: {names.config} changed at each of 100 readings.")


def read_config_bytes(folder: Path, name: str = CONFIG_FILE) -> bytes:
    """Read an `adapter_config.json`, of any method, or another pair's JSON as it lies there.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is not a regular file, lies outside of the folder, or is too large for a config.
    """
    if not folder.is_dir() or not os.path.lexists(folder / name):
        what = f"holds no {name}" if folder.is_dir() else "is not a folder"
        raise FileNotFoundError(
            f"{folder} {what}. Expected an adapter's folder, with {CONFIG_FILE} and {WEIGHTS_FILE}."
        )
    return read_file(folder, name, MAX_CONFIG_BYTES)


def read_file(folder: Path, name: str, max_bytes: int) -> bytes:
    """Read a regular file of a folder, and nothing that lies elsewhere or is larger than expected.

    Raises:
        OSError: It is not there, or cannot be read.
        ValueError: It is not a regular file, lies outside of the folder, or is too large.
    """
    with _open_inside(folder, name) as file:
        if (size := os.fstat(file.fileno()).st_size) > max_bytes:
            raise ValueError(f"{folder / name} has {size} bytes: expected at most {max_bytes}.")
        return file.read(max_bytes)


def parse_json(file: Path, config: bytes) -> dict[str, Any]:
    """Parse a config, of any method; `file` is for messages.

    Raises:
        ValueError: Not JSON, or not an object.
    """
    try:
        values = json.loads(config)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}: expected an object of config fields.")
    return values


def read_weights(
    folder: Path,
    header_only: bool = False,
    name: str = WEIGHTS_FILE,
    check: Callable[[dict[str, tuple[int, ...]]], object] | None = None,
) -> bytes:
    """Read an adapter's safetensors file, or another pair's, and check its digest where it carries one.

    Args:
        folder: Where it lies.
        header_only: Read, and check, the header alone.
        name: The file's.
        check: Is given the tensors' names and shapes before any of them is read, and raises where they are not wanted:
            a file takes no room on the disk for zeros, and all of it in memory.

    Raises:
        FileNotFoundError: There is none; the message says so where there is a pickle instead.
        ValueError: It is not a regular file, lies outside of the folder, is damaged, or does not fit into memory.
    """
    path = folder / name
    if not os.path.lexists(path):
        hint = PICKLE_REFUSED if os.path.lexists(folder / PICKLE_FILE) else "Save or download it again."
        raise FileNotFoundError(f"{folder} holds no {name}. {hint}")
    with _open_inside(folder, name) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        header_size = int.from_bytes(start, "little")
        if len(start) < 8 or header_size > min(size - 8, _MAX_HEADER_BYTES):
            raise _damaged(path, f"its header claims {header_size} bytes, the file has {size}")
        header = file.read(header_size)
        entries = _entries(path, header)
        shapes = _shapes(path, entries, size - 8 - header_size)
        if header_only:
            return start + header
        if check is not None:
            check(shapes)
        file.seek(0)  # Once more from the start, rather than a copy of all that is read to put the header before it.
        try:
            weights = file.read(size)
        except MemoryError:
            raise ValueError(f"{path} has {size} bytes, which do not fit into memory.") from None
    metadata = entries.pop("__metadata__", {})
    tensors = memoryview(weights)[8 + header_size :]
    if _DIGEST in metadata and metadata[_DIGEST] != _tensor_digest(entries, tensors):
        raise _damaged(path, "its tensors are not those that were saved")
    return weights


def parse_weights(path: Path, weights: bytes) -> dict[str, Tensor]:
    """Parse a safetensors file's bytes; that takes as much memory again, whatever the header claims.

    Args:
        path: Where they came from, for messages.
        weights: From `read_weights`.

    Raises:
        ValueError: They are damaged.
    """
    try:
        return dict(sorted(load(weights).items()))  # safetensors' own order changes from call to call
    except (SafetensorError, KeyError, ValueError, RuntimeError, OverflowError) as error:
        raise _damaged(path, repr(error)) from None


def _entries(path: Path, header: bytes) -> dict[str, Any]:
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON ({error})") from None
    metadata = entries.get("__metadata__", {}) if isinstance(entries, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "its header is not an object with text as metadata")
    return entries


def _shapes(path: Path, entries: dict[str, Any], size: int) -> dict[str, tuple[int, ...]]:
    # Of the tensors, once it is known that they, and nothing else, take the file's room.
    shapes, taken = {}, 0
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        try:
            begin, end = map(_whole, entry["data_offsets"])
            shapes[name] = tuple(map(_whole, entry["shape"]))
        except (KeyError, TypeError, ValueError):
            raise _damaged(path, f"its header does not say where {name} lies") from None
        if not begin <= end <= size or end - begin > 16 * math.prod(shapes[name]):
            raise _damaged(path, f"its header gives {name}, of shape {shapes[name]}, the bytes {begin} to {end}")
        taken += end - begin
    if taken != size:
        raise _damaged(path, f"its header claims {taken} bytes of tensors, the file has {size}")
    return shapes


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(value)
    return value


def _metadata(weights: bytes) -> dict[str, str]:
    header_size = int.from_bytes(weights[:8], "little")
    return json.loads(weights[8 : 8 + header_size]).get("__metadata__", {})


def _tensor_digest(entries: dict[str, Any], data: bytes | memoryview) -> str:
    # Names, dtypes, shapes and places too: two tensors that change places are damage as well.
    digest = hashlib.sha256(json.dumps(entries, sort_keys=True).encode())
    digest.update(data)
    return digest.hexdigest()


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"{path} is damaged: {why}. Save or download the adapter again.")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _open_inside(folder: Path, name: str) -> Any:
    # Links may not lead out of the folder; the Hub's cache, where every file is a link to ../../blobs, is known.
    path = folder / name
    target, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    snapshots = [place for place in (root, *root.parents) if place.parent.name == "snapshots"]
    allowed = [root, *(place.parent.parent / "blobs" for place in snapshots)]
    if not any(place in target.parents for place in allowed):
        raise ValueError(f"{path} is a link to {target}, outside of the folder. Put the file itself there.")
    # Not blocking: opening a named pipe would wait for a writer.
    handle = os.open(target, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"{path} is not a regular file.")
    return os.fdopen(handle, "rb")


def check_tensor(what: str, tensor: Tensor, shape: tuple[int, ...], floating: bool = True) -> None:
    """Check a tensor that is about to be loaded.

    Args:
        what: Names it in messages; ends in the tensor's name on disk or in the model.
        tensor: What was found.
        shape: What is expected.
        floating: Whether floating-point numbers are expected, of 16 bits or more.

    Raises:
        ValueError: Another shape or dtype, or values that are not finite.

    Example:
        >>> check_tensor("A", torch.zeros(4, 8), (4, 8))
    """
    if (found := tuple(tensor.shape)) != shape:
        raise ValueError(f"{what} has shape {found}, expected {shape}.")
    if ".balance_bias" in what and tensor.dtype != torch.float32:
        raise ValueError(f"{what} is {tensor.dtype}: expected torch.float32, its steps are too small for less.")
    if (tensor.dtype in _FLOATING) != floating or tensor.is_complex():
        expected = "a floating-point tensor of 16, 32 or 64 bits" if floating else "integers or truth values"
        raise ValueError(f"{what} is {tensor.dtype}: expected {expected}.")
    if not is_finite(tensor):
        raise ValueError(f"{what} has values that are not finite. The training that wrote it diverged.")


def is_finite(tensor: Tensor) -> bool:
    """Say whether a tensor's values are finite; true where they cannot be seen from this process alone."""
    if not tensor.is_floating_point() or tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter):
        return True
    # A sum is finite only where all of its terms are, and costs a fraction of looking at each; one that overflowed
    # decides nothing.
    total = tensor.detach().sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


def write_pair(folder: Path, config: str, tensors: dict[str, Tensor], names: PairNames = ADAPTER_FILES) -> None:
    """Replace a config and its weights in one step; where anything fails, the old ones stay.

    Args:
        folder: Made where it is missing. Processes that save to it at once wait for each other.
        config: JSON.
        tensors: Name to a contiguous tensor on the CPU.
        names: What the two files are called.

    Raises:
        OSError: The disk is full, the folder cannot be written, …; the message says what was needed.
    """
    weights = memoryview(save(tensors))
    header_size = int.from_bytes(weights[:8], "little")
    entries, data = json.loads(bytes(weights[8 : 8 + header_size])), weights[8 + header_size :]
    metadata = {"format": "pt", _CONFIG: config, _DIGEST: _tensor_digest(entries, data)}

    def files() -> Files:
        metadata[_REPLACED] = _digest_of_old_config(folder, names.config)
        header = json.dumps({"__metadata__": metadata} | entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        return {names.weights: [len(header).to_bytes(8, "little"), header, data], names.config: [config.encode()]}

    write_files(folder, files)


def _digest_of_old_config(folder: Path, name: str) -> str:
    try:
        return _sha256(read_config_bytes(folder, name))
    except (FileNotFoundError, ValueError):
        return ""
