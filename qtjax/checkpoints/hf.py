"""safetensors, the format of Hugging Face's checkpoints: read tensor by tensor, written as a stream."""

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import ml_dtypes  # noqa: F401  registers bfloat16 with numpy, which safetensors asks numpy for
import numpy as np
from safetensors import SafetensorError, safe_open

from qtjax.checkpoints.assemble import Index, StoredTensor
from qtjax.errors import QtjaxError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_READABLE = ("F32", "F16", "BF16", "F64")
_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def open_safetensors(folder: Path) -> dict[str, StoredTensor]:
    """{name: tensor} of model.safetensors, or of the shards that model.safetensors.index.json names; reads headers only.

    Raises QtjaxError for a truncated or corrupt file, a shard that is missing, a tensor the index promises and no file
    holds, and a stored dtype other than float64, float32, float16, bfloat16.
    """
    if (folder / WEIGHTS).is_file():
        return _open_file(folder / WEIGHTS)
    weight_map = read_index(folder / INDEX)
    found: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        tensors = _open_file(folder / name)
        found |= {k: t for k, t in tensors.items() if weight_map.get(k, name) == name}
    lost = sorted(set(weight_map) - set(found))
    if lost:
        raise QtjaxError(
            f"{folder / INDEX}: {len(lost)} tensors are not in the files it names, first {lost[0]!r} in"
            f" {weight_map[lost[0]]!r}; download the folder again"
        )
    return found


def read_index(path: Path) -> dict[str, str]:
    """{tensor: file} of an index file. Raises QtjaxError if it is malformed or names a file that is not there."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({str(name) for name in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise QtjaxError(f"{path}: not an index of checkpoint files (JSON with a weight_map)") from None
    outside = [name for name in files if Path(name).name != name]
    if outside:
        raise QtjaxError(f"{path}: names {outside[0]!r}; a shard must lie in the same folder")
    missing = [name for name in files if not (path.parent / name).is_file()]
    if missing:
        raise QtjaxError(
            f"{path}: {len(missing)} of {len(files)} files it names are missing: {', '.join(missing[:4])};"
            " finish the download or copy"
        )
    return weight_map


def _open_file(path: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            kinds = {name: s.get_dtype() for name, s in slices.items()}
            shapes = {name: tuple(s.get_shape()) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise QtjaxError(
            f"{path}: not a readable safetensors file ({_one_line(error)}); it is truncated or corrupt, copy or download it again"
        ) from None
    odd = sorted(name for name, kind in kinds.items() if kind not in _READABLE)
    if odd:
        raise QtjaxError(
            f"{path}: {odd[0]!r} is stored as {kinds[odd[0]]}; readable are {', '.join(_READABLE)}:"
            " give an unquantised checkpoint"
        )
    return {name: StoredTensor(shape, partial(_read, path, name)) for name, shape in shapes.items()}


def _read(path: Path, name: str, index: Index) -> np.ndarray:
    # Opened anew for each tensor: a file kept mapped keeps every page read so far in resident memory.
    with safe_open(path, framework="numpy") as file:
        return file.get_slice(name)[index]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class Outgoing(NamedTuple):
    """A tensor to be written: torch's layout; `array` is not kept after its bytes are written."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # "float32", "float16" or "bfloat16"

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * (4 if self.dtype == "float32" else 2)


def plan_files(tensors: Iterable[Outgoing], max_shard_bytes: int) -> dict[str, list[Outgoing]]:
    """{file name: tensors}, each file at most max_shard_bytes (a larger tensor has a file of its own)."""
    shards: list[list[Outgoing]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def index_json(files: Mapping[str, list[Outgoing]]) -> str:
    """The text of model.safetensors.index.json for a plan of several files."""
    total = sum(t.nbytes for shard in files.values() for t in shard)
    weight_map = {t.name: name for name, shard in files.items() for t in shard}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"


def encode_safetensors(tensors: list[Outgoing], values: Iterator[np.ndarray]) -> Iterator[memoryview | bytes]:
    """The bytes of one safetensors file, piece by piece, so that a shard is never in memory as a whole.

    `values` yields the arrays of `tensors` in order. Format: 8 bytes little-endian header length, a JSON header padded
    with spaces to a multiple of 8, then the tensors back to back (safetensors' README).
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for t in tensors:
        header[t.name] = {"dtype": _CODES[t.dtype], "shape": list(t.shape), "data_offsets": [offset, offset + t.nbytes]}
        offset += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for t in tensors:
        array = np.ascontiguousarray(next(values))
        assert array.shape == t.shape and array.dtype.name == t.dtype, (t, array.shape, array.dtype)
        yield memoryview(array.reshape(-1).view(np.uint8))
